"""LPIPS' weights from every file that people have them in."""

import json
import lzma

import jax
import numpy as np
import pytest

from latent_diffusion_jax.convert.files import write_tensors
from latent_diffusion_jax.convert.lpips import CONSTANTS, HOW_TO_GET, PREFIX, load_lpips
from latent_diffusion_jax.errors import UserError
from tests.convert.test_torch_file import build_legacy, legacy, mapping, storage, tensor
from tests.published import GOLDEN, named

KEYS = json.loads(lzma.decompress((GOLDEN / "keys.json.xz").read_bytes()))["kl-f8"]
CLASSIFIER = {"classifier.0.weight": np.ones((4, 2), np.float32)}


@pytest.fixture(scope="module")
def whole():
    """Everything that a published first stage holds of LPIPS; half precision changes no weight."""
    rng, arrays = np.random.default_rng(0), {}
    for key, shape, _ in KEYS:
        if key.startswith(PREFIX):
            n = rng.standard_normal(shape, np.float32).astype(np.float16)
            arrays[key.removeprefix(PREFIX)] = n.astype(np.float32)
    assert CONSTANTS.keys() <= arrays.keys()
    return arrays | {key: c.reshape(1, 3, 1, 1) for key, c in CONSTANTS.items()}


@pytest.fixture(scope="module")
def files(whole, tmp_path_factory):
    """Name -> path of the files that people have."""
    heads = {key: a for key, a in whole.items() if key.startswith("lin")}
    vgg = {  # net.slice2.5.weight -> features.5.weight
        f"features.{key.split('.', 2)[2]}": a for key, a in whole.items() if key.startswith("net.")
    }
    half = {key: a.astype(np.float16) for key, a in whole.items()}
    contents = {
        "heads.ckpt": heads,
        "heads.safetensors": heads,
        "vgg16.safetensors": vgg | CLASSIFIER,
        "module.ckpt": whole,
        "first_stage.ckpt": {
            "encoder.conv_in.weight": np.ones((8, 3, 3, 3), np.float32),
            **{PREFIX + key: a for key, a in whole.items()},
            "loss.discriminator.main.0.bias": np.ones(8, np.float32),
        },
        "package.safetensors": half
        | {f"lins.{key[3]}{key[4:]}": np.zeros(1, np.float16) for key in heads},
    }
    folder = tmp_path_factory.mktemp("lpips")
    for name, tensors in contents.items():
        write_tensors(folder / name, tensors)
    build_bare(folder / "vgg16.pth", vgg | CLASSIFIER)
    build_bare(folder / "heads.pth", heads)
    return {path.name: str(path) for path in folder.iterdir()}


def build_bare(path, tensors):
    """As torch wrote the state dict itself before 1.6, which VGG16's file is older than."""
    bodies = {
        key: tensor(
            storage(key, "torch\nFloatStorage", a.size),
            shape=a.shape,
            strides=tuple(step // a.itemsize for step in a.strides),
        )
        for key, a in tensors.items()
    }
    build_legacy(path, legacy(mapping(**bodies)), {k: a.tobytes() for k, a in tensors.items()})


def refused(match, *paths):
    with pytest.raises(UserError, match=match) as caught:
        load_lpips(paths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        "vgg16.pth heads.pth",
        "heads.safetensors vgg16.safetensors",
        "vgg16.safetensors heads.ckpt",
        "module.ckpt",
        "first_stage.ckpt",
        "package.safetensors",
        "heads.pth module.ckpt",
    ],
)
def test_every_file_gives_the_same(files, whole, names):
    params = load_lpips([files[name] for name in names.split()])
    found = named(params)
    assert found.keys() | CONSTANTS.keys() == whole.keys()
    for key, leaf in found.items():
        expected = whole[key].transpose(2, 3, 1, 0) if whole[key].ndim == 4 else whole[key]
        expected = expected.reshape(-1, 1) if key.startswith("lin") else expected
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, expected, strict=True)
    assert sum(x.size for x in jax.tree.leaves(params)) == 14_714_688 + 1_472


def test_what_is_missing_is_named(files):
    trunk = r"no 'net\.slice1\.0\.bias' \(26 missing\), of torchvision's VGG16 .*vgg16-397923af"
    heads = (
        r"no 'lin0\.model\.1\.weight' \(5 missing\), of the LPIPS heads \(vgg\.pth, version 0\.1"
    )
    refused(f"in '.*heads.ckpt': {trunk}", files["heads.ckpt"])
    refused(f"in '.*vgg16.pth': {heads}", files["vgg16.pth"])
    refused(f"{heads}.*; {trunk}|{trunk}.*; {heads}")


def test_a_file_that_is_not_there(files, tmp_path):
    path = str(tmp_path / "vgg.pth")
    refused(f"'{path}' cannot be read: No such file", files["vgg16.pth"], path)


def test_a_wrong_shape(files, whole, tmp_path):
    path = str(tmp_path / "heads.safetensors")
    heads = {key: a for key, a in whole.items() if key.startswith("lin")}
    write_tensors(path, heads | {"lin2.model.1.weight": heads["lin1.model.1.weight"]})
    match = rf"^'{path}': 'lin2\.model\.1\.weight' is \[1, 128, 1, 1\], .* \[256, 1\]$"
    refused(match, files["vgg16.pth"], path)


@pytest.mark.parametrize("key", CONSTANTS)
def test_other_constants(files, tmp_path, key):
    path = str(tmp_path / "constants.safetensors")
    for other in (CONSTANTS[key].reshape(1, 3, 1, 1) + np.float32(1e-5), np.zeros(1, np.float32)):
        write_tensors(path, {key: other})
        refused(rf"^'{path}': '{key}' is \[", files["vgg16.pth"], files["heads.pth"], path)


def test_how_to_get_the_files():
    assert "\n" not in HOW_TO_GET
    for part in ("vgg16-397923af.pth", "vgg.pth", "run.lpips", "perceptual_weight=0"):
        assert part in HOW_TO_GET
