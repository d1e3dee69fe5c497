"""Averages whose length is chosen after training, against integrals and averages tracked."""

import contextlib
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train import averages
from latent_diffusion_jax.train.checkpoint import Checkpointer
from latent_diffusion_jax.train.loop import Stopped
from latent_diffusion_jax.train.sharding import lay_out, make_mesh
from latent_diffusion_jax.train.state import (
    TrainState,
    power_exponent,
    power_rate_at,
    update_ema,
)
from tests.train import toy

LENGTHS = (0.05, 0.1)


def profile(gamma, t, tau):
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_a_length_is_the_deviation_of_its_profile(length):
    tau = np.linspace(0, 1, 200_001)
    p = profile(power_exponent(length), 1, tau)
    mass, mean = (np.trapezoid(p * tau**k, tau) for k in range(2))
    variance = np.trapezoid(p * (tau - mean) ** 2, tau)
    np.testing.assert_allclose([mass, np.sqrt(variance)], [1, length], rtol=1e-5)


@pytest.mark.parametrize("length", [0, -0.1, 0.3, float("nan")])
def test_no_profile_is_of_such_a_length(length):
    with pytest.raises(UserError, match="choose from above 0 to 0.289"):
        power_exponent(length)


def test_inner_products_are_integrals():
    tau = np.linspace(0, 40, 400_001)
    ours, others = [(6.9, 30.0), (17.0, 12.0), (0.0, 40.0)], [(17.0, 25.0), (2.5, 30.0)]
    found = averages.inner_products(*zip(*ours), *zip(*others))
    for row, a in zip(found, ours, strict=True):
        for value, b in zip(row, others, strict=True):
            product = profile(*a, tau) * profile(*b, tau)
            np.testing.assert_allclose(value, np.trapezoid(product, tau), rtol=1e-3)


def tracked(path, length):
    """The average of [T, ...] after each step, by the updates that training makes."""
    gamma, average = power_exponent(length), {"net": jnp.full(path.shape[1:], 99.0)}
    found = []
    for n, now in enumerate(path, start=1):
        average = update_ema(average, {"net": now}, power_rate_at(n, gamma))
        found.append(average["net"])
    return np.stack(found)


def test_updates_are_integrals_of_the_profile_and_forget_the_start():
    path = np.random.default_rng(0).standard_normal((300, 2)).astype(np.float32)
    s = np.arange(301) / 300
    shares = np.diff(s ** (power_exponent(0.1) + 1))
    np.testing.assert_allclose(tracked(path, 0.1)[-1], shares @ path, atol=2e-6)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_is_stored_comes_back(length):
    found, error = averages.coefficients(LENGTHS, [40, 80, 120], length, 80)
    expected = np.zeros((3, 2))
    expected[1, LENGTHS.index(length)] = 1
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert error < 1e-6


@pytest.mark.parametrize("step", [600, 1000])
@pytest.mark.parametrize("length", [0.04, 0.07, 0.15])
def test_another_length_is_what_would_have_been_tracked(length, step, tmp_path):
    """On a path that settles and jitters, from float16; errors are of the path's deviation."""
    n = np.arange(1, 1001)[:, None]
    jitter = np.random.default_rng(0).standard_normal((1000, 64))
    path = (np.exp(-n / 300) * np.linspace(-2, 2, 64) + 0.3 * jitter).astype(np.float32)
    kept = [tracked(path, x) for x in LENGTHS]
    with contextlib.closing(Checkpointer(str(tmp_path), keep=None)) as stored:
        for at in range(50, step + 1, 50):
            ema, other = ({"net": jnp.asarray(average[at - 1])} for average in kept)
            state = TrainState(jnp.int32(at), {}, (), ema, {}, (other,))
            averages.write(stored, at, state, LENGTHS)
        shapes = lay_out(jax.eval_shape(lambda: {"net": jnp.zeros(64)}), make_mesh(data=1))
        found, at, error = averages.synthesise(stored, shapes, LENGTHS, length)
    assert at == step
    assert error < 0.03
    off = np.sqrt(np.mean((found["net"] - tracked(path, length)[step - 1]) ** 2))
    assert off < 0.01 * path.std()


