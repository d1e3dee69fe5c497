import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.optim import make_lr_schedule, make_optimizer
from tests.train.toy import OPTIM

GOLDEN = Path(__file__).parents[1] / "golden"
ADAM = {k: v for k, v in OPTIM.items() if k != "weight_decay"} | {"name": "adam"}


@pytest.mark.parametrize("case", ["linear_churches", "linear_decay", "warmup_cosine_inpainting"])
def test_schedules_are_the_originals(case):
    arrays = np.load(GOLDEN / "lr_schedules.npz")
    options = json.loads((GOLDEN / "lr_schedules.json").read_text())[case]
    if case.startswith("linear"):
        options = {k.removesuffix("s") if k == "cycle_lengths" else k: v[0]
                   for k, v in options.items()}  # fmt: skip
        schedule = make_lr_schedule(name="warmup_linear", **options)
    else:
        schedule = make_lr_schedule(name="warmup_cosine", **options)
    found = [schedule(jnp.int32(step)) for step in arrays["steps"]]
    np.testing.assert_allclose(found, arrays[case], rtol=2e-6, atol=2e-8)


def test_adamw_is_pytorchs():
    options = OPTIM | {"lr": 0.1, "weight_decay": 0.2, "clip_norm": 0.0}
    options["schedule"] = {
        "name": "warmup_linear", "warm_up_steps": 2, "f_start": 0.5, "f_max": 1.0, "f_min": 1.0,
        "cycle_length": 1e13,
    }  # fmt: skip
    tx, lr_at = make_optimizer(**options)
    params = {"weight": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    state = tx.init(params)
    expected = {k: np.array(v, np.float64) for k, v in params.items()}
    mean = {k: 0 * v for k, v in expected.items()}
    square = {k: 0 * v for k, v in expected.items()}
    for n in range(4):
        gradients = jax.tree.map(lambda p, n=n: jnp.cos(p) + n, params)
        lr = 0.1 * (1 if n >= 2 else 0.5 + 0.25 * n)
        np.testing.assert_allclose(lr_at(jnp.int32(n)), lr, rtol=1e-6)
        for k, g in gradients.items():
            g = np.array(g, np.float64)
            mean[k] = 0.9 * mean[k] + 0.1 * g
            square[k] = 0.999 * square[k] + 0.001 * g**2
            expected[k] *= 1 - lr * 0.2
            expected[k] -= (
                lr
                * (mean[k] / (1 - 0.9 ** (n + 1)))
                / (np.sqrt(square[k] / (1 - 0.999 ** (n + 1))) + 1e-8)
            )
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        for k in params:
            np.testing.assert_allclose(params[k], expected[k], rtol=1e-5)


def test_adam_does_not_decay():
    tx, _ = make_optimizer(**ADAM)
    params = {"w": jnp.ones(2)}
    updates, _ = tx.update({"w": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 0)


def test_clipping_bounds_the_norm_of_all_gradients():
    # A large eps makes Adam's first update proportional to the gradient.
    clipped, _ = make_optimizer(**ADAM | {"eps": 1e6, "clip_norm": 1.0})
    free, _ = make_optimizer(**ADAM | {"eps": 1e6, "clip_norm": 0.0})
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    small = clipped.update(gradients, clipped.init(params), params)[0]
    large = free.update(gradients, free.init(params), params)[0]
    for name in params:
        np.testing.assert_allclose(5 * small[name], large[name], rtol=1e-5)


def bytes_of(tx, params):
    state = jax.eval_shape(tx.init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


ADAFACTOR = {key: OPTIM[key] for key in ("lr", "schedule", "clip_norm")} | {"name": "adafactor"}
FRUGAL = {"mu_dtype": (OPTIM | {"mu_dtype": "bfloat16"}, 0.75), "adafactor": (ADAFACTOR, 0.02)}


@pytest.mark.parametrize(("options", "share"), FRUGAL.values(), ids=list(FRUGAL))
def test_optimisers_that_cost_less_memory(options, share):
    """Bytes as promised, and a least-squares problem is solved all the same."""
    rng = np.random.default_rng(0)
    truth = jnp.asarray(rng.standard_normal((256, 256)), jnp.float32)
    tx, _ = make_optimizer(**options | {"lr": 0.05})
    params = {"w": jnp.zeros((256, 256))}
    adamw, _ = make_optimizer(**OPTIM)
    assert bytes_of(tx, params) <= share * bytes_of(adamw, params) + 16
    inputs = jnp.asarray(rng.standard_normal((512, 256)), jnp.float32)

    def loss(params):
        return jnp.mean((inputs @ (params["w"] - truth)) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), loss(params)
    for _ in range(300):
        params, state = step(params, state)
    assert loss(params) < 0.01 * start


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (OPTIM | {"name": "adamax"}, "'adamax'.*adafactor, adam, adamw"),
        (OPTIM | {"mu_dtype": "float8"}, "unknown mu_dtype 'float8'.*bfloat16"),
        (OPTIM | {"clip_norm": -1.0}, "clip_norm=-1.0"),
        (OPTIM | {"schedule": {"name": "cosine"}}, "'cosine'.*warmup_cosine"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(UserError, match=words):
        make_optimizer(**options)
