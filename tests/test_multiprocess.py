"""Several processes of one run on this machine, as on several hosts: through the command line."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from latent_diffusion_jax import pipeline
from latent_diffusion_jax.data.latents import Latents
from latent_diffusion_jax.train.metrics import read_jsonl
from latent_diffusion_jax.train.sharding import make_mesh
from tests.cli import DIFFUSION, FIRST_STAGE, ROOT, SMALL, SMALL_UNET, do, mistake, without

OPTIONS = [
    *without(SMALL, "--config.train.batch_size"),
    "--config.train.batch_size=16",
    "--config.data.image_size=16",
    # 88 x 88 channels: arrays large enough to be split
    "--config.first_stage.channel_mult=(1,11)",
    "--config.first_stage.num_groups=2",
    "--config.run.image_every=4",
]


def free_port():
    """One whose next is free too."""
    for port in np.random.default_rng().permutation(np.arange(20000, 32000, 2)).tolist():
        with contextlib.suppress(OSError):
            for number in (port, port + 1):
                socket.create_server(("", number)).close()
            return port
    raise AssertionError("no free ports")


def start_all(processes, *arguments, devices=1, own=None, program=()):
    """Starts the processes of one run; `own` has arguments of some of them.

    `program` is Python that runs the command line, instead of the package.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(processes),
        "PYTHONUNBUFFERED": "1",
    }
    python = [sys.executable, *(program or ("-m", "latent_diffusion_jax"))]
    command = [*python, *map(str, arguments)]
    return [
        subprocess.Popen(
            [*command, *(own or {}).get(i, [])],
            cwd=ROOT,
            env={**environment, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def said_by(processes, codes, seconds=300):
    """What they said, once they all ended, with those exit codes."""
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == codes, said
    return said


def losses(workdir):
    """Step -> the loss, or that of the validation."""
    found = {}
    for line in read_jsonl(str(workdir / "metrics.jsonl")):
        for name in {"loss", "validation_loss"} & line.keys():
            found[name, line["step"]] = line[name]
    return found


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """Phase 1 by one process that has all eight devices."""
    workdir = tmp_path_factory.mktemp("alone") / "ae"
    do("train", FIRST_STAGE, *OPTIONS, f"--workdir={workdir}")
    return workdir


@pytest.mark.parametrize(
    ("phase", "devices"),
    [
        ("phase_1", 4),
        pytest.param("phase_1", 8, marks=pytest.mark.slow),
        pytest.param("phase_2", 8, marks=pytest.mark.slow),
    ],
)
def test_hosts_do_not_matter(phase, devices, first_stage, tmp_path):
    """One process, and two that become four on another mesh: the same curve, the same end."""
    command, alone = ["train", FIRST_STAGE, *OPTIONS], first_stage
    if phase == "phase_2":
        options = [*OPTIONS, *SMALL_UNET, f"--config.run.first_stage={first_stage}"]
        command = ["train", DIFFUSION, *options, "--config.latents.source=online"]
        alone = tmp_path / "alone"
        do(*command, f"--workdir={alone}")
    together = tmp_path / "together"
    command.append(f"--workdir={together}")
    said = said_by(start_all(2, *command, "--config.run.steps=2", devices=devices // 2), [0, 0])
    assert f"trained to step 2: {together}" in said[0]
    assert "trained" not in said[1]
    said_by(start_all(4, *command, "--config.mesh.fsdp=4", devices=devices // 4), [0] * 4)
    ours, theirs = losses(together), losses(alone)
    assert ours.keys() == theirs.keys()
    assert {step for _, step in ours} == {1, 2, 3, 4}
    np.testing.assert_allclose([ours[k] for k in theirs], [*theirs.values()], rtol=1e-5)
    mesh = make_mesh()
    ours, theirs = (pipeline.load(str(place), mesh).params for place in (together, alone))
    # Not one by one: Adam makes steps of the rounding where a gradient is zero, as before a norm.
    ours, theirs = (np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (ours, theirs))
    assert np.linalg.norm(ours - theirs) < 3e-4 * np.linalg.norm(theirs)
    assert (together / "curves.png").exists()


SMALL_SHARDS = """
import os, signal, sys
from latent_diffusion_jax import __main__, encode

write = encode.shards.write_shard
def write_or_die(partial, number, *rest):
    if number == int(os.environ.get("DIES_AT", -1)):
        write(partial, number, dying(rest[0]), *rest[1:])
    write(partial, number, *rest)
def dying(batches):
    yield next(iter(batches))
    os.kill(os.getpid(), signal.SIGKILL)

encode.SHARD = 9
encode.shards.write_shard = write_or_die
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_encode_by_two_of_which_one_dies(first_stage, tmp_path, monkeypatch):
    """Killed in the middle of its second shard, then again: the files of a run without that.

    One process writes the same up to rounding.
    """
    command = ["encode", DIFFUSION, *OPTIONS, *SMALL_UNET, "--config.latents.variants=3"]
    command += [f"--config.run.first_stage={first_stage}", "--config.latents.scale=0.5"]
    command += ["--config.data.flip=True", "--config.data.source.size=20"]
    program = ("-c", SMALL_SHARDS)  # of three examples: seven in training
    killed, straight, alone = (tmp_path / name for name in ("killed", "straight", "alone"))
    monkeypatch.setenv("DIES_AT", "3")
    said_by(start_all(2, *command, f"--workdir={killed}", program=program), [1, -signal.SIGKILL])
    shards = killed / "latents" / ".train.partial"
    there = {path.name: path.stat().st_mtime_ns for path in shards.glob("0*")}
    assert "00001" in there
    assert "00003" not in there
    monkeypatch.delenv("DIES_AT")
    for workdir in (killed, straight):
        said_by(start_all(2, *command, f"--workdir={workdir}", program=program), [0, 0])
    trees = [
        {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (killed / "latents", straight / "latents")
    ]
    assert len(trees[0]) > 3 * 7
    assert trees[0] == trees[1]
    for name, time_ns in there.items():
        assert (killed / "latents" / "train" / name).stat().st_mtime_ns == time_ns
    do(*command, f"--workdir={alone}")
    caches = [Latents(directory=place / "latents" / "train") for place in (killed, alone)]
    for variant in range(3):
        ours, theirs = (cache.fetch(np.arange(20), variant) for cache in caches)
        np.testing.assert_array_equal(ours["label"], theirs["label"])
        np.testing.assert_allclose(ours["moments"], theirs["moments"], atol=1e-5)


def read_until(process, pattern):
    """Reads the lines of a process up to one that matches."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"ended without {pattern!r}: {''.join(seen)}")


def test_stops_and_deaths_of_one(tmp_path):
    workdir = tmp_path / "run"
    command = [
        "train",
        FIRST_STAGE,
        *SMALL,
        f"--workdir={workdir}",
        *("--config.run.steps=1000000", "--config.run.eval_every=0", "--config.run.image_every=0"),
        *("--config.run.checkpoint_every=0", "--config.run.log_every=5"),
        *("--stall=5", "--lost=300"),
    ]
    # one is stopped for a while, its machine say, and the other names it
    zero, one = processes = start_all(2, *command)
    read_until(zero, "step 10/")
    one.send_signal(signal.SIGSTOP)
    read_until(zero, r"warning: no sign of life from process 1 \(.*\) for \d+ s, last at step \d+")
    one.send_signal(signal.SIGCONT)
    read_until(zero, r"process 1 \(.*\) is back after \d+ s")
    # preemption of one saves the work of both
    one.send_signal(signal.SIGTERM)
    saved = int(read_until(zero, r"SIGTERM: saved at step (\d+)")[1])
    said_by(processes, [0, 0])
    assert (workdir / "checkpoints" / str(saved)).is_dir()

    # the death of one ends the other, and the work goes on from what was saved
    zero, one = processes = start_all(2, *command)
    assert int(read_until(zero, r"step (\d+)/")[1]) > saved
    one.kill()
    began = time.monotonic()
    line = rf"error: process 1 \({socket.gethostname()}\) died at step \d+ .*: run the same command"
    read_until(zero, line)
    said_by(processes, [1, -signal.SIGKILL])
    assert time.monotonic() - began < 30


def test_an_error_of_one_is_shown_by_all(tmp_path):
    command = ["train", DIFFUSION, *SMALL, *SMALL_UNET, f"--workdir={tmp_path}/run"]
    command.append("--config.latents.source=online")
    own = {i: [f"--config.run.first_stage={tmp_path}/of_{i}"] for i in range(2)}
    do("train", FIRST_STAGE, *SMALL, f"--workdir={tmp_path}/of_0")
    zero, one = said_by(start_all(2, *command, own=own), [2, 2])
    assert f"process 1 ({socket.gethostname()}): error: config.run.first_stage" in zero
    assert "error: config.run.first_stage" in one


def test_who_does_not_come(tmp_path, capsys):
    train = ["train", FIRST_STAGE, *SMALL, f"--workdir={tmp_path}", "--wait=1", "--processes=3"]
    place = f"--coordinator=127.0.0.1:{free_port()}"
    line = mistake(capsys, *train, place, "--process=0")
    assert line.startswith("error: process 1, process 2 did not come within 1 s")
    line = mistake(capsys, *train, place, "--process=2")
    assert "could not join 127.0.0.1" in line
    assert "Connection refused" in line
    line = mistake(capsys, *train, "--process=2")
    assert "give all of --coordinator=HOST:PORT, --processes=N and --process=I" in line
    assert not list(tmp_path.iterdir())


SMALL_INCEPTION = """
import sys
import flax.linen as nn
import jax
import numpy as np
from latent_diffusion_jax import __main__
from latent_diffusion_jax.convert import inception
from latent_diffusion_jax.evaluate import features

features.WIDTHS = dict(pool=6, spatial=5, logits=4)

class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x[:, ::23, ::23].reshape(len(x), -1)
        return features.Features(*(nn.Dense(n)(x) for n in features.WIDTHS.values()))

features.Inception = Small
image = np.zeros((1, 299, 299, 3), np.float32)
inception.load_inception = lambda path: Small().init(jax.random.key(0), image)["params"]
sys.exit(__main__.main())
"""


def test_images_are_measured_by_all_processes(tmp_path):
    """As by one, with a batch that is not full; the first process alone writes and speaks."""
    for name, number in (("images", 21), ("reference", 30)):
        rng = np.random.default_rng(number)
        np.savez(tmp_path / f"{name}.npz", rng.integers(0, 256, (number, 8, 9, 3), np.uint8))
    given = [f"--{name}={tmp_path}/{name}.npz" for name in ("images", "reference")]
    command = ["evaluate", *given, "--inception=small.pth", "--batch=8"]
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        started = start_all(processes, *command, f"--out={out}", program=("-c", SMALL_INCEPTION))
        said = said_by(started, [0] * processes)
        assert "fid" in said[0]
        assert all("fid" not in other for other in said[1:])
        found.append(json.loads(out.read_text())["measures"])
    assert set(found[0]) > {"fid", "sfid", "kid", "is", "precision", "recall"}
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
