"""`evaluate` of models: samples and reconstructions that nobody keeps, and results side by side."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax import build, pipeline
from latent_diffusion_jax.config import load_config, to_json
from latent_diffusion_jax.convert import inception
from latent_diffusion_jax.data.transforms import to_float, to_uint8
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import compare, features, made, measure, results, sets
from latent_diffusion_jax.evaluate.distances import nearest
from latent_diffusion_jax.evaluate.reconstruction import measure_reconstructions
from latent_diffusion_jax.first_stage.lpips import Lpips
from latent_diffusion_jax.first_stage.quality import quality
from latent_diffusion_jax.train.checkpoint import write_config, write_weights
from latent_diffusion_jax.train.sharding import make_mesh
from tests import models
from tests.cli import ROOT, do, mistake
from tests.evaluate.test_compare import folder, pictures, stand_in
from tests.published import GOLDEN

MESH = make_mesh()
OPTIONS = dict(
    sampler="ddim", options={"eta": 1.0}, steps=2, timesteps="uniform", scale=1.0, seed=3
)
RECORDED = json.loads((GOLDEN / "metrics" / "metrics.json").read_text())["psnr_ssim"]
PAIRS = [name for name in RECORDED if "ssim_gauss11_sigma1.5_population_cov" in RECORDED[name]]


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(inception, "load_inception", lambda path: {})
    return stand_in(monkeypatch)


def shapes(task="unconditional"):
    return models.trained(f"diffusion/shapes64.py:{task},tiny", "--config.data.source.size=40")


def asked(tmp_path, **changes):
    given = dict(number=20, batch=8, reference="validation", inception={})
    more = dict(preparation="pytorch-fid", save_statistics=None, neighbours=None)
    return measure.Asked(**{**given, **more, "out": tmp_path / "found.json", **changes})


def samples(tmp_path, task="unconditional", **changes):
    about = {"of": "a model", "step": 0, "weights": "ema"}
    measure.samples(shapes(task), MESH, about, asked(tmp_path, **changes), OPTIONS)
    return json.loads((tmp_path / "found.json").read_text())


def test_samples_are_measured_as_those_on_disk(tmp_path, network):
    """No files, the same numbers as of files; and how they came about is written down."""
    found = samples(tmp_path, neighbours=3)
    images = list(made.samples(shapes(), MESH, number=20, batch=8, **OPTIONS).read(0))
    place = folder(tmp_path / "samples", images)
    theirs = made.split(shapes().config, "validation")
    again = compare.compare(
        sets.open_images(place),
        theirs,
        inception={},
        preparation="pytorch-fid",
        out=tmp_path / "again.json",
        batch=8,
        mesh=MESH,
    )
    for name, value in again.measures.items():
        assert found["measures"][name] == value
    assert found["measures"]["samples_per_second"] > 0
    expected = {**OPTIONS, "conditions": "none", "number": 20, "reference": "validation"}
    assert expected.items() <= found["protocol"].items()
    assert found["protocol"]["reference_number"] == theirs.number
    assert len(found["nearest"]) == 3
    assert Image.open(tmp_path / "found.neighbours.png").width > 100


def test_a_killed_evaluation_goes_on_with_the_same_digits(tmp_path, network, monkeypatch):
    run, shown = network
    monkeypatch.setattr(features, "SAVED", 1)
    whole = samples(tmp_path / "whole")
    before = len(shown)

    def killed(x):
        if len(shown) == before + 1:
            raise KeyboardInterrupt
        return run(x)

    monkeypatch.setattr(features, "make_network", lambda params, mesh: killed)
    with pytest.raises(KeyboardInterrupt):
        samples(tmp_path / "part")
    monkeypatch.setattr(features, "make_network", lambda params, mesh: run)
    part = samples(tmp_path / "part")
    assert len(shown) == 2 * before
    for result in (whole, part):
        del result["measures"]["samples_per_second"]
    assert part["measures"] == whole["measures"]
    # of another seed nothing is kept
    other = dict(OPTIONS, seed=4)
    measure.samples(shapes(), MESH, {"weights": "ema"}, asked(tmp_path / "part"), other)
    assert json.loads((tmp_path / "part/found.json").read_text())["measures"] != part["measures"]


def test_conditions_are_of_the_data_or_classes_in_turn():
    words, inputs = made.conditions(shapes("inpainting").config)
    config = shapes("inpainting").config
    number = len(build.source(config, "validation"))
    rows = inputs(np.array([0, 1, number]))
    assert words == "validation examples in turn"
    np.testing.assert_array_equal(rows["image_to_fill"][0], rows["image_to_fill"][2])
    assert (rows["mask"][0] != rows["mask"][2]).any()  # drawn anew
    first, *_ = made.split(config, "validation").read(0)
    np.testing.assert_array_equal(to_uint8(rows["image_to_fill"][0]), first)
    classes = load_config(f"{ROOT}/configs/diffusion/shapes.py:tiny")
    words, inputs = made.conditions(classes)
    assert words == "classes in turn"
    assert inputs(np.arange(10, 14))["label"].tolist() == [10, 11, 0, 1]


def test_a_split_is_read_from_anywhere():
    images = made.split(shapes().config, "train")
    every = np.stack(list(images.read(0)))
    assert len(every) == images.number
    np.testing.assert_array_equal(np.stack(list(images.read(33))), every[33:])
    assert made.split(shapes().config, "train", 5).number == 5


def test_copies_are_found(tmp_path, network):
    """Samples that are training images lie at no distance from them; others do not."""
    images = pictures(30)
    reference = folder(tmp_path / "training", images)
    copied = np.concatenate([images[[7, 21]], pictures(3, 1)])
    given = dict(number=None, neighbours=3, reference=reference)
    measure.images(folder(tmp_path / "copies", copied), asked(tmp_path, **given))
    found = json.loads((tmp_path / "found.json").read_text())["nearest"]
    assert [row["images"][0] for row in found[:2]] == [7, 21]
    ratios = [row["distances"][0] / row["apart"] for row in found]
    assert max(ratios[:2]) < 1e-4
    assert ratios[2] > 0.3
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(6), sigma=np.eye(6))
    given["reference"] = str(tmp_path / "statistics.npz")
    with pytest.raises(UserError, match="--neighbours=3 are of reference images"):
        measure.images(str(tmp_path / "copies"), asked(tmp_path, **given))


def test_nearest_is_the_nearest():
    rng = np.random.default_rng(0)
    x, others = rng.normal(size=(5, 4)), rng.normal(size=(1300, 4))
    distances, indices = nearest(x, others, 3)
    exact = np.linalg.norm(x[:, None] - others, axis=-1)
    np.testing.assert_array_equal(indices, np.argsort(exact, axis=1)[:, :3])
    np.testing.assert_allclose(distances, np.sort(exact, axis=1)[:, :3], rtol=1e-9)


@pytest.fixture(scope="module")
def vq():
    config = load_config(f"{ROOT}/configs/first_stage/shapes.py:vq")
    config.first_stage.update(channels=8, num_groups=8, codebook_size=32)
    config.data.source.size = 200
    config.data.image_size = 16
    config.first_stage.channel_mult = (1, 1)
    params = models.weights(jax.eval_shape(build.init_params(config), jax.random.key(0)))
    return pipeline.Trained(config, params, {}, None, 0)


def test_a_first_stage_is_measured_over_a_whole_split(vq):
    """Whatever the batches, the last of which is short: means are of images."""
    config, params = vq.config, vq.params["autoencoder"]
    images = made.split(config, "train", 21)
    pixels = np.stack(list(images.read(0)))
    lpips = models.weights(
        jax.eval_shape(lambda x: Lpips().init(jax.random.key(0), x, x), to_float(pixels))
    )["params"]
    found = measure_reconstructions(vq, make_mesh(data=2), images, batch=8, lpips=lpips)
    hats = np.asarray(
        pipeline.make_reconstruct(config, make_mesh(data=1))(params, to_float(pixels))
    )
    each = [quality(a[None], b[None]) for a, b in zip(to_float(pixels), hats)]
    for name in ("psnr", "ssim", "l1"):
        np.testing.assert_allclose(found[name], np.mean([e[name] for e in each]), rtol=1e-4)
    perceptual = jax.jit(Lpips().apply)({"params": lpips}, to_float(pixels), hats)
    np.testing.assert_allclose(found["lpips"], np.mean(perceptual), rtol=1e-4)
    stage = build.first_stage(config)
    z = jax.jit(stage.encode)(params, to_float(pixels))
    indices = stage.autoencoder.apply({"params": params}, z, method="quantized").indices
    share = np.bincount(np.asarray(indices).reshape(-1), minlength=32) / indices.size
    assert found["codes_used"] == (share > 0).sum()
    entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
    np.testing.assert_allclose(found["perplexity"], np.exp(entropy), rtol=1e-4)
    behind = made.reconstructions(vq, MESH, images, 8)
    np.testing.assert_allclose(np.stack(list(behind.read(8))), to_uint8(hats)[8:], atol=1)


@pytest.mark.parametrize("name", PAIRS)
def test_psnr_and_ssim_are_the_recorded(name):
    arrays = np.load(GOLDEN / "metrics" / "psnr_ssim.npz")
    a, b = (to_float(arrays[f"{name}_{side}"])[None] for side in "ab")
    found, expected = jax.jit(quality)(a, b), RECORDED[name]
    ssim = expected["ssim_gauss11_sigma1.5_population_cov"]
    np.testing.assert_allclose(found["psnr"], float(expected["psnr_range255"]), atol=1e-4)
    np.testing.assert_allclose(found["ssim"], ssim, rtol=0, atol=1e-4)


def test_results_side_by_side_say_where_protocols_differ(tmp_path, capsys):
    paths = [str(tmp_path / f"{name}.json") for name in "abc"]
    for path, number, fid in zip(paths, (50_000, 50_000, 1000), (3.5, 4.25, 9.75)):
        protocol = {"number": number, "steps": 100}
        results.write(tmp_path / path, {"of": path}, protocol, {"fid": fid})
    do("evaluate", "--compare", *paths[:2])
    said = capsys.readouterr().out
    assert "3.5" in said
    assert "4.25" in said
    assert "of one protocol: comparable" in said
    do("evaluate", "--compare", *paths)
    said = capsys.readouterr().out
    assert "NOT COMPARABLE" in said
    assert said.splitlines()[-1].split() == ["number", "50000", "50000", "1000"]
    assert "steps" not in said
    (tmp_path / "other.json").write_text("{}")
    for files, message in (
        (paths[:1], "--compare takes two results or more, not 1"),
        ([paths[0], tmp_path / "other.json"], "is no result of evaluate"),
        ([paths[0], tmp_path / "none.json"], "cannot be read"),
        ([*paths, "--json"], "--json is of one result"),
    ):
        assert message in mistake(capsys, "evaluate", "--compare", *files)


def test_a_first_stage_from_the_command_line(tmp_path, capsys, network, vq):
    write_config(str(tmp_path / "ae"), to_json(vq.config))
    write_weights(str(tmp_path / "ae"), vq.params, {}, {})
    workdir = f"--workdir={tmp_path}/ae"
    do("evaluate", workdir, "--number=12", "--inception=stand_in.pth")
    result = json.loads((tmp_path / "ae" / "evaluation.json").read_text())
    assert set(result["measures"]) == {*("l1", "psnr", "ssim", "rfid", "perplexity", "codes_used")}
    assert result["protocol"]["number"] == 12
    assert f"12 images, {tmp_path}/ae/evaluation.json" in capsys.readouterr().out
    do("evaluate", workdir, "--number=12", "--json")
    assert json.loads(capsys.readouterr().out)["measures"]["psnr"] == result["measures"]["psnr"]
    assert "--steps=5 is of samples" in mistake(capsys, "evaluate", workdir, "--steps=5")
    assert "--reference" in mistake(capsys, "evaluate", workdir, "--reference=x")
    message = mistake(capsys, "evaluate", workdir, "--lpips=none.pth")
    assert "none.pth" in message


def test_options_of_something_else_are_refused(tmp_path, capsys):
    model = shapes()
    write_config(str(tmp_path), to_json(model.config))
    meta = {"latent_scale": 1.0, "class_names": None}
    write_weights(str(tmp_path), model.params, {"unet": model.params["unet"]}, meta)
    place = str(tmp_path / "first_stage")
    write_weights(place, {"autoencoder": model.frozen["first_stage"]}, {}, {})
    for option, message in (
        ("--lpips=x.pth", "--lpips=x.pth is of a first stage's reconstructions"),
        ("--neighbours=3", "--neighbours=3 takes --inception=FILE, FID's weights"),
        ("--reference=train", "--reference=train takes --inception=FILE"),
        ("--inception=no.pth", "no file 'no.pth': FID and its kin need pt_inception"),
    ):
        assert message in mistake(capsys, "evaluate", f"--workdir={tmp_path}", option)
