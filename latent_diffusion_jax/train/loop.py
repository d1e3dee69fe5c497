"""The training loop of both phases: a phase is an `Objective`.

The host stays ahead of the devices: it dispatches step n, then reads the metrics of step n - 1.
All that a step depends on is in the checkpoint or follows from the step's number: an interrupted
run, resumed, ends bit for bit as if it had not been interrupted.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from latent_diffusion_jax.chips import chip_of
from latent_diffusion_jax.cluster import everywhere
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.checkpoint import Checkpointer
from latent_diffusion_jax.train.metrics import Progress, Values, Writer
from latent_diffusion_jax.train.objective import Metrics, Objective
from latent_diffusion_jax.train.sharding import (
    abstract_state,
    init_sharded,
    lower_step,
    put_batch,
    put_tree,
)
from latent_diffusion_jax.train.state import TrainState
from latent_diffusion_jax.train.stop import Stopped, StopSignals
from latent_diffusion_jax.train.trace import Trace
from latent_diffusion_jax.xla import give_back_memory


class Batches(Protocol):
    """An endless iterator over this process's rows; its position is JSON, alike in all."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """[B / processes, ...] each."""

    def get_state(self) -> Any:
        """The position behind the batch that `next` gave last, however many it holds ready."""

    def set_state(self, state: Any) -> None:
        """Goes to a position."""


Signs = Callable[[Values], Mapping[str, str]]
Report = Callable[[int, str], None]  # the step, and what the host does for it


class TrainingDiverged(UserError):  # noqa: N818
    """Too many steps in a row had a loss or a gradient that was not finite; none was applied."""


@dataclasses.dataclass
class _Window:
    """Sums since the last line of the log; in the checkpoint, so that resumed averages agree.

    `skipped` counts the steps of the run that were not finite, `in_a_row` the newest of them.
    """

    count: int = 0
    sums: Values = dataclasses.field(default_factory=dict)
    skipped: int = 0
    in_a_row: int = 0

    def add(self, values: Values) -> None:
        self.count += 1
        self.in_a_row = 0
        self.sums = {
            name: np.add(self.sums.get(name, 0.0), value).tolist() for name, value in values.items()
        }

    def skip(self) -> None:
        self.skipped += 1
        self.in_a_row += 1

    def pop(self) -> Values:
        means = {name: np.divide(value, self.count).tolist() for name, value in self.sums.items()}
        self.count, self.sums = 0, {}
        return {**means, "skipped": self.skipped}


