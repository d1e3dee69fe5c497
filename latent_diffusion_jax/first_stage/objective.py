"""What phase 1 minimises (paper section 3.1, equation 25; Esser et al. 2021, equation 7).

|x - x_hat| + LPIPS + a regulariser of the latent + lambda times an adversarial term, against a
discriminator that is trained in the same step. As published, the KL model's terms are summed over
an image and averaged over the batch, the VQ model's are means over everything.

A step runs each network forward once and backward once. The reconstruction's and the adversarial
term's gradients by the image are taken first; lambda needs both at the decoder's last kernel alone,
so the last convolution's vjp is pulled back twice, and all that lies before it once, with the sum.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp

from latent_diffusion_jax.errors import UserError, choose
from latent_diffusion_jax.first_stage import posterior
from latent_diffusion_jax.first_stage.adversary import Adversary, discriminator_gradients, judge
from latent_diffusion_jax.first_stage.autoencoder import last_convolution
from latent_diffusion_jax.first_stage.losses import (
    PIXEL_LOSSES,
    adaptive_weight,
    generator_loss,
    nll_sum,
    use_of_codes,
)
from latent_diffusion_jax.first_stage.lpips import Lpips
from latent_diffusion_jax.first_stage.quantize import codebook_loss
from latent_diffusion_jax.first_stage.stage import FirstStage
from latent_diffusion_jax.train.objective import Criterion

SSIM_WINDOW = 11  # pixels


class Latent(NamedTuple):
    """decoded: what the decoder gets; z: what phase 2 gets; penalty: the regulariser's term.

    codes: the share of positions that each entry of the codebook has, None without one.
    """

    decoded: jax.Array
    z: jax.Array
    penalty: jax.Array
    metrics: dict[str, jax.Array]
    codes: jax.Array | None


class Regulariser(NamedTuple):
    """latent: (apply, params, image, key, train) -> Latent; nll: error [B, H, W, C] -> []."""

    latent: Callable[..., Latent]
    nll: Callable[[jax.Array], jax.Array]


def _kl(stage: FirstStage, *, kl_weight: float = 1e-6, logvar: float = 0.0) -> Regulariser:
    def latent(apply, params, image, key, train):
        del params
        moments = apply("encode", image)
        z = stage.sample(moments, key) if train else stage.mode(moments)
        kl = jnp.mean(posterior.kl(moments))
        return Latent(z, z, kl_weight * kl, {"kl": kl}, None)

    return Regulariser(latent, lambda error: nll_sum(error, logvar))


def _vq(
    stage: FirstStage, *, codebook_weight: float = 1.0, beta: float = 0.25, legacy: bool = False
) -> Regulariser:
    autoencoder: Any = stage.autoencoder
    size = autoencoder.codebook_size

    def latent(apply, params, image, key, train):
        del key, train
        z = apply("encode", image)
        quantized = autoencoder.apply({"params": params}, z, method="quantized")
        codebook = codebook_loss(z, quantized.entries, beta, legacy)
        codes = jnp.bincount(quantized.indices.reshape(-1), length=size) / quantized.indices.size
        return Latent(quantized.z, z, codebook_weight * codebook, {"codebook": codebook}, codes)

    return Regulariser(latent, jnp.mean)


REGULARISERS: dict[str, Callable[..., Regulariser]] = {"kl": _kl, "vq": _vq}


def make_criterion(
    stage: FirstStage,
    *,
    kind: str,
    adversary: Adversary | None = None,
    pixel: str = "l1",
    perceptual_weight: float = 1.0,
    restart_after: int = 0,
    **terms: Any,
) -> Criterion:
    """What a first stage of a kind minimises; parameters `autoencoder` and `discriminator`.

    Args:
      stage: of this `kind`.
      kind: "kl" or "vq".
      adversary: None for none.
      pixel: "l1" or "l2".
      perceptual_weight: of LPIPS, whose weights are `frozen["lpips"]`; 0 for none.
      restart_after: VQ: an entry that no position had for so many steps starts again from one of
        the batch's latents; 0 for never.
      **terms: KL: kl_weight, logvar. VQ: codebook_weight, beta, legacy.

    Raises:
      UserError: an unknown kind or loss; restarts without a codebook.
    """
    regulariser = choose("trainable first stage", kind, REGULARISERS)(stage, **terms)
    pixel_loss = choose("pixel loss", pixel, PIXEL_LOSSES)
    autoencoder: Any = stage.autoencoder
    if restart_after and kind != "vq":
        raise UserError(f"loss.restart_after={restart_after}: first stage {kind!r} has no codebook")
    lpips: Any = Lpips(autoencoder.dtype)

    def latent_of(params, image, key, train):
        """The latent, and apply(method, x) with dropout keys of their own."""
        latent_key, *keys = jax.random.split(key, 3)
        dropout = dict(zip(("encode", "decode"), keys, strict=True))

        def apply(method, x):
            key = dropout["encode" if method == "encode" else "decode"]
            rngs = {"dropout": key} if train else None
            return autoencoder.apply({"params": params}, x, train, method=method, rngs=rngs)

        return regulariser.latent(apply, params, image, latent_key, train), apply

    def nll_of(image_hat, image, frozen):
        error = pixel_loss(image, image_hat)
        metrics = {}
        if perceptual_weight:
            distance = lpips.apply({"params": frozen["lpips"]}, image, image_hat)
            metrics["lpips"] = jnp.mean(distance)
            error = error + perceptual_weight * distance[:, None, None, None]
        nll = regulariser.nll(error)
        return nll, {**metrics, "nll": nll, "rec": jnp.mean(error)}

    def autoencoder_gradients(params, buffers, frozen, batch, key, step):
        """Of the autoencoder, and what the discriminator's need of it."""
        image, network = batch["image"], params["autoencoder"]

        def features(network):
            latent, apply = latent_of(network, image, key, True)
            return (apply("features", latent.decoded), latent.penalty), latent

        (h, penalty), pull_features, latent = jax.vjp(features, network, has_aux=True)
        image_hat, pull_last = jax.vjp(
            lambda *args: last_convolution(autoencoder, *args), network["decoder"]["conv_out"], h
        )
        (nll, metrics), d_nll = jax.value_and_grad(nll_of, has_aux=True)(image_hat, image, frozen)
        total, seen = pull_last(d_nll), None
        metrics |= {"loss": nll + penalty, **latent.metrics, **_statistics(latent.z)}
        metrics["l1"] = jnp.mean(jnp.abs(image - image_hat))
        if adversary is not None:
            fake, pull, buffers = judge(adversary, params, buffers, image_hat)
            generator, d_fake = jax.value_and_grad(generator_loss)(fake)
            adversarial = pull_last(pull(d_fake)[1])
            weight = adversary.weight * adaptive_weight(
                total[0]["kernel"], adversarial[0]["kernel"]
            )
            scale = weight * adversary.factor_at(step)
            total = jax.tree.map(lambda a, b: a + scale.astype(b.dtype) * b, total, adversarial)
            metrics["loss"] += scale * generator
            metrics |= {"generator_loss": generator, "adaptive_weight": weight}
            seen = fake, pull
        (found,) = pull_features((total[1], jnp.ones_like(penalty)))
        found = {**found, "decoder": {**found["decoder"], "conv_out": total[0]}}
        if latent.codes is not None:
            metrics |= use_of_codes(latent.codes)
        if restart_after:
            buffers = _note_codes(buffers, latent, jax.random.fold_in(key, 2))
        return buffers, {"autoencoder": found}, metrics, seen

    def both(params, buffers, frozen, batch, key, step):
        buffers, found, metrics, seen = autoencoder_gradients(
            params, buffers, frozen, batch, key, step
        )
        if adversary is not None:
            real, pull_real, buffers = judge(adversary, params, buffers, batch["image"])
            found["discriminator"], more = discriminator_gradients(
                adversary, (real, pull_real), seen, step
            )
            metrics |= more
        return buffers, found, metrics

    def autoencoder_alone(*args):
        return autoencoder_gradients(*args)[:3]

    def discriminator_alone(params, buffers, frozen, batch, key, step):
        del frozen
        assert adversary is not None
        image = batch["image"]
        latent, apply = latent_of(params["autoencoder"], image, jax.random.fold_in(key, 1), True)
        real, pull_real, buffers = judge(adversary, params, buffers, image)
        image_hat = apply("decode", latent.decoded)
        fake, pull_fake, buffers = judge(adversary, params, buffers, image_hat)
        found, metrics = discriminator_gradients(
            adversary, (real, pull_real), (fake, pull_fake), step
        )
        return buffers, {"discriminator": found}, metrics

    def evaluate(params, buffers, frozen, batch, key):
        image = batch["image"]
        latent, apply = latent_of(params["autoencoder"], image, key, False)
        image_hat = apply("decode", latent.decoded)
        nll, metrics = nll_of(image_hat, image, frozen)
        metrics |= {"loss": nll + latent.penalty, **latent.metrics, **_statistics(latent.z)}
        metrics |= quality(image, image_hat)
        if latent.codes is not None:
            metrics["codes"] = latent.codes
        if adversary is not None:
            statistics = buffers["discriminator"]
            variables = {"params": params["discriminator"], "batch_stats": statistics}
            for name, x in (("real", image), ("fake", image_hat)):
                metrics[f"logits_{name}"] = jnp.mean(adversary.network.apply(variables, x, False))
        return metrics

    def init_buffers():
        buffers = {}
        if adversary is not None:
            buffers["discriminator"] = adversary.init(jax.random.key(0))[1]
        if restart_after:
            size, dim = autoencoder.codebook_size, autoencoder.embed_dim
            buffers["codebook"] = {
                "idle": jnp.zeros((size,), jnp.int32),
                "used": jnp.zeros((size,), bool),
                "fresh": jnp.zeros((size, dim)),
            }
        return buffers

    def revise(params, buffers):
        if not restart_after:
            return params, buffers
        return _restart_codes(params, buffers, restart_after)

    published = adversary is not None and adversary.second_forward
    turns = [autoencoder_alone, discriminator_alone] if published else [both]
    return Criterion(turns, evaluate, init_buffers, revise)


