"""An exported sampler, in a process without this package, makes the images that `sample` makes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from latent_diffusion_jax import export, sampling
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.sharding import make_mesh
from tests import models
from tests.cli import mistake

SEED = 2**32 - 1
ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path
import numpy as np

class Nothing:
    def find_spec(self, name, path=None, target=None):
        assert not name.startswith(("latent_diffusion_jax", "flax", "orbax")), name

sys.meta_path.insert(0, Nothing())
for folder in map(Path, sys.argv[1:]):
    spec = importlib.util.spec_from_file_location("sample", folder / "sample.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generate = module.load()
    inputs = dict(np.load(folder / "inputs.npz"))
    three = generate(inputs)
    one = generate({name: x[2:] if x.ndim else x for name, x in inputs.items()})
    np.savez(folder / "images.npz", one=one, three=three)
"""


def options(model, **changes):
    return {**model.config.sample, "steps": 2, **changes}


def write(target, model, platforms=("cpu",), **changes):
    export.export(model, Path(target), platforms=platforms, **options(model, **changes))
    return json.loads((target / "sampler.json").read_text())


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    hole = np.zeros((3, 64, 64, 1), np.float32)
    hole[:, 20:50, 10:] = 1
    return {"image_to_fill": rng.uniform(-1, 1, (3, 64, 64, 3)).astype(np.float32), "mask": hole}


@pytest.fixture(scope="module")
def cases(photo):
    """name -> model, inputs of three images, and how they are sampled."""
    label = {"label": np.array([3, 0, 11], np.int32)}
    return {
        "label": ("diffusion/shapes.py:tiny", label, {"scale": 2.0, "options": {"eta": 1.0}}),
        "inpainting": ("diffusion/shapes64.py:inpainting,tiny", photo, {"scale": 1.0}),
    }


@pytest.fixture(scope="module")
def exported(cases, tmp_path_factory):
    """Folders by name, in which another process has put the images."""
    place = tmp_path_factory.mktemp("exported")
    folders = {name: place / name for name in cases}
    for name, (spec, inputs, how) in cases.items():
        platforms = ("cpu", "cuda", "tpu") if name == "label" else ("cpu",)
        write(folders[name], models.trained(spec), platforms, **how)
        given = {"seed": np.uint32(SEED), "index": np.arange(3, dtype=np.int32), **inputs}
        if how.get("scale", 1) != 1:
            given["scale"] = np.float32(how["scale"])
        np.savez(folders[name] / "inputs.npz", **given)
    command = [sys.executable, "-I", "-c", ELSEWHERE, *map(str, folders.values())]
    subprocess.run(command, check=True, timeout=300)
    return folders


@pytest.mark.parametrize("name", ["label", "inpainting"])
def test_elsewhere_it_makes_the_same_images_of_any_number(name, cases, exported):
    spec, inputs, how = cases[name]
    model = models.trained(spec)
    (here,) = sampling.generate(
        model,
        make_mesh(),
        inputs=inputs,
        number=3,
        batch=8,
        seed=SEED,
        **options(model, **how),
    )
    there = np.load(exported[name] / "images.npz")
    assert here.std() > 0.05
    np.testing.assert_allclose(there["three"], here, atol=2e-4)
    np.testing.assert_allclose(there["one"], here[2:], atol=2e-4)


def test_the_program_holds_no_weights_and_the_file_those_that_it_reads(exported):
    program = (exported["label"] / "sampler.stablehlo").read_bytes()
    program = jax.export.deserialize(bytearray(program))
    weights = load_file(exported["label"] / "weights.safetensors")
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert len(program.in_avals) == len(weights) + 4  # seed, scale, index, label
    constants = re.findall(r'dense<"0x(\w+)"', program.mlir_module())
    assert max(map(len, constants), default=0) <= 2 * 4 * 1000  # hexadecimal, of the schedule
    parts = {name.split("/")[2] for name in weights if name.startswith("frozen/first_stage/")}
    assert parts
    assert not any(part.startswith(("encoder", "quant_conv")) for part in parts)
    inpainting = load_file(exported["inpainting"] / "weights.safetensors")
    assert any("/encoder" in name for name in inpainting)  # which has an image to encode


def test_what_it_takes_is_written_beside_it(exported):
    about = json.loads((exported["label"] / "sampler.json").read_text())
    assert about["inputs"]["label"] == {
        "shape": ["b"],
        "dtype": "int32",
        "about": "class of each image",
        "default": list(range(12)),
    }
    assert about["inputs"]["scale"]["default"] == 2.0
    assert about["images"]["shape"] == ["b", 32, 32, 3]
    about = json.loads((exported["inpainting"] / "sampler.json").read_text())
    assert set(about["inputs"]) == {"seed", "index", "image_to_fill", "mask"}  # no guidance


@pytest.mark.parametrize("form", ["basic", "file", "folder"])
def test_a_tokenizer_goes_along(form, tmp_path):
    (tmp_path / "from").mkdir()
    vocabulary = tmp_path / "from" / "vocab.txt"
    vocabulary.write_text("[PAD]\nword")
    given = {"basic": "basic", "file": str(vocabulary), "folder": str(tmp_path / "from")}[form]
    place = tmp_path / export.copy_tokenizer(given, tmp_path)
    words = (place / "vocab.txt").read_text().split("\n")
    assert words[:1] == ["[PAD]"]
    assert (words[1] == "word") == (form != "basic")


def test_mistakes(exported, tmp_path, capsys):
    model = models.trained("diffusion/shapes.py:tiny")
    with pytest.raises(UserError, match="unknown platform 'gpu'.* one of cpu, cuda, rocm, tpu"):
        write(tmp_path / "new", model, platforms=("cpu", "gpu"))
    with pytest.raises(UserError, match="is there already: choose another --to"):
        write(exported["label"], model)
    assert not (tmp_path / "new").exists()
    mistake(capsys, "export", "--workdir=nowhere", f"--to={tmp_path}/new")