def read(workdir, mesh, length, step=None):
    shapes = jax.eval_shape(lambda: {"net": toy.init_params(jax.random.key(0))["net"]})
    place = averages.folder(str(workdir))
    with contextlib.closing(Checkpointer(place, read_only=True)) as stored:
        return averages.synthesise(stored, lay_out(shapes, mesh), LENGTHS, length, step)


def test_a_resumed_run_stores_the_same_bits_and_any_mesh_reads_them(tmp_path):
    options = dict(lengths=LENGTHS, snapshot_every=3)
    for steps in (6, 9):
        last = toy.train(tmp_path / "parts", steps=steps, mesh=make_mesh(data=8), **options)
    whole = toy.train(tmp_path / "whole", steps=9, mesh=make_mesh(data=8), **options)
    toy.assert_same_bits(last, whole)
    found = [read(tmp_path / name, make_mesh(fsdp=8), 0.08)[0] for name in ("parts", "whole")]
    toy.assert_same_bits(*found)
    assert not found[0]["net"]["b"].sharding.is_fully_replicated
    toy.assert_same_bits(found[0], read(tmp_path / "whole", make_mesh(data=1), 0.08)[0])
    as_trained = read(tmp_path / "whole", make_mesh(data=1), LENGTHS[1])[0]
    np.testing.assert_allclose(as_trained["net"]["b"], whole.averages[0]["net"]["b"], atol=2e-4)


def test_split_state_is_stored_whole(tmp_path):
    states = [
        toy.train(tmp_path / str(mesh.size), steps=4, mesh=mesh, lengths=LENGTHS, snapshot_every=2)
        for mesh in (make_mesh(data=1), make_mesh(fsdp=8))
    ]
    one, many = (read(tmp_path / name, make_mesh(data=1), 0.07)[0] for name in "18")
    assert not states[1].averages[0]["net"]["b"].sharding.is_fully_replicated
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_signal_does_not_lose_the_averages_of_its_step(tmp_path):
    class Stop(toy.Batches):
        def __next__(self):
            if self.index == 3:  # while step 3 runs
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    options = dict(mesh=make_mesh(data=1), lengths=LENGTHS, snapshot_every=2)
    with pytest.raises(Stopped):
        toy.train(tmp_path, steps=8, batches=Stop(), **options)
    toy.train(tmp_path, steps=8, **options)
    place = averages.folder(str(tmp_path))
    with contextlib.closing(Checkpointer(place, read_only=True)) as stored:
        assert stored.steps == [2, 4, 6, 8]


def test_mistakes_are_one_line(tmp_path):
    mesh = make_mesh(data=1)
    toy.train(tmp_path, steps=4, mesh=mesh, lengths=LENGTHS, snapshot_every=2)
    with pytest.raises(UserError, match="no averages of step 3; one of 2, 4"):
        read(tmp_path, mesh, 0.1, 3)
    broken = next((tmp_path / "averages" / "checkpoints" / "2").rglob("d/*"))
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(UserError, match="checkpoints/2 is broken .*: remove it to do without"):
        read(tmp_path, mesh, 0.1)
    with pytest.raises(UserError, match="ema_lengths .0.1, 0.1. must differ"):
        toy.make(ema_lengths=(0.1, 0.1))
    with pytest.raises(UserError, match="set ema_networks"):
        toy.make(ema_lengths=(0.1,), ema_networks=())


def test_step_that_is_not_finite_leaves_the_averages():
    objective = toy.make(ema_lengths=LENGTHS)
    state = objective.init(jax.random.key(0))
    bad = toy.rows(0)
    bad["x"][0, 0] = np.nan
    new, metrics = jax.jit(objective.train_step)(state, toy.FROZEN, bad, jax.random.key(0))
    assert metrics["finite"] == 0
    toy.assert_same_bits(new.averages, state.averages)


def test_a_training_from_weights_begins_with_their_average():
    params = {"head": {"c": jnp.ones((512, 1))}}
    state = toy.make(ema_lengths=LENGTHS, ema_networks=("head",)).start(
        params, params, jax.random.key(0)
    )
    toy.assert_same_bits(state.averages, (params,))
