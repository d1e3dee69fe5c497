"""The rows of `bench`: a few processes each that take turns, so that other load hurts all alike."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from latent_diffusion_jax.config import load_config, to_json
from latent_diffusion_jax.errors import UserError, choose

ROOT = Path(__file__).parents[2]  # of a checkout, which has configs and peers
SIZES = {  # configs of phase 2 and of phase 1
    "S": ("diffusion/bench.py", "first_stage/bench.py"),
    "imagenet256": ("diffusion/imagenet256.py", "first_stage/vq_f4.py"),
    "text256": ("diffusion/text256.py", "first_stage/kl_f8.py"),
    "sd1": ("diffusion/sd1.py", "first_stage/kl_f8.py"),
}
WHAT = {  # and the phases whose configs will do
    "forward": ("diffusion",),
    "train_cached": ("diffusion",),
    "train_online": ("diffusion",),
    "train_first_stage": ("first_stage",),
    "encode": ("first_stage", "diffusion"),
    "decode": ("first_stage", "diffusion"),
    "sample": ("diffusion",),
    "cold_start": ("diffusion",),
    "warm_start": ("diffusion",),
    "load": ("first_stage", "diffusion"),
}
BATCH, FEWER = 16, {"sample": 4}  # by default
STARTS = ("cold_start", "warm_start")  # one image each
ALONE = (*STARTS, "load")  # without peers
START_TURNS = 3  # at most
DTYPES = ("float32", "bfloat16")
PEERS = ("eager", "compile", "eager_nhwc", "compile_nhwc")
OURS = "here"
MODULES = {"here": "latent_diffusion_jax.bench.measures", "torch": "benchmarks.peers"}
ENVIRONMENT = {  # of all workers: as launch/local.sh, and GPUs are shared
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "9000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "MALLOC_ARENA_MAX": "2",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class Row(NamedTuple):
    """One thing to measure, of one size."""

    size: str
    what: str
    dtype: str
    batch: int
    config: str  # JSON


def rows(
    sizes: Sequence[str],
    what: Sequence[str],
    batches: Sequence[int] | None,
    dtypes: Sequence[str],
    own: tuple[str, ConfigDict] | None = None,
) -> list[Row]:
    """All combinations that there are; `own` is a config by name, measured like a size.

    Raises:
      UserError: an unknown name, or something that the config given has no network for.
    """
    for dtype in dtypes:
        choose("dtype", dtype, dict.fromkeys(DTYPES))
    for name in what:
        choose("thing to measure", name, WHAT)
    models = {size: _configs(size) for size in sizes}
    if own is not None:
        name, config = own
        models[name] = {config.phase: config}
    found = []
    for size, configs in models.items():
        for name in what or WHAT:
            phase = next((p for p in WHAT[name] if p in configs), None)
            if phase is None and what:
                raise UserError(
                    f"--what={name} takes a config of phase {' or '.join(map(repr, WHAT[name]))},"
                    f" not {', '.join(map(repr, configs))}"
                )
            if phase is not None:
                text = to_json(configs[phase])
                chosen = batches or [FEWER.get(name, BATCH)]
                chosen = [1] if name in STARTS else chosen
                found += [Row(size, name, d, batch, text) for d in dtypes for batch in chosen]
    return found


def _configs(size: str) -> dict[str, ConfigDict]:
    paths = choose("size", size, SIZES)
    configs = [load_config(str(ROOT / "configs" / path)) for path in paths]
    return {config.phase: config for config in configs}


def check_peers(names: Sequence[str]) -> Sequence[str]:
    """The names again.

    Raises:
      UserError: an unknown one, or the package was installed without its repository.
    """
    for name in names:
        choose("peer", name, dict.fromkeys(PEERS))
    if names and not (ROOT / "benchmarks" / "peers.py").is_file():
        raise UserError("--peers needs benchmarks/peers.py, which only the repository has")
    return names


def _environment() -> dict[str, str]:
    """Of workers; what the user has set stands."""
    compiled: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    cache = {"JAX_COMPILATION_CACHE_DIR": compiled} if compiled else {}
    return {**ENVIRONMENT, **cache, **os.environ}


class Worker:
    """A process that measures; see `worker`."""

    def __init__(self, module: str, spec: dict[str, Any]):
        self.error: str | None = None
        self.facts: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []  # of each, what `worker.serve` says
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115, `close` does
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(spec)],
            env={**_environment(), "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,  # Ctrl-C is for its parent, which then ends it
        )

    def prepare(self) -> None:
        """Waits until it is ready, or has failed."""
        self.facts = self._answer().get("facts", {})

    def turn(self) -> None:
        """Has it measure once more, unless it failed before."""
        if self.error is not None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is no more; its end is read below
            print(file=self._process.stdin, flush=True)
        answer = self._answer()
        if self.error is None:
            self.turns.append(answer)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._end()}
        self.error = answer.get("error")
        return answer

    def _end(self) -> str:
        code = self._process.wait()
        if code < 0:
            hint = ": out of memory?" if code == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{hint}"
        self._said.seek(0)
        said = [line.strip() for line in self._said if line.strip()]
        return f"ended with code {code}" + (f": {said[-1][:300]}" if said else "")

    def each(self, name: str) -> list[Any]:
        """A value turn by turn."""
        return [turn[name] for turn in self.turns]

    def close(self) -> None:
        """Ends it, and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        self._said.close()


def measure(row: Row, turns: int, peers: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yields what was found of a row: first here, then by each of the peers.

    JSON-serialisable. `turns` has the seconds of a call, turn by turn; `seconds` their median;
    `cpu_seconds` that of the time its threads worked; `ratio` and `cpu_ratio` the medians of a
    peer's over ours of the same turn. Of one that failed, `error` says why.
    """
    spec = {**row._asdict(), "alone": bool(peers)}
    del spec["size"]
    names = [OURS, *(f"torch {peer}" for peer in peers if row.what not in ALONE)]
    number = min(turns, START_TURNS) if row.what in STARTS else turns
    workers: dict[str, Worker] = {}
    try:
        for name in names:  # one after the other: preparing keeps all cores busy
            library, _, peer = name.partition(" ")
            workers[name] = Worker(MODULES[library], {**spec, "peer": peer})
            workers[name].prepare()
        for turn in range(number):
            order = list(workers.values())
            for worker in order if turn % 2 == 0 else reversed(order):
                worker.turn()
        for name, worker in workers.items():
            yield _found(row, name, worker, workers[OURS])
    finally:
        for worker in workers.values():
            worker.close()


def _found(row: Row, name: str, worker: Worker, ours: Worker) -> dict[str, Any]:
    named = {field: value for field, value in row._asdict().items() if field != "config"}
    found: dict[str, Any] = {**named, "by": name, **worker.facts}
    if worker.error is not None:
        return {**found, "error": worker.error}
    seconds = statistics.median(worker.each("seconds"))
    flops, best = ours.facts.get("flops"), ours.facts.get("best")
    found |= {
        "turns": worker.each("seconds"),
        "seconds": seconds,
        "cpu_seconds": statistics.median(worker.each("cpu_seconds")),
        "images_per_second": worker.facts["images"] / seconds,
        "flops": flops,
        "flops_per_second": flops and flops / seconds,
        "mfu": flops and best and flops / seconds / best,
        "peak_bytes": worker.turns[-1]["peak_bytes"],
    }
    if name != OURS and ours.error is None:
        for ratio, kind in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
            pairs = zip(worker.each(kind), ours.each(kind))
            found[ratio] = statistics.median(theirs / own for theirs, own in pairs)
    return found
