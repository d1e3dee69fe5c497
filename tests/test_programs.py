"""What accelerators are given in bfloat16: the programs are read, nothing of them is run here.

They are lowered for a GPU and a TPU on whatever machine this is.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from latent_diffusion_jax import build
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.nn.products import traced_for
from latent_diffusion_jax.plan import step_shapes
from latent_diffusion_jax.sampling import make_programs
from latent_diffusion_jax.train.sharding import plan_mesh
from tests.cli import ROOT

BF16 = ["--config.dtype=bfloat16"]
PHASES = ("first_stage/kl_f4.py:tiny", "diffusion/shapes64.py:text,tiny")


@functools.cache
def step_of(spec):
    config = load_config(f"{ROOT}/configs/{spec}", BF16)
    objective = build.objective(config)
    return config, objective, step_shapes(config, objective)


@functools.cache
def traced(name):
    """A training step, both passes, or a sampler with guidance and the decoder."""
    config, objective, step = step_of(name.removeprefix("sampler of "))
    if not name.startswith("sampler of "):
        with traced_for("gpu"):
            return jax.jit(objective.train_step, donate_argnums=0).trace(*step)
    options = {**config.sample, "steps": 2}
    del options["scale"]
    latent, decode = make_programs(config, plan_mesh(1), guided=True, **options)
    index = jax.ShapeDtypeStruct((2,), jnp.int32)
    scales = (jax.ShapeDtypeStruct((), jnp.float32),) * 2

    def generate(params, frozen, *rest):
        return decode(frozen, latent(params, frozen, *rest))

    inputs = build.inputs(config, 2)
    with traced_for("gpu"):
        return jax.jit(generate).trace(
            step.state.params, step.frozen, inputs, step.key, index, scales
        )


@functools.cache
def program(name, platform):
    """The StableHLO for a platform."""
    return traced(name).lower(lowering_platforms=(platform,)).as_text()


PROGRAMS = [(name, "cuda") for name in (*PHASES, f"sampler of {PHASES[1]}")] + [(PHASES[1], "tpu")]
PRODUCT = re.compile(r"stablehlo\.(convolution|dot_general)\b.* : \(tensor<(.*?)>, tensor<(.*?)>\)")


@pytest.mark.parametrize("name, platform", PROGRAMS)
def test_every_product_is_of_bfloat16(name, platform):
    """But one of which XLA is told to round the float32 operand: in the gradients of attention."""
    text, seen = program(name, platform), {"convolution": 0, "dot_general": 0}
    rounded = "algorithm = <lhs_precision_type = bf16, rhs_precision_type = bf16"
    for line in text.splitlines():
        if found := PRODUCT.search(line):
            kind, *operands = found.groups()
            seen[kind] += 1
            types = {operand.split("x")[-1] for operand in operands}
            assert types == {"bf16"} or rounded in line, line
    assert seen["convolution"] > 20
    assert seen["dot_general"] > 20
    assert len(re.findall("stablehlo.(?:convolution|dot_general)", text)) == sum(seen.values())


LAYOUTS = {
    "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]",  # NHWC by HWIO
    "[b, 0, 1, f]x[0, 1, o, i]->[b, 0, 1, f]",  # its gradient in the images
    "[f, 0, 1, b]x[i, 0, 1, o]->[0, 1, b, f]",  # and in the kernel
}
OPERATION = re.compile(r"(%\w+) = \"?stablehlo\.(\w+)\"?[ (]([^:]*)")


def operations(text):
    """result -> (operation, operands), of each function of a program in turn."""
    for function in text.split("func.func")[1:]:
        found = OPERATION.findall(function)
        yield {name: (kind, re.findall(r"%\w+", rest)) for name, kind, rest in found}


def source(made, value):
    """The operation that a value comes from, whatever its type and direction."""
    kind, operands = made.get(value, ("argument", []))
    while kind in ("convert", "reverse", "reshape"):
        kind, operands = made.get(operands[0], ("argument", []))
    return kind


@pytest.mark.parametrize("name, platform", PROGRAMS)
def test_no_transposes_around_convolutions(name, platform):
    text = program(name, platform)
    layouts = re.findall(r"stablehlo.convolution.*? dim_numbers = (.*?), window", text)
    assert len(layouts) > 20
    assert set(layouts) <= LAYOUTS
    for made in operations(text):
        for kind, operands in made.values():
            if kind == "convolution":
                assert "transpose" not in [source(made, operand) for operand in operands[:2]]
            if kind == "transpose":
                assert source(made, operands[0]) != "convolution"


@pytest.mark.parametrize("spec", PHASES)
def test_a_step_writes_its_state_where_it_lay(spec):
    """All of it: what is copied needs its memory twice. (`test_plan` asks XLA.)"""
    text = program(spec, "cuda")
    size = len(jax.tree.leaves(step_of(spec)[2].state))
    assert len(set(re.findall(r"tf.aliasing_output = (\d+)", text))) == size
