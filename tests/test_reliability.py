"""Nothing is lost: both phases are killed, signalled and damaged through the command line.

One working directory per phase suffers everything in turn, and must end bit for bit as one that was
left alone.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import time

import orbax.checkpoint as ocp
import pytest

from latent_diffusion_jax.data.latents import Latents
from latent_diffusion_jax.train.metrics import read_jsonl
from tests.cli import DIFFUSION, FIRST_STAGE, SMALL, SMALL_UNET, run, start
from tests.train.toy import digest

STEPS = 48
OFTEN = [
    "--config.data.image_size=16",
    f"--config.run.steps={STEPS}",
    "--config.run.checkpoint_every=6",
    "--config.run.eval_every=24",
    "--config.run.image_every=0",
]
TIMING = ("images_per_second", "flops_per_second", "seconds_")


@pytest.fixture(scope="module")
def phase_1(tmp_path_factory):
    """The command of phase 1, and a workdir in which it was not interrupted."""
    command = ["train", FIRST_STAGE, *SMALL, *OFTEN]
    workdir = tmp_path_factory.mktemp("phase_1") / "straight"
    run(*command, f"--workdir={workdir}")
    return command, workdir


@pytest.fixture(scope="module")
def encoded(phase_1, tmp_path_factory):
    """The arguments of phase 2, and a workdir in which `encode` was killed and run again."""
    arguments = [DIFFUSION, *SMALL, *SMALL_UNET, *OFTEN, f"--config.run.first_stage={phase_1[1]}"]
    workdir = tmp_path_factory.mktemp("encoded") / "workdir"
    process = start("encode", *arguments, f"--workdir={workdir}")
    while process.poll() is None and not any((workdir / "latents").glob(".train.partial")):
        time.sleep(0.001)
    kill(process)
    assert not (workdir / "latents" / "train").exists()
    run("encode", *arguments, f"--workdir={workdir}")
    assert {path.name for path in (workdir / "latents").iterdir()} == {"train", "validation"}
    for split in ("train", "validation"):
        Latents(directory=workdir / "latents" / split).verify()
    return arguments, workdir


@pytest.fixture(scope="module")
def phase_2(encoded, tmp_path_factory):
    """As `phase_1`, on the cached latents."""
    arguments, prepared = encoded
    workdir = tmp_path_factory.mktemp("phase_2") / "straight"
    shutil.copytree(prepared, workdir)
    run("train", *arguments, f"--workdir={workdir}")
    return ["train", *arguments], workdir


def kill(process):
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def until(process, done):
    """Reads the lines of a process until `done(step)`; returns them."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        step = re.match(r"step (\d+)/", line)
        if step and done(int(step[1])):
            return lines
    raise AssertionError(f"ended too early: {lines}")


