"""The discriminator against the original's numbers, running statistics included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.adversary import check_patches, make_adversary
from latent_diffusion_jax.first_stage.discriminator import BatchNorm, PatchDiscriminator
from tests.published import discriminator_variables, golden, nhwc

PUBLISHED = {3: 2_765_633, 2: 663_361}  # layers -> parameters


@pytest.mark.parametrize("layers", PUBLISHED)
def test_published(layers):
    arrays, info = golden(f"disc_n{layers}")
    network = PatchDiscriminator(info["ndf"], info["n_layers"])
    variables = discriminator_variables(network, prefix=info["weight_key_prefix"])
    x = nhwc(arrays["x"])
    apply = jax.jit(network.apply, static_argnums=2, static_argnames="mutable")
    logits = apply(variables, x, False)
    np.testing.assert_allclose(logits, nhwc(arrays["out_eval"]), atol=3e-6)
    logits, new = apply(variables, x, True, mutable=("batch_stats",))
    np.testing.assert_allclose(logits, nhwc(arrays["out_train"]), atol=1.5e-5)
    first = new["batch_stats"]["main.3"]
    for name in ("mean", "var"):
        expected = arrays[f"out_bn0_running_{name}_after"]
        np.testing.assert_allclose(first[name], expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("layers", PUBLISHED)
def test_published_number_of_parameters(layers):
    params, _ = jax.eval_shape(make_adversary(num_layers=layers).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == PUBLISHED[layers]


def test_published_initial_values():
    params, statistics = make_adversary().init(jax.random.key(0))
    leaves = {".".join(path): np.asarray(x) for path, x in flatten_dict(params).items()}
    for name, leaf in leaves.items():
        if name.endswith("kernel"):
            np.testing.assert_allclose((leaf.mean(), leaf.std()), (0, 0.02), atol=1e-3)
        if name.endswith("scale"):
            np.testing.assert_allclose((leaf.mean(), leaf.std()), (1, 0.02), atol=6e-3)
    assert {name for name in leaves if name.endswith("bias") and "main.0" in name}
    assert all((s["mean"] == 0).all() and (s["var"] == 1).all() for s in statistics.values())


def test_batch_norm_keeps_the_unbiased_variance():
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 1, 4)).astype(np.float32)
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x, False)
    variables["params"]["scale"] = jnp.ones(4)
    y, new = norm.apply(variables, x, True, mutable=["batch_stats"])
    rows = x.reshape(-1, 4)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(-1, 4), expected, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * rows.mean(0), rtol=1e-5)
    kept = 0.9 + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(new["batch_stats"]["var"], kept, rtol=1e-5)


def test_image_too_small_for_its_patches():
    check_patches(make_adversary(num_layers=3), 24)
    with pytest.raises(UserError, match="num_layers 3 needs images of 24 pixels, not 16"):
        check_patches(make_adversary(num_layers=3), 16)
    smallest = make_adversary(num_layers=3, channels=2)
    params, statistics = smallest.init(jax.random.key(0))
    variables = {"params": params, "batch_stats": statistics}
    assert smallest.network.apply(variables, jnp.zeros((1, 24, 24, 3)), False).shape[1:3] == (1, 1)


def test_faults():
    with pytest.raises(UserError, match="unknown discriminator loss 'hing'; did you mean 'hinge'"):
        make_adversary(loss="hing")
