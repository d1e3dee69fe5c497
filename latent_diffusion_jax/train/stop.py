"""Stopping on request without losing anything: SIGTERM, Ctrl-C and preemption of a cluster."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A signal asked the run to stop; everything is saved. `exit_code` is the process's."""

    def __init__(self, number: int, step: int):
        super().__init__(f"{signal.Signals(number).name}: saved at step {step}")
        self.exit_code = 130 if number == signal.SIGINT else 0


class StopSignals:
    """Notes SIGTERM and the first Ctrl-C for the loop to act on; a second Ctrl-C aborts at once.

    Of several processes only one may get the signal, or each at another step. Then JAX's
    coordination service listens to SIGTERM, as which a Ctrl-C is passed on, and
    `reached_preemption(step)` is true in all at one step.
    Only the main thread may handle signals: elsewhere nothing is noted.
    """

    def __init__(self, reached_preemption: Callable[[int], bool]):
        self._reached_preemption = reached_preemption
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self._received:
            raise KeyboardInterrupt
        self._received = number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def at(self, step: int) -> int | None:
        """The signal to stop for after `step`, if any."""
        if jax.process_count() == 1:
            return self._received
        return (self._received or signal.SIGTERM) if self._reached_preemption(step) else None
