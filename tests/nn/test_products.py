"""Products as CPUs are given them, of float32 and of bfloat16 operands, against XLA's own.

Operands that are small whole numbers have bfloat16 values, and sums of their products float32 ones:
there both must be equal to the last bit. Rounding random ones to 8 bits is a relative error of at
most 2^-8, 2^-8 / sqrt(3) in the mean square; of products of two operands, and of sums of many such,
sqrt(2) times that: 3.2e-3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.nn import products
from latent_diffusion_jax.nn.layers import conv, dense
from latent_diffusion_jax.nn.unet import UNet

C, WIDE = 32, 40  # the least that products are taken of, and more
CASES = {  # input, layer
    "3x3": ((2, 5, 7, C), dict(width=3)),
    "one pixel": ((1, 1, 1, C), dict(width=3)),
    "after 1 only": ((2, 4, 6, C), dict(width=3, padding=((0, 1), (0, 1)))),
    "valid": ((1, 6, 5, C), dict(width=3, padding=0)),
    "beyond the border": ((1, 3, 4, C), dict(width=3, padding=3)),
    "1x1": ((2, 3, 5, C), dict(width=1)),
    "4x4": ((1, 7, 6, C), dict(width=4, padding=1)),
    "strided": ((2, 6, 7, C), dict(width=3, stride=2)),
    "image": ((1, 5, 4, 3), dict(width=3)),
    "tokens": ((2, 37, C), None),
}


@pytest.fixture(autouse=True)
def sizes_are_small(monkeypatch):
    monkeypatch.setattr(products, "LEAST_ROWS", 1)


def layer(options, dtype):
    """The layer as networks make it."""
    return (
        dense(WIDE, "", dtype=dtype) if options is None else conv(WIDE, "", dtype=dtype, **options)
    )


def pulled(module, x, params, seed):
    """The layer's result, and gradients of its kernel, bias and input."""

    @jax.jit
    def run(params, x):
        y, back = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
        return y, *jax.tree.leaves(back(jnp.asarray(numbers(y.shape, seed))))

    return run(params, x)


def numbers(shape, seed, whole=True):
    rng = np.random.default_rng(seed)
    return (rng.integers(-3, 4, shape) if whole else rng.normal(size=shape)).astype(np.float32)


def operands(shape, options, whole=True):
    x = numbers(shape, 0, whole)
    params = jax.eval_shape(layer(options, jnp.float32).init, jax.random.key(0), x)["params"]
    return x, {name: numbers(p.shape, 1, whole) for name, p in params.items()}


def test_the_cases_are_of_both_kinds():
    """Or a rule that sent everything to XLA would pass."""
    half = {
        name: "bf16"
        in str(jax.make_jaxpr(layer(options, jnp.bfloat16).apply)({"params": params}, x))
        for name, (shape, options) in CASES.items()
        for x, params in [operands(shape, options)]
    }
    assert [name for name, is_half in half.items() if not is_half] == [
        "strided",
        "image",
    ]


@pytest.mark.parametrize("name", ["3x3", "tokens"])
def test_few_rows_stay_float32(name, monkeypatch):
    shape, options = CASES[name]
    x, params = operands(shape, options)
    rows = x.size // C
    for least, half in ((rows, True), (rows + 1, False)):
        monkeypatch.setattr(products, "LEAST_ROWS", least)
        program = jax.make_jaxpr(layer(options, jnp.bfloat16).apply)({"params": params}, x)
        assert ("bf16" in str(program)) is half


@pytest.mark.parametrize("name", CASES)
def test_equal_where_bfloat16_is_exact(name):
    shape, options = CASES[name]
    x, params = operands(shape, options)
    expected, found = (
        pulled(layer(options, dtype), x, params, 2) for dtype in (jnp.float32, jnp.bfloat16)
    )
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["3x3", "tokens"])
def test_as_near_as_rounded_operands_are(name):
    shape, options = CASES[name]
    x, params = operands(shape, options, whole=False)
    expected, found = (
        pulled(layer(options, dtype), x, params, 2) for dtype in (jnp.float32, jnp.bfloat16)
    )
    for a, b in zip(expected, found, strict=True):
        assert jnp.linalg.norm(a - b) < 3.2e-3 * jnp.linalg.norm(a)


