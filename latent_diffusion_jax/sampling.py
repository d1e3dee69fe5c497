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
from latent_diffusion_jax.diffusion.editing import keep_known, last_steps, slerp
from latent_diffusion_jax.diffusion.guidance import dynamic_threshold, guide, image_guide, within
from latent_diffusion_jax.diffusion.prediction import Denoise, make_denoise
from latent_diffusion_jax.diffusion.samplers import (
    Sampler,
    advance,
    image_keys,
    image_noise,
    make_sampler,
    sample,
)
from latent_diffusion_jax.diffusion.schedule import add_noise, make_timesteps
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
    pieces = make_pieces(
        config,
        mesh,
        sampler=sampler,
        options=options,
        guided=guided,
        size=size,
        extras=extras,
        cached=cached,
    )
    times = make_timesteps(timesteps, steps, build.schedule(config))

    def latent(params, frozen, inputs, key, indices, scales):
        ending = last_steps(times, strength(extras, inputs))
        fixed, (z, *_) = pieces.start(params, frozen, inputs, key, indices, ending[0][0])
        method, denoise, noise = pieces.loop(params, frozen, inputs, key, indices, scales, fixed)
        return pieces.finish(fixed, sample(method, denoise, z, timesteps=ending, noise=noise))

    return latent, pieces.decode


class Pieces(NamedTuple):
    """Sampling, taken apart so that it can be stopped, seen and taken up between any two steps.

    start(params, frozen, inputs, key, indices, t) -> (fixed, state): what steps do not change, and
      what they do, (z, carry, x0), before the first of them, which is from t.
    loop(params, frozen, inputs, key, indices, scales, fixed) -> (sampler, denoise, noise), for
      `samplers.sample`.
    advance(params, frozen, inputs, key, indices, scales, fixed, state, times, first, last) ->
      state, the steps `first` to `last` - 1 later; both may be traced, as may times (t, t_next).
    finish(fixed, z) -> the latent [B, h, w, c] of the last z.
    decode(frozen, latent) -> images [B, H, W, 3].
    """

    start: Callable[..., tuple[dict[str, Any], Any]]
    loop: Callable[..., tuple[Sampler, Denoise, Callable]]
    advance: Callable[..., Any]
    finish: Callable[[Any, jax.Array], jax.Array]
    decode: Callable[[Any, jax.Array], jax.Array]


def make_pieces(
    config: ConfigDict,
    mesh: AnyMesh,
    *,
    sampler: str,
    options: Mapping[str, float],
    guided: bool,
    size: tuple[int, int] | None = None,
    extras: Extras = PLAIN,
    cached: bool = False,
) -> Pieces:
    """Builds the pure functions that `make_programs` puts together; its arguments."""
    schedule, stage = build.schedule(config), build.first_stage(config)
    method = make_sampler(sampler, schedule, **options)
    shape = build.latent_shape(config, size)
    conditions, denoiser = make_denoiser(config, mesh, guided, extras, cached)

    def start(params, frozen, inputs, key, indices, t):
        frozen = gather(mesh, frozen)
        z = image_noise(keys_of(inputs, key, indices), -1, shape)
        if "between" in inputs:
            other = image_noise(image_keys(key, jnp.ones_like(indices)), -1, shape)
            z = slerp(z, other, inputs["between"])
        fixed = {"conds": conditions(params, frozen, inputs)}
        if "start" in inputs:
            moments = stage.encode(frozen["first_stage"], inputs["start"])
            z0 = frozen["latent_scale"] * stage.mode(moments)
            if strength(extras, inputs) < 1:
                z = add_noise(schedule, z0, t, z)
            if "hole" in inputs:  # a latent pixel is known where all that it stands for are
                known = 1 - max_pool(inputs["hole"], (stage.factor,) * 2, (stage.factor,) * 2)
                fixed |= {"z0": z0, "known": known}
        z = z.astype(jnp.float32)
        return fixed, (z, solver(fixed).init(z), jnp.zeros_like(z))

    def keys_of(inputs, key, indices):
        return image_keys(key, jnp.zeros_like(indices) if "between" in inputs else indices)

    def solver(fixed, fresh=None):
        if "known" not in fixed:
            return method
        return keep_known(method, schedule, fixed["z0"], fixed["known"], fresh)

    def loop(params, frozen, inputs, key, indices, scales, fixed):
        keys = keys_of(inputs, key, indices)
        apart = jax.vmap(jax.random.fold_in, (0, None))(keys, EDIT)  # not the sampler's noise
        return (
            solver(fixed, lambda i: image_noise(apart, i, shape)),
            denoiser(params, frozen, fixed["conds"], inputs, scales),
            lambda i: image_noise(keys, i, shape),
        )

    def advance_(params, frozen, inputs, key, indices, scales, fixed, state, times, first, last):
        chosen, denoise, noise = loop(params, frozen, inputs, key, indices, scales, fixed)
        return advance(
            chosen, denoise, state, schedule, timesteps=times, noise=noise, first=first, last=last
        )

    def finish(fixed, z):
        if "known" not in fixed:
            return z
        return fixed["known"] * fixed["z0"] + (1 - fixed["known"]) * z

    def decode(frozen, z):
        frozen = gather(mesh, frozen)
        return stage.decode(frozen["first_stage"], z / frozen["latent_scale"])

    return Pieces(start, loop, advance_, finish, decode)


def strength(extras: Extras, inputs: Mapping[str, Any]) -> float:
    """How much of the way from noise is sampled: all of it where there is no image to change."""
    if extras.strength is not None and "start" in inputs:
        return extras.strength
    return 0.75 if "start" in inputs and "hole" not in inputs else 1.0


def make_denoiser(
    config: ConfigDict, mesh: AnyMesh, guided: bool, extras: Extras, cached: bool = False
) -> tuple[Callable[..., Any], Callable[..., Denoise]]:
    """Builds conditions(params, frozen, inputs) -> conds, and what steps need of them.

    That is denoiser(params, frozen, conds, inputs, (scale, guide_scale)) -> Denoise. Guidance,
    windows and thresholds are inside it. Weights that lie split over the mesh are gathered anew in
    each call of the network, so that no device ever holds all of them.
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

    plain = not guided or extras.interval is not None

    def conditions(params, frozen, inputs):
        def of(inputs):
            return condition(gather(mesh, params), gather(mesh, frozen), inputs)

        asked = {name: inputs[name] for name in conditioner.keys}
        conds = {"asked": of(asked)} if plain else {}
        if guided:
            both = (null(params, frozen, asked), asked)
            conds["both"] = of(jax.tree.map(lambda *x: jnp.concatenate(x), *both))
        return conds

    def denoiser(params, frozen, conds, inputs, scales):
        scale, guide_scale = scales

        def of(cond):
            return make_denoise(
                lambda z_t, t: network(params["unet"], z_t, t, cond),
                schedule,
                config.diffusion.prediction,
            )

        if guided:
            denoise = guide(of(conds["both"]), scale)
            if extras.interval is not None:
                denoise = within(extras.interval, denoise, of(conds["asked"]))
        else:
            denoise = of(conds["asked"])
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

    return conditions, denoiser


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
