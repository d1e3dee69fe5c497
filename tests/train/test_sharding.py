import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.sharding import (
    init_sharded,
    make_mesh,
    put_batch,
    put_tree,
    state_shardings,
)
from tests.train import toy

KEY = jax.random.key(0)


def shapes(*sizes):
    return [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]


def test_mesh_takes_the_devices_that_remain():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    assert dict(make_mesh(fsdp=4).shape) == {"data": 2, "fsdp": 4}
    assert dict(make_mesh(data=1).shape) == {"data": 1, "fsdp": 1}


@pytest.mark.parametrize("axes", [{"fsdp": 3}, {"data": 3}, {"data": 8, "fsdp": 2}, {"fsdp": 0}])
def test_mesh_that_does_not_divide_the_devices_is_named(axes):
    with pytest.raises(UserError, match="8 devices"):
        make_mesh(**axes)


def test_the_largest_dimension_that_divides_is_split():
    tree = shapes((3, 3, 64, 128), (3, 3, 128, 128), (1022, 64), (7, 9), (), (8, 4))
    specs = [s.spec for s in state_shardings(tree, make_mesh(fsdp=4), min_size=33)]
    assert specs == [
        PartitionSpec(None, None, None, "fsdp"),
        PartitionSpec(None, None, "fsdp"),
        PartitionSpec(None, "fsdp"),
        PartitionSpec(),
        PartitionSpec(),
        PartitionSpec(),
    ]


def test_state_is_born_in_its_place():
    state = init_sharded(toy.make().init, KEY, make_mesh(fsdp=4))
    whole = toy.make().init(KEY)
    moments = state.opt_state["net"][1][0].mu
    for tree in (state.params, state.ema, {"net": moments}):
        assert tree["net"]["b"].addressable_shards[0].data.shape == (toy.WIDTH, 128)
        assert tree["net"]["a"].addressable_shards[0].data.shape == (16, toy.WIDTH)
    np.testing.assert_allclose(state.params["net"]["b"], whole.params["net"]["b"], atol=1e-6)


def test_batch_is_split_over_all_devices():
    batch = put_batch(make_mesh(fsdp=4), toy.rows(0))
    assert [s.data.shape for s in batch["x"].addressable_shards] == [(2, 16)] * 8
    np.testing.assert_array_equal(batch["x"], toy.rows(0)["x"])


def test_batch_that_does_not_divide_by_the_devices_is_named():
    with pytest.raises(UserError, match="batch of 12 .* 8 devices"):
        put_batch(make_mesh(), toy.rows(0, size=12))


def losses(axes, accumulate=1):
    mesh = make_mesh(**axes)
    objective = toy.make(accumulate=accumulate)
    state = init_sharded(objective.init, KEY, mesh)
    frozen = put_tree(mesh, toy.FROZEN)
    step = jax.jit(objective.train_step, donate_argnums=0)
    found = []
    for index in range(4):
        state, metrics = step(state, frozen, put_batch(mesh, toy.rows(index)), KEY)
        found.append(metrics["loss"])
    return np.array(found)


def test_sharded_losses_equal_those_of_one_device():
    alone = losses({"data": 1})
    for axes in ({"data": 8}, {"data": 2, "fsdp": 4}):
        np.testing.assert_allclose(losses(axes), alone, rtol=1e-5)


def test_sharded_accumulation_equals_that_of_one_device():
    alone = losses({"data": 1}, accumulate=2)
    np.testing.assert_allclose(losses({"data": 2, "fsdp": 4}, accumulate=2), alone, rtol=1e-5)
