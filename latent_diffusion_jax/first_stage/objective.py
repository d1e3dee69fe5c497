"""The loss of phase 1: reconstruction and regularisation (paper section 3.1, equation 25).

As published, the KL model's terms are summed over an image and averaged over the batch, the VQ
model's are means over everything. The perceptual and adversarial terms of that equation join the
reconstruction term here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from latent_diffusion_jax.errors import choose
from latent_diffusion_jax.first_stage import posterior
from latent_diffusion_jax.first_stage.losses import PIXEL_LOSSES, perplexity
from latent_diffusion_jax.first_stage.quantize import codebook_loss
from latent_diffusion_jax.first_stage.stage import FirstStage

# (params, frozen, batch, key, train) -> (loss, metrics)
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def _kl_loss(stage: FirstStage, *, pixel: str = "l1", kl_weight: float = 1e-6) -> Loss:
    pixel_loss = choose("pixel loss", pixel, PIXEL_LOSSES)

    def loss(params, frozen, batch, key, train):
        del frozen
        image = batch["image"]
        posterior_key, *dropout_keys = jax.random.split(key, 3)
        apply = _with_dropout(stage.autoencoder, params["autoencoder"], dropout_keys, train)
        moments = apply("encode", image)
        z = stage.sample(moments, posterior_key) if train else stage.mode(moments)
        image_hat = apply("decode", z)
        reconstruction = jnp.sum(pixel_loss(image, image_hat)) / len(image)
        kl = jnp.mean(posterior.kl(moments))
        total = reconstruction + kl_weight * kl
        return total, {"loss": total, "kl": kl, **_quality(image, image_hat, z)}

    return loss


def _vq_loss(
    stage: FirstStage,
    *,
    pixel: str = "l1",
    codebook_weight: float = 1.0,
    beta: float = 0.25,
    legacy: bool = False,
) -> Loss:
    autoencoder: Any = stage.autoencoder
    pixel_loss = choose("pixel loss", pixel, PIXEL_LOSSES)

    def loss(params, frozen, batch, key, train):
        del frozen
        network, image = params["autoencoder"], batch["image"]
        apply = _with_dropout(autoencoder, network, jax.random.split(key), train)
        z = apply("encode", image)
        quantized = autoencoder.apply({"params": network}, z, method="quantized")
        image_hat = apply("decode", quantized.z)
        codebook = codebook_loss(z, quantized.entries, beta, legacy)
        total = jnp.mean(pixel_loss(image, image_hat)) + codebook_weight * codebook
        used = perplexity(quantized.indices, autoencoder.codebook_size)
        metrics = {"loss": total, "codebook": codebook, "perplexity": used}
        return total, {**metrics, **_quality(image, image_hat, z)}

    return loss


def _with_dropout(autoencoder, params, keys, train):
    """`apply(method, x)` with a dropout key of its own for each of encode and decode."""
    keys = dict(zip(("encode", "decode"), keys, strict=True))

    def apply(method, x):
        rngs = {"dropout": keys[method]} if train else None
        return autoencoder.apply({"params": params}, x, train, method=method, rngs=rngs)

    return apply


def _quality(image, image_hat, z):
    error = image - image_hat
    return {
        "l1": jnp.mean(jnp.abs(error)),
        "mse": jnp.mean(error**2),  # PSNR is -10 log10(mse / 4), taken after averaging
        "z_mean": jnp.mean(z),
        "z_std": jnp.std(z),
    }


LOSSES: dict[str, Callable[..., Loss]] = {"kl": _kl_loss, "vq": _vq_loss}


def make_loss(stage: FirstStage, *, kind: str, **terms) -> Loss:
    """The loss of a first stage of a kind; `terms` are that kind's weights.

    KL: pixel ("l1", "l2"), kl_weight. VQ: pixel, codebook_weight, beta, legacy.
    """
    return choose("trainable first stage", kind, LOSSES)(stage, **terms)