def _note_codes(buffers, latent, key):
    codebook = buffers["codebook"]
    size = len(latent.codes)
    z = latent.z.reshape(-1, latent.z.shape[-1])
    fresh = z[jax.random.randint(key, (size,), 0, len(z))]
    used = codebook["used"] | (latent.codes > 0)
    return {**buffers, "codebook": {**codebook, "used": used, "fresh": fresh}}


def _restart_codes(params, buffers, after):
    codebook = buffers["codebook"]
    idle = jnp.where(codebook["used"], 0, codebook["idle"] + 1)
    dead = idle >= after

    def restart(entries):
        return jnp.where(dead[:, None], codebook["fresh"], entries)

    network = params["autoencoder"]
    quantize = jax.tree.map(restart, network["quantize"])  # the codebook is all there is in it
    codebook = {**codebook, "idle": jnp.where(dead, 0, idle), "used": jnp.zeros_like(dead)}
    params = {**params, "autoencoder": {**network, "quantize": quantize}}
    return params, {**buffers, "codebook": codebook}


def _statistics(z):
    """Mean and standard deviation of each channel [c]: phase 2 wants latents near 0 and 1."""
    axes = tuple(range(z.ndim - 1))
    return {"z_mean": jnp.mean(z, axes), "z_std": jnp.std(z, axes)}


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
