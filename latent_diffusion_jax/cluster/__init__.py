"""Several processes as one run: found in the environment, joined, watched."""

import os
from collections.abc import Mapping

import numpy as np

from latent_diffusion_jax.cluster.channel import LOST, STALL, Channel
from latent_diffusion_jax.cluster.place import find_place

WAIT = 300.0  # seconds for all processes to come
_joined: list[Channel] = []  # one at most: that of this process


def join(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: float = WAIT,
    stall: float = STALL,
    lost: float = LOST,
    environment: Mapping[str, str] = os.environ,
) -> Channel | None:
    """Joins the processes of this run, before JAX touches a device; None where it is alone.

    Port P of the coordinator is this package's channel, P + 1 JAX's coordination service.

    Args:
      coordinator: HOST:P of process 0, `processes` of all, `process` of this one; default: as
        the environment tells, see `cluster.place`.
      wait: seconds for all to come.
      stall, lost: seconds without a sign of life of one before a warning, and before the run ends.

    Raises:
      UserError: the environment is contradictory, or somebody did not come.
    """
    place = find_place(environment, coordinator, processes, process)
    if place is None:
        return None
    import jax

    channel = Channel(place, stall=stall, lost=lost)
    channel.roll_call(wait)
    host, _, port = place.coordinator.rpartition(":")
    jax.distributed.initialize(
        f"{host}:{int(port) + 1}",
        place.processes,
        place.process,
        local_device_ids=place.devices and list(place.devices),
        cluster_detection_method="deactivate",
        initialization_timeout=round(wait),
        heartbeat_timeout_seconds=round(max(2 * lost, 60)),  # the channel is to notice first
    )
    _joined.append(channel)
    return channel


def everywhere(ok: bool) -> bool:
    """Whether `ok` holds in every process; waits for all of them."""
    if _joined:
        return _joined[0].everywhere(ok)
    import jax

    if jax.process_count() == 1:
        return ok
    from jax.experimental import multihost_utils  # joined by other means than `join`

    return bool(multihost_utils.process_allgather(np.array(ok)).all())
