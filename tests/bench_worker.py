"""A worker of `bench` whose spec says, in its batch, when it fails and how: see test_bench."""

import os
import signal
import time

from latent_diffusion_jax.bench.worker import Measured, serve

NEVER, AT_ONCE, LATER, KILLED, SILENT = 1, 2, 3, 4, 5


def prepare(spec):
    """Calls of 0.2 s, of a peer 0.4 s; what fails is the peer."""
    calls = 0
    if spec["batch"] == AT_ONCE and spec["peer"]:
        raise MemoryError("no room\nfor it")
    if spec["batch"] == SILENT and spec["peer"]:
        raise SystemExit("gone")

    def run():
        nonlocal calls
        calls += 1
        time.sleep(0.4 if spec["peer"] else 0.2)
        if calls > 3 and spec["peer"] and spec["batch"] == LATER:
            raise ValueError("late")
        if calls > 3 and spec["peer"] and spec["batch"] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    print("what libraries print is no answer")
    return Measured(run, images=2, flops=1e9, warm_up=1)


if __name__ == "__main__":
    serve(prepare)
