"""Folders of the diffusers library, in and out; neither it nor torch is needed."""

from latent_diffusion_jax.convert.diffusers.reader import read
from latent_diffusion_jax.convert.diffusers.writer import export

__all__ = ["export", "read"]
