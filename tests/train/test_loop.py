import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from latent_diffusion_jax.chips import CHIPS
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train import loop
from latent_diffusion_jax.train.checkpoint import Checkpointer
from latent_diffusion_jax.train.loop import Stopped, TrainingDiverged
from latent_diffusion_jax.train.metrics import read_jsonl
from latent_diffusion_jax.train.sharding import make_mesh
from tests.train import toy

ROOT = Path(__file__).parents[2]
TIMING = ("images_per_second", "flops_per_second", "seconds_")


def mesh():
    return make_mesh(data=2, fsdp=4)


def curves(workdir):
    """What was logged, except how long it took."""
    lines = read_jsonl(str(workdir / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.startswith(TIMING)} for line in lines]


def steps_saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps without interruption: (state, curves)."""
    workdir = tmp_path_factory.mktemp("straight")
    state = toy.train(workdir, steps=10, mesh=mesh())
    assert state.step == 10
    return jax.device_get(state), curves(workdir)


def assert_as_if_uninterrupted(straight, state, workdir):
    toy.assert_same_bits(state, straight[0])
    assert curves(workdir) == straight[1]


@pytest.mark.parametrize("first", [4, 5])  # on and between intervals
def test_resumed_is_bit_identical(straight, tmp_path, first):
    toy.train(tmp_path, steps=first, mesh=mesh())
    state = toy.train(tmp_path, steps=10, mesh=mesh())
    assert_as_if_uninterrupted(straight, state, tmp_path)
    assert [line["step"] for line in straight[1]] == [3, 6, 9]


class SignalledBatches(toy.Batches):
    """Signals this process while it reads batch `at`."""

    def __init__(self, *numbers, at):
        super().__init__()
        self.numbers, self.at = numbers, at

    def __next__(self):
        if self.index == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)
        return super().__next__()


@pytest.mark.parametrize("number, exit_code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_stop(straight, tmp_path, number, exit_code):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        toy.train(tmp_path, steps=10, mesh=mesh(), batches=SignalledBatches(number, at=5))
    assert stopped.value.exit_code == exit_code
    assert signal.getsignal(number) is before
    assert steps_saved(tmp_path)[-1] == 6  # the step in progress was finished
    state = toy.train(tmp_path, steps=10, mesh=mesh())
    assert_as_if_uninterrupted(straight, state, tmp_path)


def test_second_interrupt_aborts_at_once(tmp_path):
    twice = SignalledBatches(signal.SIGINT, signal.SIGINT, at=5)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path, steps=10, mesh=mesh(), batches=twice)
    assert steps_saved(tmp_path) == [4]


def test_trains_outside_the_main_thread(straight, tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(toy.train(tmp_path, steps=10, mesh=mesh()))
    )
    thread.start()
    thread.join()
    toy.assert_same_bits(found[0], straight[0])


def test_broken_checkpoint_costs_only_time(straight, tmp_path):
    toy.train(tmp_path, steps=6, mesh=mesh())
    assert steps_saved(tmp_path) == [4, 6]
    meta = tmp_path / "checkpoints" / "6" / "meta" / "metadata"
    meta.write_bytes(meta.read_bytes()[:-40])
    state = toy.train(tmp_path, steps=10, mesh=mesh())
    assert_as_if_uninterrupted(straight, state, tmp_path)


def test_bad_steps_are_skipped_and_counted(tmp_path, capsys):
    bad = toy.Batches(bad=(3, 6))  # the first in the very step that is saved
    state = toy.train(tmp_path, steps=10, mesh=mesh(), batches=bad, max_skipped=2)
    assert state.step == 10
    lines = curves(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 2]
    assert all(np.isfinite(line["loss"]) for line in lines)
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    assert [w.split(" (")[0] for w in warnings] == [
        "warning: step 4 is not finite",
        "warning: step 7 is not finite",
    ]
    assert "loss nan" in warnings[0]
    assert warnings[1].endswith("2 skipped in all")


def test_skipped_steps_are_counted_over_a_restart(tmp_path):
    def run(workdir, steps):
        bad = toy.Batches(bad=(3, 4, 6))
        state = toy.train(workdir, steps=steps, mesh=mesh(), batches=bad, max_skipped=3)
        return state, curves(workdir)

    straight = run(tmp_path / "straight", 10)
    run(tmp_path / "resumed", 4)
    resumed = run(tmp_path / "resumed", 10)
    toy.assert_same_bits(straight[0], resumed[0])
    assert straight[1] == resumed[1]


def test_too_many_bad_steps_in_a_row_end_the_run_with_advice(tmp_path):
    bad = toy.Batches(bad=(2, 5, 6, 7))
    advice = r"step 8 .*loss nan.* nor were the 2 before it: lower optim.lr, .*checkpoint: step 4"
    with pytest.raises(TrainingDiverged, match=advice):
        toy.train(tmp_path, steps=10, mesh=mesh(), batches=bad, max_skipped=3)
    assert steps_saved(tmp_path) == [4]


def test_signs_of_trouble_are_said_once_while_they_last(tmp_path, capsys):
    def signs(means):
        assert np.isfinite(means["loss"])
        seen.append(1)
        return {"odd": "something is odd"} if len(seen) in (1, 2, 4) else {}

    seen = []
    toy.train(tmp_path, steps=5, mesh=make_mesh(data=1), log_every=1, signs=signs)
    out = capsys.readouterr().out
    assert out.count("warning: something is odd") == 2


def test_nothing_is_compiled_when_the_steps_are_done(straight, tmp_path):
    toy.train(tmp_path, steps=4, mesh=mesh())

    def broken(*args):
        raise AssertionError("traced")

    state = toy.train(tmp_path, steps=4, mesh=mesh(), loss=broken)
    assert state.step == 4


def test_batch_that_does_not_divide_by_the_devices(tmp_path):
    class Narrow(toy.Batches):
        def __next__(self):
            return toy.rows(0, size=12)

    with pytest.raises(UserError, match="batch of 12"):
        toy.train(tmp_path, steps=2, mesh=mesh(), batches=Narrow())


def test_evaluation_and_pictures_at_intervals_and_at_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "chip_of", lambda device: CHIPS["v5e"])

    def visualise(state, step):
        return {"norm": np.full((2, 4, 4, 3), float(state.params["head"]["c"].sum() * 0))}

    toy.train(
        tmp_path,
        steps=5,
        mesh=make_mesh(data=1),
        log_every=2,
        eval_every=2,
        image_every=3,
        evaluate=lambda state: {"evaluated": int(state.step)},
        visualise=visualise,
        meta={"latent_scale": 0.5},
    )
    evaluated = [x["evaluated"] for x in curves(tmp_path) if "evaluated" in x]
    assert evaluated == [2, 4, 5]
    pictures = sorted(p.name for p in (tmp_path / "images").iterdir())
    assert pictures == ["norm_00000003.png", "norm_00000005.png"]
    speeds = [x for x in read_jsonl(str(tmp_path / "metrics.jsonl")) if "loss" in x]
    assert all(x["images_per_second"] > 0 and x["flops_per_second"] > 0 for x in speeds)
    assert all(x["mfu"] == x["flops_per_second"] / 197e12 for x in speeds)  # of one v5e
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "2/5"], ["step", "4/5"]]
    meta = json.loads((tmp_path / "checkpoints/5/meta/metadata").read_text())["payload"]
    assert json.loads(meta)["meta"]["latent_scale"] == 0.5
    assert json.loads(meta)["meta"]["data"] == {"index": 5}


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path):
    command = [sys.executable, "-m", "tests.train.toy"]

    def start(name):
        return subprocess.Popen([*command, str(tmp_path / name)], cwd=ROOT, stdout=subprocess.PIPE)

    straight = toy.train_slowly(tmp_path / "straight")
    moments = random.Random(0)
    for kill in range(3):
        process = start("killed")
        for line in process.stdout:
            if int(line.split()[1].split(b"/")[0]) > 9 * (kill + 1):  # `step 14/40 ...`
                break
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    found = start("killed").communicate()[0].split()[-1]
    assert found.decode() == toy.digest(straight)
    assert curves(tmp_path / "killed") == curves(tmp_path / "straight")
    assert Checkpointer(str(tmp_path / "killed")).last_good_step == 40
