"""Phase 1 with all of its loss through the command line: LPIPS from a file, the discriminator."""

import shutil

import jax
import numpy as np
import pytest

from latent_diffusion_jax.convert.files import write_tensors
from latent_diffusion_jax.first_stage.lpips import Lpips
from latent_diffusion_jax.train.metrics import read_jsonl
from tests.cli import ROOT, arrays, do, mistake
from tests.published import named, weights

CONFIG = f"--config={ROOT}/configs/first_stage/kl_f4.py:tiny"
FULL = ["--config.loss.perceptual_weight=1.0", "--config.mesh.data=1"]
TIMING = ("images_per_second", "flops_per_second", "seconds_")


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """A file as the `lpips` package writes it, with weights by the formula."""
    image = np.zeros((1, 16, 16, 3), np.float32)
    shapes = jax.eval_shape(Lpips().init, jax.random.key(0), image, image)["params"]

    def torch_layout(x):
        if x.ndim < 2:
            return x
        x = x.reshape(1, 1, *x.shape) if x.ndim == 2 else x
        return np.ascontiguousarray(x.transpose(3, 2, 0, 1))

    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    tree = named(weights(shapes, "loss.perceptual_loss."))
    write_tensors(path, {key: torch_layout(x) for key, x in tree.items()})
    return path


@pytest.fixture(scope="module")
def straight(lpips, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    do("train", CONFIG, *FULL, f"--config.run.lpips={lpips}", f"--workdir={workdir}")
    return workdir


def test_what_it_logs(straight):
    lines = read_jsonl(str(straight / "metrics.jsonl"))
    training = [line for line in lines if "loss" in line]
    assert [line["discriminator_factor"] for line in training] == [0, 0, 1, 1]
    wanted = {"lpips", "adaptive_weight", "generator_loss", "discriminator_loss", "logits_real"}
    wanted |= {"logits_fake", "grad_norm_autoencoder", "grad_norm_discriminator", "skipped", "kl"}
    assert wanted <= training[0].keys()
    assert all(line["lpips"] > 0 for line in training)
    assert len(training[0]["z_std"]) == 3
    validation = [line for line in lines if "validation_psnr" in line]
    wanted = {f"validation_{name}" for name in ("ssim", "l1", "lpips", "z_mean", "z_std")}
    assert all(wanted <= line.keys() for line in validation)
    pictures = sorted(path.name for path in (straight / "images").iterdir())
    assert pictures == ["reconstructions_00000002.png", "reconstructions_00000004.png"]


def test_resumed_without_the_file_it_ends_with_the_same_bits(straight, lpips, tmp_path):
    """The workdir has a copy of LPIPS; the statistics of the discriminator are in checkpoints."""
    file = shutil.copy(lpips, tmp_path / "mine.safetensors")
    workdir = f"--workdir={tmp_path}/work"
    here = [*FULL, f"--config.run.lpips={file}"]
    do("train", CONFIG, *here, "--config.run.steps=3", workdir)
    file.unlink()
    do("train", CONFIG, *here, workdir)
    assert (tmp_path / "work" / "lpips" / "checkpoints").exists()
    for ours, theirs in zip(arrays(tmp_path / "work", 4), arrays(straight, 4), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    curves = [
        [
            {k: v for k, v in line.items() if not k.startswith(TIMING)}
            for line in read_jsonl(str(workdir / "metrics.jsonl"))
            if "loss" in line
        ]
        for workdir in (straight, tmp_path / "work")
    ]
    assert curves[0] == curves[1]


def test_without_the_weights_of_lpips_it_says_where_they_are_from(straight, tmp_path, capsys):
    workdir = f"--workdir={tmp_path}/work"
    line = mistake(capsys, "train", CONFIG, *FULL, workdir)
    for part in ("vgg16-397923af.pth", "vgg.pth", "run.lpips=", "loss.perceptual_weight=0"):
        assert part in line
    line = mistake(capsys, "train", CONFIG, *FULL, "--config.run.lpips=nowhere.pth", workdir)
    assert "config.run.lpips: " in line
    assert "nowhere.pth" in line
    assert not (tmp_path / "work" / "checkpoints").exists()
    # another run of the same phase has a copy
    do("train", CONFIG, *FULL, f"--config.run.lpips={straight}", "--config.run.steps=1", workdir)


def test_an_exported_first_stage_fine_tunes_with_a_new_discriminator(straight, tmp_path):
    file, workdir = tmp_path / "model.ckpt", f"--workdir={tmp_path}/work"
    do("convert", f"--workdir={straight}", f"--to={file}")
    do("convert", f"--from={file}", CONFIG, workdir)
    do("train", CONFIG, "--config.mesh.data=1", "--config.optim.lr=1e-5", workdir)
    lines = [x for x in read_jsonl(f"{tmp_path}/work/metrics.jsonl") if "loss" in x]
    assert [line["discriminator_factor"] for line in lines] == [0, 0, 1, 1]
    do("reconstruct", workdir, "--number=8")


def test_mistakes(tmp_path, capsys):
    workdir = f"--workdir={tmp_path}/work"
    small = "--config.discriminator.num_layers=4"
    line = mistake(capsys, "train", CONFIG, small, workdir)
    assert "num_layers 4 needs images of 48 pixels, not 32" in line
    line = mistake(capsys, "train", CONFIG, "--config.discriminator.kind=pach", workdir)
    assert "unknown discriminator 'pach'; did you mean 'patch'" in line
