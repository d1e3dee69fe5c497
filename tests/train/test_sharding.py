import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.sharding import (
    arrange,
    gather_late,
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


def chips(slices, platform="gpu"):
    """Slices of eight devices, 2 x 2 x 2 where they are TPUs."""
    return [
        SimpleNamespace(
            id=i,
            slice_index=i // 8,
            platform=platform,
            device_kind="TPU v4" if platform == "tpu" else "fake",
            process_index=i // 4,
            coords=(i % 2, i // 2 % 2, i // 4 % 2),
            core_on_chip=0,
        )
        for i in range(8 * slices)
    ]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_data_goes_across_slices_and_fsdp_stays_inside(fsdp, platform):
    array = arrange(chips(3, platform), fsdp)
    assert array.shape == (24 // fsdp, fsdp)
    # so that rows of a batch lie in the slice whose processes read them
    assert [chip.slice_index for chip in array.flat] == [0] * 8 + [1] * 8 + [2] * 8
    assert {chip.id for chip in array.flat} == set(range(24))


def test_slices_as_told_by_the_config():
    plain = jax.devices()
    np.testing.assert_array_equal(make_mesh(fsdp=4).devices, np.reshape(plain, (2, 4)))
    np.testing.assert_array_equal(make_mesh(fsdp=4, slices=2).devices, np.reshape(plain, (2, 4)))
    assert make_mesh(data=1, fsdp=2, slices=1).size == 2
    for devices, fsdp, slices in ((plain, 8, 2), (chips(2), 16, 0), (chips(2), 8, 4)):
        with pytest.raises(UserError, match=f"mesh.fsdp={fsdp} would go across slices"):
            arrange(devices, fsdp, slices)
    ids = [chip.id for chip in arrange(chips(2), 16, 1).flat]  # told to: a plain mesh of all
    assert ids == list(range(16))
    with pytest.raises(UserError, match="8 devices do not divide into mesh.slices=3"):
        make_mesh(slices=3)


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


def test_the_program_that_makes_the_state_is_not_kept():
    """It is as large as the step's own."""
    objective = toy.make()
    init_sharded(objective.init, KEY, make_mesh(fsdp=4))
    gc.collect()
    programs = [m for e in jax.devices()[0].client.live_executables() for m in e.hlo_modules()]
    assert not [module.name for module in programs if "init" in module.name]


def test_a_loop_gathers_late_in_each_step():
    """XLA would gather once, before the loop, and keep the whole."""
    mesh = make_mesh(fsdp=4)
    whole = np.random.default_rng(0).normal(0, 0.1, (256, 256)).astype(np.float32)

    @jax.jit
    def run(w, x):
        def body(x, _):
            w_now, x = gather_late(mesh, w, x)
            return jnp.tanh(x @ w_now), None

        return jax.lax.scan(body, x, None, length=3)[0]

    x = put_batch(mesh, {"x": whole[:8]})["x"]
    program = run.lower(put_tree(mesh, whole), x).compile()
    before, _, entry = program.as_text().partition("ENTRY")
    assert "all-gather" in before
    assert "all-gather" not in entry
    expected = whole[:8]
    for _ in range(3):
        expected = np.tanh(expected @ whole)
    np.testing.assert_allclose(program(put_tree(mesh, whole), x), expected, atol=1e-5)


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
