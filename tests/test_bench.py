"""Rows, turns and failures of `bench`, and one real measurement; no times but of sleep."""

import json
import math
import re

import pytest

from latent_diffusion_jax.bench import measures, turns
from latent_diffusion_jax.bench.report import COLUMNS, line
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.describe import describe
from tests import bench_worker, cli

TINY = "configs/diffusion/bench.py:tiny"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size=M"], "unknown size 'M'; one of S, imagenet256, sd1, text256"),
        (["--what=forwards"], "unknown thing to measure 'forwards'; did you mean 'forward'?"),
        (["--dtype=float16"], "unknown dtype 'float16'; did you mean"),
        (["--peers=compiled"], "unknown peer 'compiled'; did you mean 'compile'?"),
        (["--what=train_first_stage", f"--config={TINY}"], "takes a config of phase 'first_stage'"),
        (["--json=nowhere/at/all.json"], "nowhere/at/all.json"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_runs(capsys, options, message):
    assert message in cli.mistake(capsys, "bench", *options)


@pytest.mark.parametrize("option", ["--batch=0", "--batch=1,", "--what=", "--turns=0"])
def test_mistakes_of_form(capsys, option):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", option])
    assert option.partition("=")[0] in capsys.readouterr().err


def test_rows_are_all_combinations():
    found = turns.rows(["S"], ["forward", "load"], [1, 8], ["float32", "bfloat16"])
    assert len({row[:4] for row in found}) == len(found) == 8
    everything = turns.rows(["S"], [], None, ["float32"])
    assert {row.what: row.batch for row in everything} == {
        **dict.fromkeys(turns.WHAT, turns.BATCH),
        **turns.FEWER,
        **dict.fromkeys(turns.STARTS, 1),
    }
    assert set(turns.WHAT) == set(measures.MEASURES)
    assert turns.STARTS == measures.STARTS


def test_a_config_of_either_phase_is_measured_as_far_as_it_goes():
    config = load_config("configs/first_stage/bench.py:tiny")
    found = turns.rows([], [], None, ["float32"], ("mine", config))
    assert [row.what for row in found] == ["train_first_stage", "encode", "decode", "load"]
    assert {row.size for row in found} == {"mine"}


def test_workers_have_the_environment_of_the_launcher():
    text = (cli.ROOT / "launch" / "local.sh").read_text()
    assert dict(re.findall(r'export (\w+)="\$\{\w+:-(.*)\}"', text)).items() <= (
        turns.ENVIRONMENT.items()
    )


@pytest.fixture
def with_sleepers(monkeypatch):
    """What measures is `tests.bench_worker`."""
    monkeypatch.setattr(turns, "MODULES", dict.fromkeys(turns.MODULES, "tests.bench_worker"))

    def run(batch):
        row = turns.Row("S", "forward", "float32", batch, "{}")
        return list(turns.measure(row, 2, ["eager"]))

    return run


def test_turns_and_ratios(with_sleepers):
    ours, theirs = with_sleepers(bench_worker.NEVER)
    assert (ours["by"], theirs["by"]) == ("here", "torch eager")
    assert len(ours["turns"]) == len(theirs["turns"]) == 2
    assert 0.2 <= min(ours["turns"]) <= ours["seconds"] <= max(ours["turns"])
    assert min(theirs["turns"]) >= 0.4
    pairs = zip(theirs["turns"], ours["turns"])
    assert theirs["ratio"] == pytest.approx(sum(a / b for a, b in pairs) / 2)
    assert ours["images_per_second"] == pytest.approx(2 / ours["seconds"])
    assert ours["flops_per_second"] == pytest.approx(1e9 / ours["seconds"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (bench_worker.AT_ONCE, "MemoryError: no room for it"),
        (bench_worker.LATER, "ValueError: late"),
        (bench_worker.KILLED, "ended by SIGKILL: out of memory?"),
        (bench_worker.SILENT, "ended with code 1: gone"),
    ],
)
def test_a_worker_that_fails_says_why_and_the_others_go_on(with_sleepers, how, message):
    ours, theirs = with_sleepers(how)
    assert len(ours["turns"]) == 2
    assert theirs["error"] == message
    assert message in line(theirs)
    assert line(theirs).count("|") == line(ours).count("|") == len(COLUMNS) + 1


def test_nobody_is_left_behind(with_sleepers):
    spec = {"batch": bench_worker.NEVER, "peer": ""}
    worker = turns.Worker("tests.bench_worker", spec)
    worker.prepare()
    worker.close()
    assert worker._process.returncode < 0


@pytest.fixture(scope="module")
def facts():
    """What `describe` says of the tiny config."""
    return describe(load_config(TINY))


def test_a_measurement(tmp_path, capsys, facts):
    out = tmp_path / "found.json"
    what = f"bench --config={TINY} --what=forward --batch=8 --turns=1 --json={out}"
    cli.do(*what.split())
    (row,) = json.loads(out.read_text())["rows"]
    for name in ("seconds", "cpu_seconds", "images_per_second", "flops_per_second", "peak_bytes"):
        assert 0 < row[name] < math.inf, name
    assert row["flops"] == 8 * facts["flops_forward_per_image"]["unet"]
    assert row["parameters"] == facts["parameters"]["unet"]["total"]
    assert (row["size"], row["what"], row["batch"]) == ("bench", "forward", 8)
    assert line(row) in capsys.readouterr().out


def test_flops_are_those_of_describe_and_not_what_is_computed_again(facts):
    config = load_config(TINY)
    config.unet.remat = "full"
    assert measures.train_flops(config) == facts["flops_per_step"]
    assert measures.decode_flops(config) == facts["flops_forward_per_image"]["decode"]


@pytest.mark.parametrize("size", sorted(turns.SIZES))
def test_peers_have_as_many_parameters(size):
    torch = pytest.importorskip("torch", reason="peers are in torch")
    pytest.importorskip("diffusers", reason="peers are diffusers'")
    from benchmarks import peers

    config = turns._configs(size)["diffusion"]
    with torch.device("meta"):  # neither fills them
        peers.make_unet(config)
        peers.make_stage(config)
