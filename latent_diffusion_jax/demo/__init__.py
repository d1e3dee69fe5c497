"""A local web page on a trained model, and images that say how they were made."""