class _Clock:
    """Tells what the host does, and adds up how long it waits for data, and for the devices."""

    def __init__(self, report: Report):
        self._report = report
        self._doing, self._since = "compile", time.perf_counter()
        self._seconds = dict.fromkeys(("data", "compute", "other"), 0.0)

    def at(self, step: int, doing: str) -> None:
        """The host turns to `doing`, for `step`."""
        now = time.perf_counter()
        kind = self._doing if self._doing in self._seconds else "other"
        self._seconds[kind] += now - self._since
        self._doing, self._since = doing, now
        self._report(step, doing)

    def pop(self) -> Values:
        """Seconds of each since the last call, up to the last turn."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return {f"seconds_{kind}": value for kind, value in seconds.items()}


class _Log:
    """Reads metrics one step late, averages them, and knows how long steps take."""

    def __init__(
        self,
        clock: _Clock,
        window: _Window,
        writer: Writer,
        progress: Progress,
        checkpointer: Checkpointer,
        every: int,
        images: int,
        flops: float,
        peak: float | None,
        max_skipped: int,
        signs: Signs,
    ):
        self._clock, self._window = clock, window
        self._writer, self._progress = writer, progress
        self._checkpointer = checkpointer
        self._every, self._images, self._flops, self._peak = every, images, flops, peak
        self._max_skipped, self._signs, self._told = max_skipped, signs, set[str]()
        self._pending: tuple[int, Metrics] | None = None
        self._steps, self._seconds, self._mark = 0, 0.0, time.perf_counter()

    def push(self, step: int, metrics: Metrics) -> None:
        """Takes what step `step` will yield, and reads what the one before has yielded."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Reads what is pending.

        Raises:
          TrainingDiverged: naming the steps and the checkpoint to go back to.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {
            name: np.asarray(value, np.float64).tolist()
            for name, value in jax.device_get(metrics).items()
        }
        now = time.perf_counter()
        self._steps += 1
        self._seconds += now - self._mark
        self._mark = now
        if values.pop("finite"):
            self._window.add(values)
        else:
            self._skip(step, values)
        self._progress.update(step)
        if _is_due(step, self._every):
            self._write(step)

    def resume(self) -> None:
        """Steps go on: what was done since the last flush is not counted as training."""
        self._mark = time.perf_counter()

    def _write(self, step: int) -> None:
        values = self._window.pop()
        images, flops = (x * self._steps / self._seconds for x in (self._images, self._flops))
        self._steps, self._seconds = 0, 0.0
        self._writer.scalars(
            step,
            {
                **values,
                "images_per_second": images,
                "flops_per_second": flops,
                **({"mfu": flops / self._peak} if self._peak else {}),
                **self._clock.pop(),
            },
        )
        if "loss" not in values:  # every step was skipped, which was said
            return
        self._progress.line(
            step, f"loss {values['loss']:.4g} {images:.4g} images/s {flops / 1e12:.3g} TFLOP/s"
        )
        signs = self._signs(values)
        for name in signs.keys() - self._told:
            self._progress.note(f"warning: {signs[name]}")
        self._told = set(signs)

    def _skip(self, step: int, values: Mapping[str, Any]) -> None:
        self._window.skip()
        bad = [f"{k} {v}" for k, v in values.items() if not np.all(np.isfinite(v))]
        what = f"step {step} is not finite ({', '.join(bad)}) and was not applied"
        if self._window.in_a_row < self._max_skipped:
            self._progress.note(f"warning: {what}; {self._window.skipped} skipped in all")
            return
        good = self._checkpointer.last_good_step
        raise TrainingDiverged(
            f"{what}, nor were the {self._window.in_a_row - 1} before it: lower optim.lr, set"
            " optim.clip_norm=1, or use dtype=float32; last good checkpoint:"
            f" {'none' if good is None else f'step {good}'}"
        )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _fine_tune(
    objective: Objective, weights: TrainState, abstract: TrainState, key: jax.Array
) -> TrainState:
    """The first state of a training that starts from weights, which it takes over."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    start = jax.jit(objective.start, donate_argnums=(0, 1), out_shardings=shardings)
    return start(weights.params, weights.ema, key)


def train(
    *,
    objective: Objective,
    frozen: Any,
    batches: Batches,
    mesh: Mesh,
    checkpointer: Checkpointer,
    writer: Writer,
    key: jax.Array,
    steps: int,
    log_every: int,
    eval_every: int,
    image_every: int,
    checkpoint_every: int,
    meta: Mapping[str, Any],
    evaluate: Callable[[TrainState], Values] | None = None,
    visualise: Callable[[TrainState, int], Mapping[str, np.ndarray]] | None = None,
    snapshot_every: int = 0,
    snapshot: Callable[[int, TrainState], None] | None = None,
    signs: Signs = lambda means: {},
    accumulate: int = 1,
    max_skipped: int = 10,
    report: Report = lambda step, doing: None,
    trace: Trace | None = None,
) -> TrainState:
    """Trains up to `steps`, from the newest good checkpoint where there is one, and saves.

    A checkpoint of weights alone is where a training starts, at step 0, with a new optimiser.

    Args:
      objective: the phase.
      frozen: tree of networks that the step reads and does not train.
      batches: see `Batches`; with a checkpoint, it is set to the position stored there.
      mesh: from `make_mesh`.
      checkpointer: of the working directory; the caller closes it.
      writer: of the same; started and closed here.
      key: the run's base key.
      steps: where to end, counted from the run's first start.
      log_every: steps between lines of averages; also in plain text where there is no terminal.
      eval_every: steps between calls of `evaluate(state)`, whose values are logged as they are.
      image_every: steps between calls of `visualise(state, step)` -> name: [N, H, W, C].
      checkpoint_every: steps between checkpoints. An interval of 0 is never, but evaluation,
        pictures, a snapshot and a checkpoint always end the run.
      meta: JSON stored in every checkpoint, beside `data` and `window`, which are added here.
      snapshot_every: steps between calls of `snapshot(step, state)`, before a checkpoint.
      signs: averages -> lines on what goes wrong, by a short name; each is printed when it appears.
      accumulate: that of the objective, to count FLOPs.
      max_skipped: a step whose loss or gradient is not finite is skipped and counted; so many in a
        row end the run.
      report: called with the step and what the host does for it: "compile", "data" (waits for a
        batch), "compute" (waits for the devices), "evaluate", "images", "snapshot" or "checkpoint".
      trace: of the profiler, for some steps.

    Raises:
      TrainingDiverged: `max_skipped` steps in a row were not finite.
      Stopped: SIGTERM or Ctrl-C; the state is saved.
      UserError: the batch does not divide by the devices; a checkpoint cannot be read or written.
    """
    abstract = abstract_state(objective.init, key, mesh)
    restored = checkpointer.restore_latest(abstract)
    window = _Window()
    if restored is None:
        start, state = 0, init_sharded(objective.init, key, mesh)
    elif restored[1].opt_state is None:  # weights from elsewhere
        start, state = 0, _fine_tune(objective, restored[1], abstract, key)
    else:
        start, state, saved = restored
        batches.set_state(saved["data"])
        window = _Window(**saved["window"])
    if start >= steps:
        return state

    def save(step: int, state: TrainState) -> None:
        position = {"data": batches.get_state(), "window": dataclasses.asdict(window)}
        checkpointer.save(step, state, {**meta, **position})

    pauses: dict[str, tuple[int, Callable[[int, TrainState], None]]] = {}
    if evaluate is not None:
        pauses["evaluate"] = eval_every, lambda n, s: writer.scalars(n, evaluate(s))
    if visualise is not None:
        pauses["images"] = image_every, lambda n, s: writer.images(n, visualise(s, n))
    if snapshot is not None:
        pauses["snapshot"] = snapshot_every, snapshot
    pauses["checkpoint"] = checkpoint_every, save

    writer.start(start)
    frozen = put_tree(mesh, frozen)
    with StopSignals(checkpointer.reached_preemption) as stop, contextlib.closing(writer):
        clock = _Clock(report)
        clock.at(start, "data")
        batch = put_batch(mesh, next(batches))
        clock.at(start, "compile")
        lowered = lower_step(objective.train_step, state, frozen, batch, key, mesh)
        flops = (lowered.cost_analysis() or {}).get("flops", 0.0)  # not every platform tells
        train_step = lowered.compile()
        del lowered
        give_back_memory()  # that the compiler needed
        everywhere(True)  # who compiles longest must not make the others' collectives time out
        images, chip = jax.tree.leaves(batch)[0].shape[0], chip_of(mesh.devices.flat[0])
        progress = Progress(steps, start)
        log = _Log(
            clock,
            window,
            writer,
            progress,
            checkpointer,
            every=log_every,
            images=images,
            flops=flops * accumulate,
            peak=None if chip is None else chip.bf16 * mesh.size,
            max_skipped=max_skipped,
            signs=signs,
        )
        with contextlib.closing(progress):
            for step in range(start + 1, steps + 1):
                clock.at(step, "compute")
                if trace is not None:
                    trace.before(step)
                state, metrics = train_step(state, frozen, batch, key)
                log.push(step, metrics)
                if trace is not None and trace.ends(step):
                    log.flush()  # so that the step's work is done
                    trace.close()
                signal = stop.at(step) if step < steps else None
                due = [
                    n for n, (every, _) in pauses.items() if step == steps or _is_due(step, every)
                ]
                if signal:  # a resumed run does not come by this step's snapshot again
                    due = [*(name for name in due if name == "snapshot"), "checkpoint"]
                if due:
                    log.flush()  # so that the window, and the log before a picture, are complete
                    for name in due:
                        clock.at(step, name)
                        pauses[name][1](step, state)
                    log.resume()
                if signal:
                    checkpointer.wait()
                    raise Stopped(signal, step)
                if step < steps:
                    clock.at(step, "data")
                    batch = put_batch(mesh, next(batches))
        checkpointer.wait()
    return state
