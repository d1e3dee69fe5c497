"""Sampling piece by piece, between which it can be seen and stopped; the images are `sample`'s."""

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_diffusion_jax import build, sampling
from latent_diffusion_jax.demo.settings import Settings
from latent_diffusion_jax.diffusion.editing import last_steps
from latent_diffusion_jax.diffusion.schedule import make_timesteps
from latent_diffusion_jax.inputs import Given
from latent_diffusion_jax.pipeline import Trained
from latent_diffusion_jax.train.sharding import put_rows, replicated

PIECE = 0.5  # seconds of denoising between two looks at it
SHARE = 0.2  # of the time, at most, for previews
PREVIEW_SIDE = 32  # latent pixels: a decoder's cost grows with their number
PREVIEWS = 4  # images of a run that are shown while it is under way


class Seen(NamedTuple):
    """How far a run is; images [n, H, W, 3] in [-1, 1]: a preview, all at the end, or None."""

    step: int
    steps: int
    images: np.ndarray | None


class Programs(NamedTuple):
    """`sampling.Pieces`, compiled; preview is a decoder of a few small images."""

    start: Any
    advance: Any
    finish: Any
    preview: Any


class Denoiser:
    """A model and its compiled programs: one each for a sampler, a size and a number of images."""

    def __init__(self, trained: Trained, mesh: Mesh):
        self.trained, self.mesh = trained, mesh
        self._programs = functools.lru_cache(maxsize=8)(self._make_programs)

    def check(self, settings: Settings, given: Given) -> None:
        """Raises UserError where the sampler, the steps or the size will not do."""
        self._prepare(settings, given)

    def run(self, settings: Settings, given: Given) -> Iterator[Seen]:
        """Yields how far it is, the last time with all images; whoever stops asking stops it.

        Args:
          settings: what for.
          given: its `read_given`.
        """
        programs, times = self._prepare(settings, given)
        rows = -(-settings.number // self.mesh.size) * self.mesh.size
        wanted = np.minimum(np.arange(rows), settings.number - 1)  # filled up, as the last batch is
        inputs = {name: values[wanted] for name, values in given.inputs.items()}
        put = put_rows(self.mesh, {**inputs, "indices": np.arange(rows)})
        indices = put.pop("indices")
        trained = self.trained
        args = trained.params, trained.frozen, put, jax.random.key(settings.seed), indices
        scales = jnp.float32(settings.scale), jnp.float32(sampling.PLAIN.guide_scale)
        steps = len(times[0])
        padding = len(build.schedule(trained.config).alpha) - steps  # for one program of any steps
        padded = [np.pad(t, (0, padding)) for t in times]

        yield Seen(0, steps, None)
        fixed, state = programs.start(*args, times[0][0])
        step, piece, shown = 0, 1, 0.0
        began = time.monotonic()
        while step < steps:
            before, first = time.monotonic(), step
            step = min(step + piece, steps)
            state = programs.advance(*args, scales, fixed, state, padded, first, step)
            jax.block_until_ready(state)
            now, preview = time.monotonic(), None
            if step < steps and shown <= SHARE * (now - began):
                preview = np.asarray(programs.preview(trained.frozen, state[-1]))[: settings.number]
            yield Seen(step, steps, preview)
            if first == 0:  # which may have compiled, and says nothing of the others
                began = time.monotonic()
                continue
            piece = max(round(PIECE * (step - first) / (now - before)), 1)
            shown += time.monotonic() - now
        images = np.asarray(programs.finish(trained.frozen, fixed, state[0]))
        yield Seen(steps, steps, sampling.with_known_pixels(images, inputs)[: settings.number])

    def _prepare(self, settings: Settings, given: Given) -> tuple[Programs, Any]:
        config = self.trained.config
        extras = sampling.Extras(strength=settings.strength)
        times = make_timesteps(settings.timesteps, settings.steps, build.schedule(config))
        times = last_steps(times, sampling.strength(extras, given.inputs))
        programs = self._programs(
            settings.sampler,
            tuple(settings.options.items()),
            settings.scale != 1,
            settings.size or given.size,
            extras,
        )
        return programs, times

    def _make_programs(self, sampler, options, guided, size, extras) -> Programs:
        pieces = sampling.make_pieces(
            self.trained.config,
            self.mesh,
            sampler=sampler,
            options=dict(options),
            guided=guided,
            size=size,
            extras=extras,
        )

        def finish(frozen, fixed, z):
            return pieces.decode(frozen, pieces.finish(fixed, z))

        def preview(frozen, x0):
            _, h, w, c = x0.shape
            by = -(-max(h, w) // PREVIEW_SIDE)
            few = x0[:PREVIEWS]
            return pieces.decode(
                frozen, jax.image.resize(few, (len(few), h // by, w // by, c), "linear")
            )

        whole = replicated(self.mesh)
        return Programs(
            jax.jit(pieces.start),
            jax.jit(pieces.advance),
            jax.jit(finish, out_shardings=whole),
            jax.jit(preview, out_shardings=whole),
        )
