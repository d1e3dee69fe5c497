import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.objective import (
    Criterion,
    accumulate_gradients,
    from_loss,
    make_objective,
)
from tests.train import toy

KEY = jax.random.key(0)


def gradients(accumulate, loss=toy.mean_loss):
    (of_loss,) = from_loss(loss).gradients

    def of_part(buffers, batch, key):
        _, found, metrics = of_loss(toy.init_params(KEY), {}, toy.FROZEN, batch, key, 0)
        return {"seen": buffers["seen"] + len(batch["x"])}, found, metrics

    return accumulate_gradients(of_part, {"seen": 0}, toy.rows(0), KEY, accumulate)


def test_accumulation_equals_the_plain_step_for_a_mean_loss():
    for plain, parts in zip(*(jax.tree.leaves(gradients(n)) for n in (1, 4)), strict=True):
        np.testing.assert_allclose(parts, plain, rtol=1e-4, atol=1e-6)


def test_buffers_go_from_one_micro_batch_to_the_next():
    assert gradients(4)[0]["seen"] == 16


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
    norms = {"grad_norm_net", "grad_norm_head"}
    assert set(metrics) == {"loss", "mse", "lr", "finite"} | norms
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


def test_networks_take_turns_and_buffers_are_revised():
    """The second turn sees what the first made of its network; a bad step reverts buffers too."""

    def net(params, buffers, frozen, batch, key, step):
        value = jnp.sum(params["net"]["w"] * batch["x"][0])
        return {**buffers, "n": buffers["n"] + 1}, {"net": {"w": jnp.ones(2)}}, {"loss": value}

    def head(params, buffers, frozen, batch, key, step):
        return buffers, {"head": {"w": params["net"]["w"]}}, {}

    def revise(params, buffers):
        return {**params, "net": {"w": params["net"]["w"] + 10}}, {**buffers, "revised": 1}

    objective = make_objective(
        init_params=lambda key: {"net": {"w": jnp.zeros(2)}, "head": {"w": jnp.zeros(2)}},
        criterion=Criterion(
            [net, head], lambda *args: {}, lambda: {"n": jnp.int32(0), "revised": 0}, revise
        ),
        optimizers={"net": optax.sgd(1.0), "head": optax.sgd(2.0)},
    )
    state = objective.init(KEY)
    state, metrics = objective.train_step(state, {}, {"x": jnp.ones((1, 2))}, KEY)
    np.testing.assert_array_equal(state.params["net"]["w"], [9, 9])  # 0 - 1, then + 10
    np.testing.assert_array_equal(state.params["head"]["w"], [2, 2])  # 0 - 2 * -1
    assert (state.buffers["n"], state.buffers["revised"]) == (1, 1)
    assert metrics["grad_norm_net"] == metrics["grad_norm_head"] == np.float32(np.sqrt(2))
    bad, metrics = objective.train_step(state, {}, {"x": jnp.full((1, 2), jnp.nan)}, KEY)
    assert metrics["finite"] == 0
    toy.assert_same_bits(bad.replace(step=state.step), state)


def test_networks_that_weights_lack_start_anew():
    objective = toy.make(ema_networks=())
    head = {"c": jnp.full((512, 1), 7.0)}
    state = objective.start({"head": head}, {}, KEY)
    np.testing.assert_array_equal(state.params["head"]["c"], head["c"])
    np.testing.assert_array_equal(state.params["net"]["a"], toy.init_params(KEY)["net"]["a"])
