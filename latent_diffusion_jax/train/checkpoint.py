"""Checkpoints that are complete or absent, and checked when they are read.

A step is one directory that Orbax writes in the background and renames when it is whole:
`<workdir>/checkpoints/<step>/{weights,optimizer,meta}`. Orbax does not notice flipped bits, so
`meta` holds a checksum of every array, and of itself. A step that fails is named, moved to
`<workdir>/corrupt/` and the one before is used; nothing is deleted.
"""

import contextlib
import functools
import gc
import itertools
import json
import logging
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from latent_diffusion_jax.cluster import everywhere
from latent_diffusion_jax.errors import UserError, differences
from latent_diffusion_jax.train.checksum import checksums
from latent_diffusion_jax.train.state import TRAINING_ONLY, Params, TrainState

_OTHER_READS_SECONDS = 0.5


class _BrokenError(Exception):
    """Why a step cannot be used, in one line."""


def _layout(tree: Any) -> dict[str, str]:
    """Path of each leaf -> its type and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{x.dtype.name}{list(x.shape)}" for path, x in leaves}


def _items(state: TrainState) -> dict[str, Any]:
    """The state as checkpoint items: sampling reads `weights` alone."""
    weights: dict[str, Any] = {}
    rest = {"step": state.step, "opt_state": state.opt_state}
    for name, tree in state.params.items():
        (rest if name in TRAINING_ONLY else weights)[name] = tree
    if state.buffers:
        rest["buffers"] = state.buffers
    if state.averages:
        rest["averages"] = state.averages
    return {"weights": {"params": weights, "ema": state.ema}, "optimizer": rest}


def _state(weights: dict[str, Any], rest: dict[str, Any]) -> TrainState:
    """What `_items` was made of."""
    params = {**weights["params"], **{n: rest.pop(n) for n in TRAINING_ONLY if n in rest}}
    return TrainState(params=params, ema=weights["ema"], **rest)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"


class Checkpointer:
    """The checkpoints of one working directory, of which the last `keep` stay (None: all).

    A read-only one (sampling beside a running training) changes nothing on disk.
    """

    def __init__(self, workdir: str, *, keep: int | None = 3, read_only: bool = False):
        self._workdir = epath.Path(workdir)
        self._directory = self._workdir / "checkpoints"
        self._read_only = read_only
        if read_only and not self._directory.exists():
            raise UserError(f"no checkpoints in {self._workdir}: train there first")
        if keep is not None and keep < 1:
            raise UserError(f"keep={keep}: at least one checkpoint must stay")
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        _drop_late_complaints()
        with self._writing("directory"), _quiet():
            self._manager = ocp.CheckpointManager(self._directory.absolute(), options=options)

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Starts writing `state` and `meta` (JSON) as `step`; does nothing if it is there already.

        The state may be donated as soon as this returns.

        Raises:
          UserError: this save, or the one before in the background, cannot be written.
        """
        self._save(step, _items(state), meta)

    def save_weights(self, step: int, params: Params, ema: Params, meta: Mapping[str, Any]) -> None:
        """As `save`, of weights to sample with or to start a training from."""
        self._save(step, {"weights": {"params": params, "ema": ema}}, meta)

    def _save(self, step: int, items: dict[str, Any], meta: Mapping[str, Any]) -> None:
        if step in self._manager.all_steps():
            return
        payload = json.dumps(
            {
                "meta": dict(meta),
                "layout": {name: _layout(tree) for name, tree in items.items()},
                "checksums": {name: checksums(tree) for name, tree in items.items()},
            }
        )
        sealed = {"payload": payload, "crc32": zlib.crc32(payload.encode())}
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        with self._writing(f"step {step}"):
            self._manager.save(
                step, args=ocp.args.Composite(meta=ocp.args.JsonSave(sealed), **arrays), force=True
            )

    def restore_latest(self, abstract: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """Reads the newest good step as (step, state, meta); None where there are no checkpoints.

        The state of a step that was saved by `save_weights` has `opt_state` None.

        `abstract` holds shapes, types and shardings; the mesh may differ from the writer's.

        Raises:
          UserError: every step is broken, or a step belongs to another model.
        """
        for step, read, meta in self._good_steps(_items(abstract)):
            rest = read.get("optimizer", {"step": jnp.int32(step), "opt_state": None})
            return step, _state(read["weights"], rest), meta
        return None

    def restore_params(self, abstract: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """As `restore_latest`, for sampling: of `params`, `ema` alone (`opt_state` is ())."""
        for step, read, meta in self._good_steps({"weights": _items(abstract)["weights"]}):
            return step, TrainState(jnp.int32(step), opt_state=(), **read["weights"]), meta
        return None

    def read_weights(self, step: int, abstract: Params) -> Params:
        """The `params` of one step that `save_weights` wrote.

        Raises:
          UserError: it is broken, or of another model.
        """
        items = {"weights": {"params": abstract, "ema": {}}}
        try:
            sealed = self._read_meta(step)
            self._check_layout(step, sealed["layout"], items)
            return self._read_arrays(step, items, sealed["checksums"])["weights"]["params"]
        except _BrokenError as error:
            where = self._directory / str(step)
            raise UserError(f"{where} is broken ({error}): remove it to do without") from error

    @property
    def steps(self) -> list[int]:
        """Those that are completely written, in order."""
        self.wait()
        return sorted(self._manager.all_steps())

    @property
    def last_good_step(self) -> int | None:
        """The newest step that is completely written."""
        self.wait()
        return self._manager.latest_step()

    def weights_checksums(self) -> dict[str, int]:
        """Path of each array of the newest step's weights -> its checksum, with none of them read.

        Raises:
          UserError: it cannot be read, or there is none.
        """
        step = self.last_good_step
        try:
            if step is not None:
                return self._read_meta(step)["checksums"]["weights"]
            reason = "there is none"
        except _BrokenError as error:
            reason = str(error)
        raise UserError(f"no usable checkpoint in {self._directory}: {reason}")

    def reached_preemption(self, step: int) -> bool:
        """Whether a cluster of several processes agreed to stop at this step."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: the last save could not be written.
        """
        with self._writing("the last step"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the threads."""
        with self._writing("the last step"):
            self._manager.close()

    def _good_steps(
        self, items: dict[str, Any]
    ) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                sealed = self._read_meta(step)
                there = {name: tree for name, tree in items.items() if name in sealed["layout"]}
                self._check_layout(step, sealed["layout"], there)
                yield step, self._read_arrays(step, there, sealed["checksums"]), sealed["meta"]
            except _BrokenError as error:
                self._set_aside(step, str(error))
        if steps:
            raise UserError(f"no usable checkpoint in {self._directory}: every step is broken")

    def _read_meta(self, step: int) -> dict[str, Any]:
        restored = self._read(step, meta=ocp.args.JsonRestore())
        try:
            restored = restored["meta"]
            payload = restored["payload"]
            if zlib.crc32(payload.encode()) != restored["crc32"]:
                raise _BrokenError("meta does not match its checksum")
            return json.loads(payload)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _BrokenError(f"meta: {_one_line(error)}") from error

    def _check_layout(
        self, step: int, layout: dict[str, dict[str, str]], items: dict[str, Any]
    ) -> None:
        """A model that was changed since is no broken checkpoint: it must not be moved away."""
        for name, tree in items.items():
            here, there = _layout(tree), layout[name]
            for path in sorted(here.keys() | there.keys()):
                if here.get(path) != there.get(path):
                    found, wanted = there.get(path, "absent"), here.get(path, "absent")
                    raise UserError(
                        f"checkpoint step {step} in {self._directory} is of another model: "
                        f"{name}{path} is {found} there, {wanted} here"
                    )

    def _read_arrays(
        self, step: int, items: dict[str, Any], expected: dict[str, dict[str, int]]
    ) -> dict[str, Any]:
        restored = self._read(
            step, **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
        )
        for name in items:
            found = checksums(restored[name])
            for path, value in expected[name].items():
                if found[path] != value:
                    raise _BrokenError(f"{name}{path} does not match its checksum")
        return restored

    def _read(self, step: int, **items: Any) -> Any:
        failure = None
        with _quiet():
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # Orbax and TensorStore raise nearly everything
                failure = _one_line(error)
            if failure:
                # Orbax leaves its other reads running. They must end before what they report to is
                # collected (TensorStore may crash otherwise), and there is nothing to wait for.
                time.sleep(_OTHER_READS_SECONDS)
                gc.collect()  # coroutines that it left behind complain when they are collected
        # One process may meet a bad file that the others do not read: all go the same way.
        if not everywhere(failure is None):
            raise _BrokenError(failure or "unreadable in another process")
        return restored

    def _set_aside(self, step: int, why: str) -> None:
        source = self._directory / str(step)
        if self._read_only:
            print(f"checkpoint step {step} is broken ({why}): trying the one before", flush=True)
            return
        target = self._workdir / "corrupt" / str(step)
        if jax.process_index() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            copies = (target.with_name(f"{step}.{i}") for i in itertools.count(1))
            target = next(t for t in itertools.chain([target], copies) if not t.exists())
            source.rename(target)
            print(f"checkpoint step {step} is broken ({why}): moved to {target}", flush=True)
        everywhere(True)
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise nearly everything
            raise UserError(
                f"cannot write checkpoint {what} to {self._directory}: {_one_line(error)}"
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's own words on a bad file off the terminal: pages, for what we say in a line."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


@functools.cache
def _drop_late_complaints() -> None:
    """Keeps pages of one error off the terminal, from now on.

    After a write that failed, each of TensorStore's other writes finds the loop that it reports to
    closed. That may also come in the middle of the line that says what happened.
    """
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


def write_weights(workdir: str, params: Params, ema: Params, meta: Mapping[str, Any]) -> None:
    """Writes step 0 of a workdir, of weights alone: whole or absent, as every checkpoint."""
    with contextlib.closing(Checkpointer(workdir)) as checkpointer:
        checkpointer.save_weights(0, params, ema, meta)


def check_config(workdir: str, config_json: str) -> None:
    """Refuses a workdir of another config; sections `run`, `mesh` and `published` may change.

    Where a training starts from weights that `convert` brought, only the networks are given.

    Raises:
      UserError: `optim.lr: 0.001 here, 0.0001 in the workdir`, for every key that differs.
    """
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not readable as JSON ({_one_line(error)})") from error
    here = json.loads(config_json)
    free = ("run", "mesh", "published")
    if _is_converted(workdir):
        free = tuple({*here, *there} - {"phase", "first_stage", "conditioning", "unet"})
    here, there = ({k: v for k, v in config.items() if k not in free} for config in (here, there))
    differing = differences(here, there, "in the workdir")
    if differing:
        raise UserError(f"{workdir} holds another config; {'; '.join(differing)}")


def _is_converted(workdir: str) -> bool:
    """Whether the weights are from elsewhere and nothing was trained on them yet."""
    steps = epath.Path(workdir) / "checkpoints"
    return steps.exists() and [path.name for path in steps.iterdir()] == ["0"]


def write_config(workdir: str, config_json: str) -> None:
    """Writes `<workdir>/config.json` whole or not at all, after `check_config`.

    Raises:
      UserError: the workdir was made with another config.
    """
    check_config(workdir, config_json)
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("config.json.tmp")
        temporary.write_text(config_json)
        temporary.replace(path)
