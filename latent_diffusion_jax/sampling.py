"""From trained parts to samples: all that sampling can do, composed in one jitted program."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import max_pool
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.diffusion.editing import from_image, keep_known, slerp
from latent_diffusion_jax.diffusion.guidance import dynamic_threshold, guide, image_guide, within
from latent_diffusion_jax.diffusion.prediction import Denoise, make_denoise
from latent_diffusion_jax.diffusion.samplers import image_keys, image_noise, make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import make_timesteps
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.stage import FirstStage
from latent_diffusion_jax.first_stage.tiling import tiled_evenly
from latent_diffusion_jax.nn.windows import windowed_network
from latent_diffusion_jax.pipeline import Trained
from latent_diffusion_jax.train.sharding import AnyMesh, gather, gather_late, put_rows, replicated

THRESHOLD_FLOOR = 3.0  # of scaled latents, whose deviation is 1: data is hardly ever beyond
EDIT = 2**31  # apart from the numbers of steps


class Extras(NamedTuple):
    """What sampling can do beyond a sampler and guidance; the defaults are none of it.

    interval: (low, high) in t, where alone guidance acts.
    threshold: quantile of dynamic thresholding, in (0, 1].
    strength: in (0, 1], of the change of the images that inputs have as `start`; default: 1 beside
      `hole`, 0.75 without.
    guide_scale: of guidance by the images that inputs have as `guide`, whose pixels count alike
      whatever their number: above 0.1 a short-trained model falls apart.
    window: side in pixels of the windows that the UNet sees, which overlap by half.
    tile: side in pixels of the tiles that are decoded one by one, which overlap by a quarter.
    """

    interval: tuple[float, float] | None = None
    threshold: float | None = None
    strength: float | None = None
    guide_scale: float = 0.05
    window: int | None = None
    tile: int | None = None


PLAIN = Extras()


def make_generate(
    config: ConfigDict,
    mesh: Mesh,
    *,
    sampler: str,
    options: Mapping[str, float],
    steps: int,
    timesteps: str,
    scale: float,
    size: tuple[int, int] | None = None,
    extras: Extras = PLAIN,
    cached: bool = False,
) -> Callable[..., Any]:
    """Builds generate(params, frozen, inputs, key, indices) -> images [B, H, W, 3], compiled once.

    Args:
      config: of phase 2.
      mesh: rows of `inputs` and `indices` are spread over it, so B must divide by its size.
      sampler: one of SAMPLERS; `options` are its own, such as eta.
      steps: how many; `timesteps` says which, one of TIMESTEPS.
      scale: of guidance; 1 is the plain condition, evaluated alone.
      size: height and width of the images; default: as in training.
      extras: see there.
      cached: whether inputs are what `encode` stored, and `frozen` goes with it.

    Image i (of `indices`) depends on the key and i alone, up to rounding. Beside the conditioner's,
    `inputs` may hold `start` and `hole` (an edit), `guide`, and `between` [B], from 0 to 1: images
    between those that indices 0 and 1 would give, whatever their own index.
    """
    stage = build.first_stage(config)
    latent, decode = make_programs(
        config,
        mesh,
        sampler=sampler,
        options=options,
        steps=steps,
        timesteps=timesteps,
        guided=scale != 1,
        size=size,
        extras=extras,
        cached=cached,
    )
    by_tiles = None
    if extras.tile is not None:
        side = _latent_side("tile", extras.tile, stage)
        by_tiles = tiled_evenly(decode, side, max(side // 4, 1))

    def generate(params, frozen, *rest):
        return decode(frozen, latent(params, frozen, *rest))

    compiled = jax.jit(latent if by_tiles else generate, out_shardings=replicated(mesh))
    scales = jnp.float32(scale), jnp.float32(extras.guide_scale)

    def call(params, frozen, inputs, key, indices):
        rows = put_rows(mesh, {**inputs, "indices": indices})
        indices = rows.pop("indices")
        out = compiled(params, frozen, rows, key, indices, scales)
        return by_tiles(frozen, out) if by_tiles else out

    return call


def make_programs(
    config: ConfigDict,
    mesh: AnyMesh,
    *,
    sampler: str,
    options: Mapping[str, float],
    steps: int,
    timesteps: str,
    guided: bool,
    size: tuple[int, int] | None = None,
    extras: Extras = PLAIN,
    cached: bool = False,
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """Builds what `make_generate` compiles, as pure functions.

    They are latent(params, frozen, inputs, key, indices, (scale, guide_scale)) -> [B, h, w, c] and
    decode(frozen, latent) -> images [B, H, W, 3]. `guided`: whether there is a scale other than 1.
    """
    schedule, stage = build.schedule(config), build.first_stage(config)
    method = make_sampler(sampler, schedule, **options)
    times = make_timesteps(timesteps, steps, schedule)
    shape = build.latent_shape(config, size)
    denoiser = make_denoiser(config, mesh, guided, extras, cached)

    def latent(params, frozen, inputs, key, indices, scales):
        denoise = denoiser(params, frozen, inputs, scales)
        frozen = gather(mesh, frozen)
        keys = image_keys(key, jnp.zeros_like(indices) if "between" in inputs else indices)
        z, chosen, ending = image_noise(keys, -1, shape), method, times
        if "between" in inputs:
            other = image_noise(image_keys(key, jnp.ones_like(indices)), -1, shape)
            z = slerp(z, other, inputs["between"])
        if "start" in inputs:
            moments = stage.encode(frozen["first_stage"], inputs["start"])
            z0 = frozen["latent_scale"] * stage.mode(moments)
            strength = extras.strength or (1.0 if "hole" in inputs else 0.75)
            if strength < 1:
                z, ending = from_image(schedule, z0, z, times, strength)
        known = None
        if "hole" in inputs:  # a latent pixel is known where all pixels that it stands for are
            known = 1 - max_pool(inputs["hole"], (stage.factor,) * 2, (stage.factor,) * 2)
            fresh = jax.vmap(jax.random.fold_in, (0, None))(keys, EDIT)  # not the sampler's noise
            chosen = keep_known(method, schedule, z0, known, lambda i: image_noise(fresh, i, shape))
        z = sample(
            chosen, denoise, z, timesteps=ending, noise=lambda i: image_noise(keys, i, shape)
        )
        return z if known is None else known * z0 + (1 - known) * z

    def decode(frozen, z):
        frozen = gather(mesh, frozen)
        return stage.decode(frozen["first_stage"], z / frozen["latent_scale"])

    return latent, decode


def make_denoiser(
    config: ConfigDict, mesh: AnyMesh, guided: bool, extras: Extras, cached: bool = False
) -> Callable[..., Denoise]:
    """Builds denoiser(params, frozen, inputs, (scale, guide_scale)) -> Denoise.

    Conditions, guidance, windows and thresholds are inside it. Weights that lie split over the mesh
    are gathered anew in each call of the network, so that no device ever holds all of them.
    """
    schedule, stage = build.schedule(config), build.first_stage(config)
    conditioner, whole = build.conditioner(config, cached), build.denoise_network(config)
    condition, null = build.condition(config, cached), build.null(config, cached)

    def network(params, z_t, t, cond):
        params, z_t = gather_late(mesh, params, z_t)
        return whole(params, z_t, t, cond)

    guided = guided and bool(conditioner.keys)
    if extras.window is not None:
        side = _latent_side("window", extras.window, stage)
        network = windowed_network(network, side, max(side // 2, 1))

    def denoiser(params, frozen, inputs, scales):
        scale, guide_scale = scales

        def of(inputs):
            cond = condition(gather(mesh, params), gather(mesh, frozen), inputs)
            return make_denoise(
                lambda z_t, t: network(params["unet"], z_t, t, cond),
                schedule,
                config.diffusion.prediction,
            )

        asked = {name: inputs[name] for name in conditioner.keys}
        if guided:
            both = (null(params, frozen, asked), asked)
            denoise = guide(of(jax.tree.map(lambda *x: jnp.concatenate(x), *both)), scale)
            if extras.interval is not None:
                denoise = within(extras.interval, denoise, of(asked))
        else:
            denoise = of(asked)
        if "guide" in inputs:
            wanted = inputs["guide"]

            def log_likelihood(z):  # of the image's pixels, seen at the guide's size
                weights, z = gather_late(mesh, frozen["first_stage"], z)
                image = stage.decode(weights, z / frozen["latent_scale"])
                seen = jax.image.resize(image, wanted.shape, "cubic")
                return -jnp.sum((seen - wanted) ** 2, axis=(1, 2, 3)) / 2

            denoise = image_guide(denoise, schedule, log_likelihood, guide_scale)
        if extras.threshold is not None:
            denoise = dynamic_threshold(denoise, schedule, extras.threshold, THRESHOLD_FLOOR)
        return denoise

    return denoiser


def _latent_side(name: str, side: int, stage: FirstStage) -> int:
    """A side in pixels, in latent pixels."""
    if side < 1 or side % stage.factor:
        raise UserError(f"--{name}={side} must be a multiple of {stage.factor} pixels")
    return side // stage.factor


def example_inputs(config: ConfigDict, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs for previews: every class in turn."""
    if "label" not in build.conditioner(config).keys:
        return {}
    return {"label": (indices % config.conditioning.num_classes).astype(np.int32)}


