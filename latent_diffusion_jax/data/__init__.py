"""Images and their conditions in: sources, transforms, the loader and the cache of latents."""
