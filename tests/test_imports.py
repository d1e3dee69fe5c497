"""Imports go one way, and neither torch nor TensorFlow is ever in the process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "latent_diffusion_jax"
PARTS = {  # part -> what it may import beside itself and `errors`
    "errors": [],
    "config": [],
    "chips": [],
    "standalone": [],
    "xla": [],
    "cluster": [],
    "arguments": [],
    "conditioning": ["nn"],
    "data": [],
    "examples": ["conditioning", "data"],
    "train": ["chips", "cluster", "xla"],
    "nn": ["conditioning.cond"],
    "diffusion": ["conditioning.cond"],
    "first_stage": ["nn", "train.objective"],
}
for top in (
    *(
        "build",
        "plan",
        "compiled",
        "describe",
        "pipeline",
        "sampling",
        "inputs",
        "evaluate",
        "convert",
    ),
    *("demo", "export", "phases", "encode", "bench", "__main__"),
):
    PARTS[top] = list(PARTS)  # all before them


def imports(path):
    """Names from this package that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{name.name}" for name in node.names]
        else:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        yield from (n.partition(".")[2] for n in names if n.split(".")[0] == PACKAGE.name)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = [] if part == "__init__" else [part, "errors", *PARTS[part]]
    wrong = [n for n in imports(path) if not any(f"{n}.".startswith(f"{a}.") for a in allowed)]
    assert not wrong, f"{part} may import {allowed}"


def modules_after(*names):
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    return set(
        subprocess.check_output([sys.executable, "-c", code], cwd=PACKAGE.parent, text=True).split()
    )


def test_the_package_itself_loads_no_jax():
    assert not {"jax", "flax", "numpy"} & modules_after(
        "latent_diffusion_jax", "latent_diffusion_jax.errors"
    )


def test_neither_torch_nor_tensorflow_is_loaded():
    names = (p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
    loaded = modules_after(*(f"latent_diffusion_jax.{name}" for name in names))
    assert "latent_diffusion_jax.train.checkpoint" in loaded
    assert not {"torch", "tensorflow", "tensorboard"} & loaded
