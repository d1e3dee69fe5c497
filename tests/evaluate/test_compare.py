"""`evaluate --images`: sets of images against each other, killed, resumed, on many devices."""

import json

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate import compare as module
from latent_diffusion_jax.evaluate import features, sets
from latent_diffusion_jax.evaluate.inception import SIDE, Features
from latent_diffusion_jax.train.sharding import make_mesh
from tests.cli import mistake

DIMS = {"pool": 6, "spatial": 5, "logits": 4}


@pytest.fixture
def network(monkeypatch):
    """A stand-in for Inception, and how many images it was shown: means over patches."""
    return stand_in(monkeypatch)


def stand_in(monkeypatch):
    monkeypatch.setattr(features, "WIDTHS", DIMS)
    shown = []

    def run(x):
        assert x.shape[1:] == (SIDE, SIDE, 3)
        shown.append(len(x))
        rng = np.random.default_rng(0)
        flat = x[:, ::23, ::23].reshape(len(x), -1)
        return Features(
            *(
                flat @ rng.standard_normal((flat.shape[1], d)).astype(np.float32)
                for d in DIMS.values()
            )
        )

    monkeypatch.setattr(features, "make_network", lambda params, mesh: run)
    return run, shown


def pictures(number, seed=0, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (number, *size, 3), dtype=np.uint8)


def folder(place, images):
    place.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(place / f"{i:03d}.png")
    return str(place)


def compare(tmp_path, images, reference, **options):
    given = {"inception": {}, "preparation": "pytorch-fid", "batch": 4, "mesh": make_mesh()}
    theirs = sets.open_reference(reference) if reference else None
    out = tmp_path / "found.json"
    return module.compare(sets.open_images(images), theirs, out=out, **{**given, **options})


def test_a_set_is_at_no_distance_from_itself_and_far_from_noise(tmp_path, network):
    some = folder(tmp_path / "some", pictures(30) // 4)
    np.savez(tmp_path / "same.npz", pictures(30) // 4)
    same = compare(tmp_path, some, str(tmp_path / "same.npz")).measures
    far = compare(tmp_path, some, folder(tmp_path / "noise", pictures(40, 1)))
    assert abs(same["fid"]) < 1e-6
    assert abs(same["sfid"]) < 1e-6
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert far.measures["fid"] > 100
    assert far.measures["precision"] == 0
    assert far.protocol["number"] == 30
    assert far.protocol["reference_number"] == 40


def test_statistics_go_out_and_come_back(tmp_path, network):
    some, other = (folder(tmp_path / n, pictures(20, i)) for i, n in enumerate(("a", "b")))
    direct = compare(tmp_path, some, other).measures
    compare(tmp_path, other, None, save=str(tmp_path / "b.npz"))
    stored = compare(tmp_path, some, str(tmp_path / "b.npz")).measures
    assert stored["fid"] == direct["fid"]
    assert stored["sfid"] == direct["sfid"]
    assert "kid" not in stored
    # pytorch-fid's own have no sFID
    with np.load(tmp_path / "b.npz") as arrays:
        np.savez(tmp_path / "short.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    short = compare(tmp_path, some, str(tmp_path / "short.npz")).measures
    assert short["fid"] == direct["fid"]
    assert "sfid" not in short


def test_a_missing_reference_is_told_before_any_work(tmp_path, network):
    some = folder(tmp_path / "some", pictures(5))
    for reference, message in (
        (tmp_path / "none", "no folder or file"),
        (folder(tmp_path / "one", pictures(1)), "has one image; a set has two or more"),
    ):
        with pytest.raises(UserError, match=message):
            compare(tmp_path, some, str(reference))
    assert not network[1]


def test_a_killed_run_goes_on_and_gives_the_same_digits(tmp_path, network, monkeypatch):
    run, shown = network
    monkeypatch.setattr(features, "SAVED", 1)
    images = sets.open_images(folder(tmp_path / "some", pictures(22)))
    options = dict(batch=4, preparation="pytorch-fid", made_with={})
    whole = features.store(images, run, tmp_path / "whole", **options)

    def killed(x):
        if len(shown) == 9:  # six for the whole set, then three
            raise KeyboardInterrupt
        return run(x)

    with pytest.raises(KeyboardInterrupt):
        features.store(images, killed, tmp_path / "part", **options)
    part = features.store(images, run, tmp_path / "part", **options)
    assert len(shown) == 6 + 6
    for name in DIMS:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name))
    features.store(images, run, tmp_path / "part", **options)
    assert len(shown) == 12
    other = {**options, "made_with": {"inception": "another"}}
    features.store(images, run, tmp_path / "part", **other)
    assert len(shown) == 18


def test_batches_are_read_a_few_at_a_time(tmp_path):
    images = pictures(7)
    np.savez(tmp_path / "plain.npz", images)
    np.savez_compressed(tmp_path / "packed.npz", images)
    for name in ("plain", "packed"):
        found = sets.open_images(str(tmp_path / f"{name}.npz"))
        assert found.number == 7
        np.testing.assert_array_equal(list(found.read(3)), images[3:])


def test_the_grid_beside_samples_is_none_of_them(tmp_path):
    place = tmp_path / "samples"
    folder(place, pictures(3))
    Image.fromarray(pictures(1)[0]).save(place / "grid.png")
    listed = [{"file_name": f"{i:03d}.png"} for i in range(3)]
    (place / "samples.json").write_text(json.dumps({"images": listed}))
    found = sets.open_images(str(place))
    assert found.number == 3
    np.testing.assert_array_equal(list(found.read(0)), pictures(3))


def test_images_of_any_sizes_share_a_set(tmp_path, network):
    place = tmp_path / "mixed"
    folder(place, pictures(5))
    Image.fromarray(pictures(1, 2, (64, 9))[0]).save(place / "tall.png")
    found = compare(tmp_path, str(place), None, save=str(tmp_path / "s.npz"))
    assert found.protocol["number"] == 6


def test_mistakes_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "named.npz", images=pictures(2))
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    (tmp_path / "text.npz").write_text("no")
    for name, message in {
        "nowhere": "no folder or file",
        "empty": "no images in",
        "floats.npz": r"arr_0 is float64 \[2, 4, 4, 3\], not uint8",
        "named.npz": "is no .npz with arr_0",
        "text.npz": "is no .npz with arr_0",
    }.items():
        with pytest.raises(UserError, match=message):
            sets.open_images(str(tmp_path / name))
    with pytest.raises(UserError, match=r"mu and sigma are \[3\] and \[2, 2\], not"):
        sets.read_statistics(str(tmp_path / "odd.npz"))


def test_the_command_line_says_what_is_missing(tmp_path, capsys):
    some = folder(tmp_path / "some", pictures(3))
    for arguments, message in (
        ([f"--images={some}"], "--images takes --inception=FILE, and --reference"),
        ([f"--images={some}", "--workdir=x"], "give one of --images"),
        (
            [f"--images={some}", f"--reference={some}", "--inception=no.pth"],
            "no file 'no.pth': FID and its kin need pt_inception-2015-12-05-6726825d.pth",
        ),
    ):
        assert message in mistake(capsys, "evaluate", *arguments)
