import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.objective import accumulate_gradients
from tests.train import toy

KEY = jax.random.key(0)


def gradients(accumulate, loss=toy.mean_loss):
    return accumulate_gradients(
        lambda params, batch, key: loss(params, toy.FROZEN, batch, key, True),
        toy.init_params(KEY),
        toy.rows(0),
        KEY,
        accumulate,
    )


def test_accumulation_equals_the_plain_step_for_a_mean_loss():
    for plain, parts in zip(*(jax.tree.leaves(gradients(n)) for n in (1, 4))):
        np.testing.assert_allclose(parts, plain, rtol=1e-4, atol=1e-6)


def test_micro_batches_draw_noise_of_their_own():
    def loss(params, frozen, batch, key, train):
        return 0 * params["head"]["c"].sum(), {"noise": jax.random.normal(key)}

    _, _, metrics = gradients(2, loss)
    keys = [jax.random.fold_in(KEY, i) for i in range(2)]
    expected = np.mean([jax.random.normal(key) for key in keys])
    np.testing.assert_allclose(metrics["noise"], expected, rtol=1e-6)


def test_batch_that_does_not_divide_is_named():
    with pytest.raises(UserError, match="16.*accumulate=3"):
        gradients(3)


def test_one_step():
    objective = toy.make()
    state = objective.init(KEY)
    new, metrics = jax.jit(objective.train_step)(state, toy.FROZEN, toy.rows(0), KEY)
    assert set(metrics) == {"loss", "mse", "grad_norm", "lr", "finite"}
    assert new.step == 1
    assert metrics["finite"] == 1
    np.testing.assert_allclose(metrics["lr"], 1e-2)
    # the average, after its first update: 2/11 of the old weights
    old, now, ema = (tree["net"]["a"] for tree in (state.params, new.params, new.ema))
    np.testing.assert_allclose(ema, now * 9 / 11 + old * 2 / 11, atol=1e-6)
    assert set(new.ema) == {"net"}


def test_noise_depends_on_the_step_and_the_key_alone():
    objective = toy.make()
    step = jax.jit(objective.train_step)
    state = objective.init(KEY)

    def loss(state, key):
        return float(step(state, toy.FROZEN, toy.rows(0), key)[1]["loss"])

    assert loss(state, KEY) == loss(state, KEY)
    assert loss(state, KEY) != loss(state.replace(step=jnp.int32(1)), KEY)
    assert loss(state, KEY) != loss(state, jax.random.key(1))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_step_that_is_not_finite_does_not_touch_the_state(accumulate):
    objective = toy.make(accumulate=accumulate)
    step = jax.jit(objective.train_step)
    state, _ = step(objective.init(KEY), toy.FROZEN, toy.rows(0), KEY)
    bad = toy.rows(1)
    bad["x"][2, 3] = np.inf
    new, metrics = step(state, toy.FROZEN, bad, KEY)
    assert metrics["finite"] == 0
    assert new.step == 2
    toy.assert_same_bits(new.replace(step=state.step), state)


def test_gradient_that_is_not_finite_is_noticed_where_the_loss_is():
    def loss(params, frozen, batch, key, train):
        return jnp.sqrt(jnp.sum(0 * params["head"]["c"])), {}

    objective = toy.make(loss)
    state = objective.init(KEY)
    new, metrics = jax.jit(objective.train_step)(state, toy.FROZEN, toy.rows(0), KEY)
    assert metrics["loss"] == 0
    assert metrics["finite"] == 0
    toy.assert_same_bits(new.params, state.params)


def test_evaluation_uses_the_averaged_weights():
    objective = toy.make(toy.mean_loss)
    state = objective.init(KEY)
    zero = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    moved = zero.replace(ema={}, params={**zero.params, "net": state.ema["net"]})
    batch = toy.rows(0)
    averaged = objective.eval_step(zero, toy.FROZEN, batch, KEY)
    np.testing.assert_array_equal(
        averaged["loss"], objective.eval_step(moved, toy.FROZEN, batch, KEY)["loss"]
    )
    assert set(averaged) == {"loss", "mse"}