def test_under_vmap_jit_and_remat_as_alone():
    x, params = operands((2, 4, 4, C), dict(width=3))
    module = conv(WIDE, "", dtype=jnp.bfloat16)

    def loss(params, x):
        return (module.apply({"params": params}, x) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    alone = jnp.stack([gradient(params, row[None])["kernel"] for row in x])
    again = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss)), (None, 0)))
    found = again(params, x[:, None])["kernel"]
    np.testing.assert_allclose(found, alone, rtol=1e-6, atol=1e-6 * float(abs(alone).max()))


SIZES = dict(
    model_channels=32,
    out_channels=4,
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(),
    num_heads=2,
    transformer_depth=0,
    num_groups=8,
)


def unet(dtype):
    """(parameters -> result) of a UNet on two images, and parameters for it."""
    network = UNet(**SIZES, dtype=dtype)
    z, cond = (
        numbers((2, 8, 8, 4), 0, whole=False),
        Cond(context=numbers((2, 3, 8), 1, whole=False)),
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), z, 5, cond)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    made = [0.1 * numbers(leaf.shape, i, whole=False) for i, leaf in enumerate(leaves)]
    return lambda p: network.apply({"params": p}, z, 5, cond), jax.tree.unflatten(structure, made)


def test_unet_and_its_gradients_are_near_float32():
    def run(dtype):
        apply, params = unet(dtype)
        loss, gradients = jax.jit(jax.value_and_grad(lambda p: (apply(p) ** 2).mean()))(params)
        return loss, np.concatenate([g.ravel() for g in jax.tree.leaves(gradients)])

    (loss, gradients), (half_loss, half_gradients) = run(jnp.float32), run(jnp.bfloat16)
    np.testing.assert_allclose(half_loss, loss, rtol=1e-2)
    assert np.linalg.norm(half_gradients - gradients) < 2e-2 * np.linalg.norm(gradients)


def test_no_bfloat16_convolution_nor_result_on_cpus():
    apply, params = unet(jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(lambda p: apply(p).sum()))(params).jaxpr
    seen = list(products_of(program))
    assert sum(name == "dot_general" and dtypes[1] == jnp.bfloat16 for name, dtypes in seen) > 40
    for name, (result, *operands) in seen:
        assert result == jnp.float32
        assert name == "dot_general" or set(operands) == {jnp.dtype("float32")}


def products_of(jaxpr):
    """(name, dtypes of the result and of both operands) of every product in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("conv_general_dilated", "dot_general"):
            yield eqn.primitive.name, [v.aval.dtype for v in (*eqn.outvars, *eqn.invars)]
        for inner in jaxprs_in_params(eqn.params):
            yield from products_of(inner)


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_programs_are_linen_s_own(backend):
    plain = dict(dtype=jnp.bfloat16, name="")
    for name, own in {
        "3x3": lambda: nn.Conv(WIDE, (3, 3), 1, 1, **plain),
        "tokens": lambda: nn.Dense(WIDE, **plain),
    }.items():
        shape, options = CASES[name]
        x, params = operands(shape, options)
        with products.traced_for(backend):
            found = layer(options, jnp.bfloat16)
        trace = [jax.make_jaxpr(m.apply)({"params": params}, x) for m in (found, own())]
        assert str(trace[0]) == str(trace[1])

    with products.traced_for(backend):
        apply, params = unet(jnp.bfloat16)
        seen = list(products_of(jax.make_jaxpr(lambda p: apply(p))(params).jaxpr))
        assert products.policy(jnp.float32) == products.Policy(jnp.float32)
    convolutions = [dtypes for name, dtypes in seen if name == "conv_general_dilated"]
    assert {str(d) for dtypes in convolutions for d in dtypes} == {"bfloat16"}
    assert products.policy(jnp.bfloat16).dtype == jnp.float32  # and back to this machine's


@pytest.mark.parametrize("precision", [None, "highest"])
@pytest.mark.parametrize("features", [WIDE, 8])  # more than the inputs' channels, and fewer
@pytest.mark.parametrize("shape", [(2, 37, C), (2, 3, 5, C), (C,)])
def test_float32_s_linear_layers_are_linen_s(shape, features, precision):
    x = numbers(shape, 0)
    params = {"kernel": numbers((C, features), 1), "bias": numbers((features,), 2)}
    options = dict(dtype=jnp.float32, precision=precision)
    product = products.policy(jnp.float32).dot_general
    found, expected = (
        pulled(nn.Dense(features, dot_general_cls=how, **options), x, params, 3)
        for how in (product, None)
    )
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
