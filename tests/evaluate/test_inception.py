"""FID's Inception against public implementations' numbers (tests/golden/metrics)."""

import json
import zlib

import jax
import numpy as np
import pytest

from latent_diffusion_jax.convert.files import write_tensors
from latent_diffusion_jax.convert.inception import load_inception
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate.inception import Inception, prepare
from tests.published import GOLDEN

ARRAYS = dict(np.load(GOLDEN / "metrics" / "inception.npz"))
SHAPES = json.loads((GOLDEN / "metrics" / "weights.json").read_text())["shapes"]
NUMBER = 13
SHORT = {"pytorch-fid": "pfid", "torch-fidelity": "tff"}


def weight(key: str, shape: list[int]) -> np.ndarray:
    """A tensor by the formula of the golden data."""
    n = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(
        shape, np.float32
    )
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(n)
    if len(shape) == 4:
        return n * float(np.sqrt(2 / np.prod(shape[1:])))
    if len(shape) == 2:
        return n * float(1 / np.sqrt(2048))
    return 1 + 0.1 * n if key.endswith("weight") else 0.1 * n


@pytest.fixture(scope="module")
def tensors():
    return {key: weight(key, shape) for key, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    counters = {
        f"{k[:-6]}num_batches_tracked": np.zeros((), np.int64) for k in tensors if ".bn.w" in k
    }
    file = tmp_path_factory.mktemp("inception") / "pt_inception.safetensors"
    write_tensors(file, tensors | counters)
    return str(file)


@pytest.mark.parametrize("preparation", SHORT)
def test_preparation_is_the_published(preparation):
    for i in range(NUMBER):
        found = prepare(ARRAYS[f"img{i:02d}"][None], preparation)[0]
        rows = found[ARRAYS["row_index"], ::3]
        np.testing.assert_allclose(
            rows, ARRAYS[f"{SHORT[preparation]}_resized_rows"][i], rtol=0, atol=1e-4
        )


def test_features_are_the_published(path):
    params = load_inception(path)

    @jax.jit
    def features(params, images):
        return Inception().apply({"params": params}, images)

    for preparation, short in SHORT.items():
        images = [ARRAYS[f"img{i:02d}"] for i in range(NUMBER)]
        prepared = np.concatenate([prepare(x[None], preparation) for x in images])
        found = features(params, prepared)
        expected = {"pool": ARRAYS[f"{short}_2048"]}
        if short == "tff":
            expected["spatial"] = ARRAYS["tff_spatial"].reshape(NUMBER, -1)
            expected["logits"] = ARRAYS["tff_logits_unbiased"]
        for name, values in expected.items():
            ours = np.asarray(getattr(found, name))
            error = np.linalg.norm(ours - values, axis=1) / np.linalg.norm(values, axis=1)
            # a tenth of the mildest mistake in the golden data's list of them
            assert error.max() < 1e-5, (preparation, name, error)


def test_a_missing_file_says_which_and_from_where(tmp_path, tensors):
    with pytest.raises(UserError, match="no file.*pt_inception-2015-12-05-6726825d.pth"):
        load_inception(str(tmp_path / "no.pth"))
    first, *_ = tensors
    write_tensors(tmp_path / "part.safetensors", {first: tensors[first]})
    with pytest.raises(UserError, match="has no 'Conv2d_1a_3x3.bn.weight'.*pytorch-fid"):
        load_inception(str(tmp_path / "part.safetensors"))
    write_tensors(tmp_path / "odd.safetensors", {first: tensors[first][:, :1]})
    with pytest.raises(UserError, match=r"is \[32, 1, 3, 3\], in FID's Inception \[32, 3, 3, 3\]"):
        load_inception(str(tmp_path / "odd.safetensors"))