def steps_saved(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def result(workdir):
    """All of the last state: weights, averages, optimiser."""
    last = workdir / "checkpoints" / str(STEPS)
    with ocp.StandardCheckpointer() as checkpointer:
        return {
            name: digest(checkpointer.restore(last / name)) for name in ("weights", "optimizer")
        }


def logged(workdir):
    """All that was logged, except how long it took."""
    lines = read_jsonl(str(workdir / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.startswith(TIMING)} for line in lines]


def meta(workdir):
    text = (workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").read_text()
    return json.loads(json.loads(text)["payload"])["meta"]


def stop(process, number, at):
    """Signals a training at a step; returns the step that it says to have saved."""
    until(process, lambda step: step >= at)
    process.send_signal(number)
    said = process.communicate()[0].splitlines()[-1]
    assert process.returncode == (130 if number == signal.SIGINT else 0), said
    return int(re.fullmatch(rf"{number.name}: saved at step (\d+)", said)[1])


def largest(workdir, step):
    """The file that holds most of a checkpoint."""
    files = (p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file())
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("phase", [pytest.param("phase_1", marks=pytest.mark.slow), "phase_2"])
def test_nothing_is_lost(phase, request, tmp_path):
    command, straight = request.getfixturevalue(phase)
    workdir = tmp_path / "disturbed"
    if phase == "phase_2":
        shutil.copytree(request.getfixturevalue("encoded")[1], workdir)
    command = [*command, f"--workdir={workdir}"]

    # SIGKILL at an arbitrary moment
    process = start(*command)
    until(process, lambda step: steps_saved(workdir))
    time.sleep(random.uniform(0, 0.2))
    kill(process)
    before = steps_saved(workdir)[-1]

    # SIGKILL while a checkpoint is being written
    process = start(*command)
    while process.poll() is None:
        if unfinished(workdir):
            break
    kill(process)
    assert steps_saved(workdir)[-1] >= before

    # SIGTERM, in the midst of an interval
    saved = stop(start(*command), signal.SIGTERM, at=steps_saved(workdir)[-1] + 2)
    assert steps_saved(workdir)[-1] == saved

    # a flipped bit in what that saved, and Ctrl-C
    file = largest(workdir, saved)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    process = start(*command)
    lines = until(process, lambda step: True)
    assert_set_aside(lines, workdir, saved)
    saved = stop(process, signal.SIGINT, at=0)
    assert steps_saved(workdir)[-1] == saved

    # a file cut short
    file = largest(workdir, saved)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    lines = run(*command).splitlines()
    assert_set_aside(lines, workdir, saved)

    assert result(workdir) == result(straight)
    assert logged(workdir) == logged(straight)
    assert [line["step"] for line in logged(workdir) if "lr" in line] == [*range(1, STEPS + 1)]
    assert meta(workdir) == meta(straight)
    assert steps_saved(workdir) == steps_saved(straight)

    # once more: there is nothing left to do
    files = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*")}
    said = run(*command)
    assert "step " not in said.partition("trained to step")[0]
    assert f"trained to step {STEPS}" in said
    assert {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*")} == files
    assert logged(workdir) == logged(straight)


def unfinished(workdir):
    return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())


def assert_set_aside(lines, workdir, step):
    named = [line for line in lines if "broken" in line]
    assert len(named) == 1, lines
    assert re.match(
        rf"checkpoint step {step} is broken \(.*\): moved to .*corrupt/{step}", named[0]
    )
    assert (workdir / "corrupt" / str(step)).is_dir()


def fill_the_disk(process, workdir):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))


def make_read_only(process, workdir):
    (workdir / "checkpoints").chmod(0o555)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (fill_the_disk, r"cannot write .*: .*File too large"),
        (make_read_only, r"cannot write checkpoint step \d+ to .*checkpoints: .*Permission denied"),
    ],
)
def test_what_cannot_be_written(harm, said, tmp_path):
    """One line, and at once; what was saved stays, and the run goes on from there."""
    command = ["train", FIRST_STAGE, *SMALL, *OFTEN, f"--workdir={tmp_path}"]
    endless = [*command, "--config.run.steps=100000", "--config.run.eval_every=0"]
    endless += ["--config.run.checkpoint_every=400", "--config.run.log_every=30"]
    wrapper = []
    if harm is make_read_only and os.geteuid() == 0:  # who may write everywhere
        wrapper = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv")
    process = start(*endless, wrapper=wrapper)
    until(process, lambda step: steps_saved(tmp_path) and not unfinished(tmp_path))
    harm(process, tmp_path)
    *before, line = process.communicate(timeout=60)[0].splitlines()
    (tmp_path / "checkpoints").chmod(0o755)
    assert process.returncode == 2
    assert re.search(f"^error: {said}", line)
    assert all(other.startswith("step ") for other in before)
    saved = steps_saved(tmp_path)[-1]
    said = run(*command, f"--config.run.steps={saved + 1}")
    assert f"trained to step {saved + 1}" in said
    assert not (tmp_path / "corrupt").exists()