def generate(
    trained: Trained,
    mesh: Mesh,
    *,
    inputs: Mapping[str, np.ndarray] | Callable[[np.ndarray], Mapping[str, np.ndarray]],
    number: int,
    batch: int,
    seed: int,
    start: int = 0,
    extras: Extras = PLAIN,
    **options: Any,
) -> Iterator[np.ndarray]:
    """Yields images [b, H, W, 3] in [-1, 1], `number` of them in all, in order, from `start` on.

    `inputs` holds one row per image, or makes the rows of some of them from their indices, where
    memory does not hold all; `options` are `make_generate`'s. The batch is rounded up to a multiple
    of the devices, which changes no image.
    """
    given = dict(config=trained.config, mesh=mesh, extras=extras)
    run = build.unpack("sample", make_generate, options, **given)
    rows = -(-min(batch, number) // mesh.size) * mesh.size
    for first in range(start, number, rows):
        indices = np.arange(first, first + rows)
        wanted = np.minimum(indices, number - 1)  # the last batch is filled up
        if callable(inputs):
            chosen = dict(inputs(wanted))
        else:
            chosen = {name: values[wanted] for name, values in inputs.items()}
        images = run(trained.params, trained.frozen, chosen, jax.random.key(seed), indices)
        yield with_known_pixels(np.asarray(images), chosen)[: number - first]


def with_known_pixels(images: Any, inputs: Mapping[str, Any], where: Callable = np.where) -> Any:
    """Images [B, H, W, 3] with the pixels that were not to be filled as they were given."""
    for hole, original in (("mask", "image_to_fill"), ("hole", "start")):
        if hole in inputs:
            images = where(inputs[hole] >= 0.5, images, inputs[original])
    return images
