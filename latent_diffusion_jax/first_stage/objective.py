"""What phase 1 minimises (paper section 3.1, equation 25; Esser et al. 2021, equation 7).

|x - x_hat| + LPIPS + a regulariser of the latent + lambda times an adversarial term, against a
discriminator that is trained in the same step. As published, the KL model's terms are summed over
an image and averaged over the batch, the VQ model's are means over everything.

A step runs each network forward once and backward once. The reconstruction's and the adversarial
term's gradients by the image are taken first; lambda needs both at the decoder's last kernel alone,
so the last convolution's vjp is pulled back twice, and all that lies before it once, with the sum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
from latent_diffusion_jax.first_stage.quality import quality
from latent_diffusion_jax.first_stage.quantize import (
    codebook_loss,
    init_use,
    note_use,
    restart_unused,
)
from latent_diffusion_jax.first_stage.stage import FirstStage
from latent_diffusion_jax.train.objective import Criterion


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
    if restart_after and kind != "vq":
        raise UserError(f"loss.restart_after={restart_after}: first stage {kind!r} has no codebook")
    loss = _Loss(
        stage.autoencoder, regulariser, adversary, pixel_loss, perceptual_weight, restart_after
    )
    turns = [loss.of_both]
    if adversary is not None and adversary.second_forward:
        turns = [loss.of_autoencoder, loss.of_discriminator]
    return Criterion(turns, loss.evaluate, loss.init_buffers, loss.revise)


class _Loss(NamedTuple):
    """The parts of the loss, and the functions of a `Criterion` that are made of them."""

    autoencoder: Any
    regulariser: Regulariser
    adversary: Adversary | None
    pixel_loss: Callable[[jax.Array, jax.Array], jax.Array]
    perceptual_weight: float
    restart_after: int

    def of_both(self, params, buffers, frozen, batch, key, step):
        """The discriminator's gradients too, of the reconstruction that is there."""
        tape = self._backward(params, buffers, frozen, batch["image"], key, step)
        buffers, found, metrics = tape.buffers, {"autoencoder": tape.gradients}, tape.metrics
        if self.adversary is not None:
            real, pull_real, buffers = judge(self.adversary, params, buffers, batch["image"])
            found["discriminator"], more = discriminator_gradients(
                self.adversary, (real, pull_real), tape.fake, step
            )
            metrics = {**metrics, **more}
        return buffers, found, metrics

    def of_autoencoder(self, params, buffers, frozen, batch, key, step):
        """The first turn of the published form."""
        tape = self._backward(params, buffers, frozen, batch["image"], key, step)
        return tape.buffers, {"autoencoder": tape.gradients}, tape.metrics

    def of_discriminator(self, params, buffers, frozen, batch, key, step):
        """The second turn: of another reconstruction, by the updated autoencoder."""
        del frozen
        assert self.adversary is not None
        image, key = batch["image"], jax.random.fold_in(key, 1)
        latent, apply = self._latent(params["autoencoder"], image, key, train=True)
        real, pull_real, buffers = judge(self.adversary, params, buffers, image)
        image_hat = apply("decode", latent.decoded)
        fake, pull_fake, buffers = judge(self.adversary, params, buffers, image_hat)
        found, metrics = discriminator_gradients(
            self.adversary, (real, pull_real), (fake, pull_fake), step
        )
        return buffers, {"discriminator": found}, metrics

    def _backward(self, params, buffers, frozen, image, key, step) -> "_Tape":
        """Forward and backward through the autoencoder."""
        network, fake = params["autoencoder"], None

        def features(network):
            latent, apply = self._latent(network, image, key, train=True)
            return (apply("features", latent.decoded), latent.penalty), latent

        def last(params, h):
            return last_convolution(self.autoencoder, params, h)

        (h, penalty), pull_features, latent = jax.vjp(features, network, has_aux=True)
        image_hat, pull_last = jax.vjp(last, network["decoder"]["conv_out"], h)
        nll = jax.value_and_grad(self._nll, has_aux=True)
        (value, metrics), d_nll = nll(image_hat, image, frozen)
        total = pull_last(d_nll)  # by the last convolution's parameters, by h
        metrics |= {"loss": value + penalty, **latent.metrics, **_statistics(latent.z)}
        metrics["l1"] = jnp.mean(jnp.abs(image - image_hat))
        if self.adversary is not None:
            logits, pull, buffers = judge(self.adversary, params, buffers, image_hat)
            generator, d_logits = jax.value_and_grad(generator_loss)(logits)
            adversarial = pull_last(pull(d_logits)[1])
            weight = adaptive_weight(total[0]["kernel"], adversarial[0]["kernel"])
            weight *= self.adversary.weight
            scale = weight * self.adversary.factor_at(step)
            total = jax.tree.map(lambda a, b: a + scale.astype(b.dtype) * b, total, adversarial)
            metrics["loss"] += scale * generator
            metrics |= {"generator_loss": generator, "adaptive_weight": weight}
            fake = logits, pull
        (found,) = pull_features((total[1], jnp.ones_like(penalty)))
        found = {**found, "decoder": {**found["decoder"], "conv_out": total[0]}}
        if latent.codes is not None:
            metrics |= use_of_codes(latent.codes)
        if self.restart_after:
            use = note_use(buffers["codebook"], latent.codes, latent.z, jax.random.fold_in(key, 2))
            buffers = {**buffers, "codebook": use}
        return _Tape(found, buffers, metrics, fake)

    def _latent(self, params, image, key, train):
        """The latent, and apply(method, x) of the autoencoder, with dropout keys of their own."""
        latent_key, *keys = jax.random.split(key, 3)
        dropout = dict(zip(("encode", "decode"), keys, strict=True))

        def apply(method, x):
            key = dropout["encode" if method == "encode" else "decode"]
            rngs = {"dropout": key} if train else None
            return self.autoencoder.apply({"params": params}, x, train, method=method, rngs=rngs)

        return self.regulariser.latent(apply, params, image, latent_key, train), apply

    def _nll(self, image_hat, image, frozen):
        error = self.pixel_loss(image, image_hat)
        metrics = {}
        if self.perceptual_weight:
            lpips: Any = Lpips(self.autoencoder.dtype)
            distance = lpips.apply({"params": frozen["lpips"]}, image, image_hat)
            metrics["lpips"] = jnp.mean(distance)
            error = error + self.perceptual_weight * distance[:, None, None, None]
        nll = self.regulariser.nll(error)
        return nll, {**metrics, "nll": nll, "rec": jnp.mean(error)}

    def evaluate(self, params, buffers, frozen, batch, key):
        """Of the most probable latent, by the running statistics."""
        image = batch["image"]
        latent, apply = self._latent(params["autoencoder"], image, key, train=False)
        image_hat = apply("decode", latent.decoded)
        nll, metrics = self._nll(image_hat, image, frozen)
        metrics |= {"loss": nll + latent.penalty, **latent.metrics, **_statistics(latent.z)}
        metrics |= quality(image, image_hat)
        if latent.codes is not None:
            metrics["codes"] = latent.codes
        if self.adversary is not None:
            statistics = buffers["discriminator"]
            variables = {"params": params["discriminator"], "batch_stats": statistics}
            for name, x in (("real", image), ("fake", image_hat)):
                logits = self.adversary.network.apply(variables, x, False)
                metrics[f"logits_{name}"] = jnp.mean(logits)
        return metrics

    def init_buffers(self):
        """Running statistics of the discriminator, use of the codebook."""
        buffers = {}
        if self.adversary is not None:
            buffers["discriminator"] = self.adversary.init(jax.random.key(0))[1]
        if self.restart_after:
            size, dim = self.autoencoder.codebook_size, self.autoencoder.embed_dim
            buffers["codebook"] = init_use(size, dim)
        return buffers

    def revise(self, params, buffers):
        """Restarts the entries of the codebook that nobody uses."""
        if not self.restart_after:
            return params, buffers
        network, use = params["autoencoder"], buffers["codebook"]
        # the entries are all there is in that module
        (entries,), tree = jax.tree.flatten(network["quantize"])
        entries, use = restart_unused(entries, use, self.restart_after)
        network = {**network, "quantize": jax.tree.unflatten(tree, [entries])}
        return {**params, "autoencoder": network}, {**buffers, "codebook": use}


class _Tape(NamedTuple):
    """gradients: of the autoencoder; fake: logits of the reconstruction, and their pull."""

    gradients: Any
    buffers: Any
    metrics: dict[str, jax.Array]
    fake: Any


def _statistics(z):
    """Mean and standard deviation of each channel [c]: phase 2 wants latents near 0 and 1."""
    axes = tuple(range(z.ndim - 1))
    return {"z_mean": jnp.mean(z, axes), "z_std": jnp.std(z, axes)}
