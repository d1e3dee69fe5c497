"""Latent diffusion models (Rombach et al., CVPR 2022) in JAX: train, resume and sample both phases.

The command line (`python -m latent_diffusion_jax --help`) is the front door; from Python start at
`latent_diffusion_jax.build` (config -> objects) and `latent_diffusion_jax.pipeline` (trained
parts -> images). Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
