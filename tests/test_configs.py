"""Every config in every variant describes something that can be built.

Those of published models have a test of their own.
"""

import inspect
from pathlib import Path

import jax
import pytest

from configs.tasks import TASKS
from latent_diffusion_jax import build
from latent_diffusion_jax.config import load_config

ROOT = Path(__file__).parents[1]
FILES = [
    path
    for path in sorted(ROOT.glob("configs/*/*.py"))
    if "from configs import published" not in path.read_text()
]
VARIANTS = [
    (path.relative_to(ROOT).as_posix(), argument)
    for path in FILES
    for argument in ("", "tiny", "vq", "gan", "pixels", "f2", "f8", *TASKS)
    if not argument
    or f'"{argument}":' in path.read_text()
    or (argument in TASKS and "tasks.make" in path.read_text())
]


@pytest.mark.parametrize("file, argument", VARIANTS)
def test_variant_builds(file, argument):
    config = load_config(f"{ROOT / file}:{argument}")
    objective = build.objective(config)
    state = jax.eval_shape(objective.init, jax.random.key(0))
    trained = {"first_stage": {"autoencoder"}, "diffusion": {"unet"}}[config.phase]
    assert trained <= set(state.params)
    side, _, channels = build.latent_shape(config)
    assert side * build.first_stage(config).factor == config.data.image_size
    assert channels == build.first_stage(config).channels


@pytest.mark.parametrize("file", sorted({file for file, _ in VARIANTS}))
def test_docstring_says_how_to_run_it_and_names_its_arguments(file):
    text = (ROOT / file).read_text()
    docstring = inspect.cleandoc(text.split('"""')[1])
    assert f"--config={file}" in docstring
    for variant in (argument for name, argument in VARIANTS if name == file and argument):
        assert f"`:{variant}`" in docstring
