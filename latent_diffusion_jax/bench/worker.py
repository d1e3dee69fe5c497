"""A process that measures one thing: it prepares, says so, and takes a turn whenever it is told to.

It speaks lines of JSON: first what it is ("facts") or why it cannot ("error"), then, for each line
that it is sent, the seconds of a call and the peak of memory so far. Nothing here imports jax, so
that peers in other libraries can be workers too.
"""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from latent_diffusion_jax.xla import give_back_memory

TURN = 0.5  # seconds that calls are repeated for, in a turn
FACTS = ("images", "flops", "parameters", "device", "best")


class Measured(NamedTuple):
    """Something that can be timed.

    run: one call, done when it returns.
    images: of a call.
    flops: of a call; None where nobody counts them.
    parameters: of the networks that work.
    device: what it runs on; best: FLOP/s that this could do, None where no table has it.
    peak: bytes of device memory at most; default: this process's.
    before: what is to be done ahead of each turn, untimed.
    warm_up: calls ahead of the first turn, one of which compiles; 0 for one in which each counts.
    """

    run: Callable[[], Any]
    images: int
    flops: float | None = None
    parameters: int | None = None
    device: str | None = None
    best: float | None = None
    peak: Callable[[], int | None] | None = None
    before: Callable[[], Any] = lambda: None
    warm_up: int = 2


def serve(make: Callable[[dict], Measured]) -> None:
    """Measures what `make` makes of this process's argument, until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        before, began = memory("VmRSS"), time.perf_counter()
        measured = make(json.loads(sys.argv[1]))
        for _ in range(measured.warm_up):
            measured.run()
        prepared = time.perf_counter() - began
        _forget_peak()
        facts = {name: getattr(measured, name) for name in FACTS}
        say(facts={**facts, "seconds_to_prepare": prepared})
        for _ in sys.stdin:
            took = take_turn(measured)
            most = measured.peak() if measured.peak else _above(before)
            say(**took, peak_bytes=most)
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        say(error=f"{type(error).__name__}: {line}" if line else type(error).__name__)


def take_turn(measured: Measured) -> dict[str, float]:
    """Seconds of a call: of one, or the mean of as many as are begun in `TURN` seconds.

    Beside them those that its threads were at work: on a busy machine, these alone are comparable.
    The first call is not counted: it finds caches that the other processes have filled.
    """
    measured.before()
    if measured.warm_up:
        measured.run()
    calls, took, began, worked = 0, 0.0, time.perf_counter(), _worked()
    while took < TURN:
        measured.run()
        calls, took = calls + 1, time.perf_counter() - began
    return {"seconds": took / calls, "cpu_seconds": (_worked() - worked) / calls}


def _worked() -> float:
    """Seconds of all threads, and of processes that were started and ended."""
    return time.process_time() + sum(os.times()[2:4])


def memory(name: str) -> int | None:
    """Bytes of this process: "VmRSS" now, "VmHWM" at most; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _forget_peak() -> None:
    """Sets the peak to what is in use now, where the system can: compilers took more."""
    gc.collect()
    give_back_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _above(before: int | None) -> int | None:
    most = memory("VmHWM")
    return None if most is None or before is None else most - before
