"""What the scripts in launch/ do, as far as it can be seen without a cluster."""

import os
import shlex
import subprocess

import pytest
import yaml

from tests.cli import ROOT

LAUNCH = ROOT / "launch"


def script(name, *arguments, **environment):
    return subprocess.run(
        ["bash", LAUNCH / name, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_processes_speak_for_themselves_and_fail_together():
    say = "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES; exit $((JAX_PROCESS_ID * 2))"
    done = script("multiprocess.sh", "3", "bash", "-c", say)
    assert sorted(done.stdout.splitlines()) == [f"[{i}] {i} of 3" for i in range(3)]
    assert done.returncode == 2


def test_multiprocess_dry_run():
    options = ("--devices=4", "--port=4000", "--dry_run")
    dry = script("multiprocess.sh", "2", *options, "train", "me")
    assert dry.returncode == 0
    lines = dry.stdout.splitlines()
    assert len(lines) == 2
    place = "JAX_COORDINATOR_ADDRESS=127.0.0.1:4000 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1"
    assert lines[1].startswith(place)
    assert "device_count=4" in lines[1]
    assert lines[1].endswith("train me")


@pytest.mark.parametrize(
    "arguments", [[], ["two", "true"], ["2"], ["2", "--what=1", "true"]], ids=" ".join
)
def test_multiprocess_mistakes(arguments):
    wrong = script("multiprocess.sh", *arguments)
    assert wrong.returncode == 2
    assert "launch/multiprocess.sh N" in wrong.stderr


JOB = ["python", "-m", "latent_diffusion_jax", "train", "--workdir=gs://b/run of mine"]


def tpu(*arguments):
    """The gcloud commands of a dry run, as lists of words."""
    done = script("tpu_pod.sh", *arguments, "--dry_run") if "--" not in arguments else None
    if done is None:
        at = arguments.index("--")
        done = script("tpu_pod.sh", *arguments[:at], "--dry_run", *arguments[at:])
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_a_tpu_slice_is_asked_for_installed_and_run():
    place = ["--zone=us-west4-a", "--project=p"]
    calls = tpu("run", "me", *place, "--type=v5litepod-256", "--spot", "--", *JOB)
    assert all(call[:3] == ["gcloud", "compute", "tpus"] for call in calls)
    assert all(call[-2:] == place for call in calls)
    create, copy, install, run = calls
    assert create[3:6] == ["queued-resources", "create", "me"]
    assert {"--node-id=me", "--accelerator-type=v5litepod-256", "--spot"} <= set(create)
    assert copy[3:5] == ["tpu-vm", "scp"]
    assert "--worker=all" in run
    (command,) = [word for word in run if word.startswith("--command=")]
    flags = (LAUNCH / "xla_flags" / "tpu.txt").read_text().split()
    assert all(flag in command for flag in flags)
    assert "gs://b/run\\ of\\ mine" in command
    assert "pip install" in " ".join(install)


def test_several_tpu_slices():
    calls = tpu("run", "me", "--zone=z", "--type=v4-64", "--slices=2", "--", *JOB)
    assert {"--node-prefix=me", "--node-count=2"} <= set(calls[0])
    runs = [call[5] for call in calls if "ssh" in call and "train" in " ".join(call)]
    assert sorted(runs) == [
        "me-0",
        "me-1",
    ]


@pytest.mark.parametrize("verb", ["status", "logs", "stop", "delete"])
def test_a_tpu_slice_is_looked_after(verb):
    (call,) = tpu(verb, "me", "--zone=z")
    assert {"me", "--zone=z"} <= set(call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "me"], "give --zone=ZONE"),
        (["run", "me", "--zone=z"], "give the command behind --"),
        (["run", "me", "--zone=z", "--", "train"], "give --type=ACCELERATOR"),
        (["run", "me", "--zone=z", "--slices=no"], "--slices=no"),
        (["run", "me", "--zoen=z"], "unknown option --zoen=z"),
        (["fly", "me", "--zone=z"], "launch/tpu_pod.sh run NAME"),
    ],
)
def test_tpu_mistakes(arguments, message):
    wrong = script("tpu_pod.sh", *arguments)
    assert wrong.returncode == 2
    assert message in wrong.stderr


def test_slurm_dry_run():
    dry = script("slurm.sbatch", *JOB, DRY_RUN="1")
    assert dry.returncode == 0
    assert dry.stdout.startswith("srun --kill-on-bad-exit=1 --label python -m latent_diffusion_jax")
    assert script("slurm.sbatch").returncode == 2


def test_the_manifest_is_one():
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert manifest["kind"] == "JobSet"
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "latent_diffusion_jax", "train"]
