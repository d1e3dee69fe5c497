"""This process's place among those of the run, as its launcher tells it through the environment.

Explicit flags come first, then JAX's own variables (which a manifest sets, see `launch/`;
Kubernetes adds the index of an Indexed Job), Slurm, Open MPI, Cloud TPU (GKE's variables, or a TPU
VM's metadata). Nothing of them: one process.
"""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple

from latent_diffusion_jax.errors import UserError

PORT = 8476  # where the launcher names none
Environment = Mapping[str, str]


class Place(NamedTuple):
    """Where process `process` of `processes` finds the others.

    `coordinator` is HOST:PORT of process 0; `hosts` names the host of each process, where the
    launcher tells; `launcher` is who told; `devices` are this process's GPUs of the machine's,
    where processes share them.
    """

    coordinator: str
    processes: int
    process: int
    launcher: str
    hosts: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = None

    def name(self, process: int) -> str:
        """`process 3 (host-b)`, or without the host where it is not known."""
        host = self.hosts[process] if process < len(self.hosts) else ""
        return f"process {process} ({host})" if host else f"process {process}"


def find_place(
    environment: Environment = os.environ,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Place | None:
    """The place of this process; None where it is the only one.

    Args:
      environment: of the process.
      coordinator, processes, process: told by flags; then all three must be.

    Raises:
      UserError: something is told in part, or is no number in range.
    """
    flags = (coordinator, processes, process)
    if any(flag is not None for flag in flags):
        if None in flags:
            raise UserError(
                "give all of --coordinator=HOST:PORT, --processes=N and --process=I, or none"
            )
        return _checked(
            Place(str(coordinator), int(processes or 0), int(process or 0), "the flags")
        )
    for find in (_jax, _slurm, _open_mpi, _gke_tpu, _tpu_vm):
        try:
            place = find(environment)
        except KeyError as error:
            raise UserError(f"{find.__name__[1:]}: {error.args[0]} is not set") from None
        except ValueError as error:
            raise UserError(f"{find.__name__[1:]}: {error}") from None
        if place:
            return _checked(place)
    return None


def _checked(place: Place) -> Place | None:
    """None of a single process; a port where none was named."""
    if not 0 <= place.process < place.processes:
        raise UserError(
            f"{place.launcher}: process {place.process} is not one of {place.processes}"
        )
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(
            f"{place.launcher}: coordinator {place.coordinator!r} is not HOST:PORT, with a port"
            " of 1 to 65534"
        )
    return place if place.processes > 1 else None


def _port(environment: Environment, job: int | None = None) -> int:
    """The port of a job that named none: jobs that share a host take different ones."""
    told = environment.get("JAX_COORDINATOR_PORT")
    if told:
        return int(told)
    return PORT if job is None else 61440 + job % 2048 * 2


def _jax(environment: Environment) -> Place | None:
    if "JAX_NUM_PROCESSES" not in environment:
        return None
    coordinator = environment["JAX_COORDINATOR_ADDRESS"]
    if ":" not in coordinator:
        coordinator = f"{coordinator}:{_port(environment)}"
    name = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
    return Place(
        coordinator,
        int(environment["JAX_NUM_PROCESSES"]),
        int(environment[name]),
        "JAX_NUM_PROCESSES",
    )


def _slurm(environment: Environment) -> Place | None:
    """A step of `srun`; its tasks are dealt to nodes in blocks, unless told otherwise."""
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    nodes = node_list(environment["SLURM_STEP_NODELIST"])
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"])
    each = -(-tasks // len(nodes))
    blocks = "SLURM_DISTRIBUTION" not in environment or environment[
        "SLURM_DISTRIBUTION"
    ].startswith("block")
    hosts = tuple(nodes[i // each] for i in range(tasks)) if blocks else ()
    return Place(
        f"{nodes[0]}:{_port(environment, int(environment['SLURM_JOB_ID']))}",
        tasks,
        int(environment["SLURM_PROCID"]),
        "Slurm",
        hosts,
        _own_gpu(environment, "SLURM_LOCALID", each),
    )


def _own_gpu(environment: Environment, index: str, processes: int) -> tuple[int, ...] | None:
    """The GPU of a process that shares a machine, unless the launcher shows it only its own."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if processes < 2 or (visible is not None and len(visible.split(",")) < processes):
        return None
    return (int(environment[index]),)


def node_list(text: str) -> list[str]:
    """Slurm's short form of host names: `n[01-03,07],gpu2` -> n01, n02, n03, n07, gpu2."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        prefix, bracket, rest = part.partition("[")
        if not bracket:
            names.append(part)
            continue
        ranges, _, suffix = rest.partition("]")
        for span in ranges.split(","):
            first, _, last = span.partition("-")
            for number in range(int(first), int(last or first) + 1):
                names.append(f"{prefix}{number:0{len(first)}}{suffix}")
    return names


def _open_mpi(environment: Environment) -> Place | None:
    """`mpirun`, whose environment names its own host, where process 0 is unless it was told so."""
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS")
    if not coordinator:
        uri = environment.get("OMPI_MCA_orte_hnp_uri") or environment["PMIX_SERVER_URI2"]
        address = re.search(r"tcp4?://([^,:;]+)|tcp6://\[?([^,\];]+)", uri)
        if not address:
            raise ValueError(f"no address in {uri!r}: set JAX_COORDINATOR_ADDRESS=HOST:PORT")
        job = re.match(r"\d+", uri)
        number = int(job[0]) // 4096 if job else None
        coordinator = f"{address[1] or address[2]}:{_port(environment, number)}"
    return Place(
        coordinator,
        int(environment["OMPI_COMM_WORLD_SIZE"]),
        int(environment["OMPI_COMM_WORLD_RANK"]),
        "Open MPI",
        devices=_own_gpu(
            environment,
            "OMPI_COMM_WORLD_LOCAL_RANK",
            int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1),
        ),
    )


def _gke_tpu(environment: Environment) -> Place | None:
    """A pod of a TPU slice, or of several slices of one job."""
    if "TPU_WORKER_ID" not in environment or "TPU_WORKER_HOSTNAMES" not in environment:
        return None
    return _slices(environment["TPU_WORKER_HOSTNAMES"], environment["TPU_WORKER_ID"], environment)


def _tpu_vm(environment: Environment) -> Place | None:
    """A Cloud TPU VM, by its metadata server."""
    if not any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0")):
        return None
    if environment.get("TPU_SKIP_MDS_QUERY"):
        return None
    return from_metadata(metadata, environment)


def from_metadata(read: Callable[[str], str | None], environment: Environment) -> Place | None:
    """The place that a TPU VM's metadata tell; `read(attribute)` is None where there is none."""
    number, workers = read("agent-worker-number"), read("worker-network-endpoints")
    if number is None or workers is None:
        return None
    lines = (line.partition(":") for line in (read("tpu-env") or "").splitlines())
    slices = {name.strip(): value.strip().strip("'\"") for name, _, value in lines}
    # A worker is its address, or NAME:ID:ADDRESS.
    addresses = ",".join(worker.split(":")[-1] for worker in workers.split(","))
    return _slices(addresses, number, {**slices, **environment})


def metadata(attribute: str) -> str | None:
    """An attribute of this virtual machine on Google Cloud."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (OSError, urllib.error.URLError):
        return None


def _slices(workers: str, number: str, environment: Environment) -> Place:
    hosts = tuple(workers.split(","))
    slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    index = int(environment.get("MEGASCALE_SLICE_ID") or 0)
    first = (environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Place(
        f"{first}:{_port(environment)}",
        len(hosts) * slices,
        int(number) + index * len(hosts),
        "Cloud TPU",
        hosts if slices == 1 else (),
    )
