"""Training: state, optimiser, sharding, checkpoints, metrics and the loop; knows neither phase."""
