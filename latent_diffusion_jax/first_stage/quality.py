"""How good a first stage is, and signs that its training goes wrong."""

from collections.abc import Mapping
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp

SSIM_WINDOW = 11  # pixels


def quality(image: Any, image_hat: Any) -> dict[str, jax.Array]:
    """Means over images [B, H, W, 3] in [-1, 1] of L1, and of PSNR (dB) and SSIM.

    L1 is of values in [-1, 1]. PSNR and SSIM (Wang et al. 2004: Gaussian window of 11 pixels, sigma
    1.5, per channel, where the window fits) are of values clipped and scaled to [0, 1], of each
    image by itself; there is no SSIM of images that are smaller than the window.
    """
    a, b = ((jnp.clip(x, -1, 1) + 1) / 2 for x in (image, image_hat))
    found = {"l1": jnp.mean(jnp.abs(image - image_hat)), "psnr": jnp.mean(dm_pix.psnr(a, b))}
    if min(image.shape[1:3]) >= SSIM_WINDOW:
        found["ssim"] = jnp.mean(dm_pix.ssim(a, b))
    return found


def signs_of_trouble(means: Mapping[str, Any], codebook_size: int | None) -> dict[str, str]:
    """Lines on what goes wrong in training, from averages of its metrics; by a short name."""
    signs = {}
    if means.get("discriminator_factor", 0) > 0 and means["discriminator_loss"] < 0.1:
        signs["discriminator"] = (
            f"the discriminator has won (loss {means['discriminator_loss']:.2g}, logits"
            f" {means['logits_real']:.2g} real, {means['logits_fake']:.2g} reconstructed) and"
            " teaches nothing more: lower discriminator.optim.lr, or start it later"
        )
    if codebook_size and means["perplexity"] < codebook_size / 100:
        signs["codebook"] = (
            f"the codebook has collapsed (perplexity {means['perplexity']:.3g} of"
            f" {codebook_size} entries): set loss.restart_after, or a smaller codebook"
        )
    return signs
