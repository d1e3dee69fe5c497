"""Profiler traces of a few steps, for TensorBoard's profile tab, XProf or Perfetto."""

from collections.abc import Sequence

import jax

from latent_diffusion_jax.errors import UserError


class Trace:
    """Traces some steps of a run into a folder: (first, last), or none of (0, 0).

    Raises:
      UserError: these are not two numbers in order.
    """

    def __init__(self, folder: str, steps: Sequence[int]):
        if len(steps) != 2 or not (0 < steps[0] <= steps[1] or tuple(steps) == (0, 0)):
            raise UserError(f"run.profile {tuple(steps)} must be FIRST, LAST, from 1 on, or 0, 0")
        self._folder, (self._first, self._last) = folder, steps
        self._running = False

    def before(self, step: int) -> None:
        """Called before each step is dispatched."""
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def ends(self, step: int) -> bool:
        """Whether the trace ends behind this step, which must be finished before `close`."""
        return self._running and step == self._last

    def close(self) -> None:
        """Writes what was traced."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
