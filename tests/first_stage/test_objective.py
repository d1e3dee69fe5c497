"""The loss of phase 1 worked out by hand, and where its gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.losses import perplexity
from latent_diffusion_jax.first_stage.objective import make_loss
from latent_diffusion_jax.first_stage.stage import make_first_stage

IMAGE = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 3)).astype(np.float32)
KINDS = {"kl": {}, "vq": {"codebook_size": 16}}
PIXEL = {"l1": np.abs, "l2": np.square}
VQ_TERMS = dict(codebook_weight=0.7, beta=0.25, legacy=False)


def tiny(kind, **options):
    """A first stage of f = 1, and parameters far from their initial values."""
    network = dict(
        channels=4, channel_mult=(1,), num_res_blocks=1, z_channels=3, embed_dim=2, num_groups=2
    )
    stage = make_first_stage(kind=kind, **KINDS[kind], **network, **options)
    random = np.random.default_rng(1)
    return stage, jax.tree.map(
        lambda x: random.normal(0, 0.5, x.shape).astype(np.float32),
        jax.eval_shape(stage.init, jax.random.key(0)),
    )


def evaluate(stage, kind, **terms):
    """(params, key, train) -> (loss, metrics), compiled."""
    loss = make_loss(stage, kind=kind, **terms)

    def call(params, seed, train):
        return loss({"autoencoder": params}, {}, {"image": IMAGE}, jax.random.key(seed), train)

    return jax.jit(call, static_argnums=2)


def gradients(stage, kind, params):
    loss = make_loss(stage, kind=kind)

    def total(params):
        return loss({"autoencoder": params}, {}, {"image": IMAGE}, jax.random.key(0), True)[0]

    return jax.jit(jax.grad(total))(params)


@pytest.mark.parametrize("kind,pixel", [("kl", "l1"), ("kl", "l2"), ("vq", "l1"), ("vq", "l2")])
def test_loss_and_metrics_by_hand(kind, pixel):
    stage, params = tiny(kind)
    terms = dict(kl_weight=0.1) if kind == "kl" else VQ_TERMS
    loss, metrics = evaluate(stage, kind, pixel=pixel, **terms)(params, 0, False)
    moments = jax.jit(stage.encode)(params, IMAGE)
    z = stage.mode(moments)
    error = (IMAGE - np.asarray(jax.jit(stage.decode)(params, z))).astype(np.float64)
    expected = dict(l1=np.abs(error).mean(), mse=(error**2).mean(), z_mean=z.mean(), z_std=z.std())
    if kind == "kl":
        mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=-1)
        expected["kl"] = 0.5 * np.sum(mean**2 + np.exp(logvar) - 1 - logvar) / 3
        # both summed over an image
        expected["loss"] = PIXEL[pixel](error).sum() / 3 + 0.1 * expected["kl"]
    else:
        entries = params["quantize"]["embedding"]["embedding"]
        distances = np.square(np.asarray(z, np.float64)[..., None, :] - entries).sum(axis=-1)
        expected["codebook"] = 1.25 * distances.min(axis=-1).mean() / stage.channels
        share = np.bincount(distances.argmin(axis=-1).ravel(), minlength=16) / 48
        expected["perplexity"] = np.exp(-np.sum(share * np.log(np.maximum(share, 1e-9))))
        # both means over everything
        expected["loss"] = PIXEL[pixel](error).mean() + 0.7 * expected["codebook"]
    assert metrics.keys() == expected.keys()
    assert metrics["loss"] == loss
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_part(kind):
    stage, params = tiny(kind)
    parts = gradients(stage, kind, params)
    codebook = {"quantize"} if kind == "vq" else set()
    assert parts.keys() == {"encoder", "decoder", "quant_conv", "post_quant_conv"} | codebook
    for part, modules in parts.items():
        for name, module in modules.items():
            assert max(jnp.abs(x).max() for x in jax.tree.leaves(module)) > 0, (part, name)
    # of the log-variances too, through the sample
    assert (np.abs(parts["quant_conv"]["kernel"]).max(axis=0) > 0).all()


def test_remat_changes_no_gradient():
    stage, params = tiny("kl", dropout=0.5)
    remat, _ = tiny("kl", dropout=0.5, remat=True)
    expected = jax.tree.leaves(gradients(stage, "kl", params))
    ours = jax.tree.leaves(gradients(remat, "kl", params))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-6)


@pytest.mark.parametrize("kind,options", [("kl", {}), ("vq", {"dropout": 0.5})])
def test_sampling_and_dropout_act_in_training_alone(kind, options):
    stage, params = tiny(kind, **options)
    loss = evaluate(stage, kind)
    train = [loss(params, seed, True)[0] for seed in (0, 0, 1)]
    evaluation = [loss(params, seed, False)[0] for seed in (0, 1)]
    assert train[0] == train[1] != train[2]
    assert evaluation[0] == evaluation[1] != train[0]


def test_perplexity_counts_the_entries_in_use():
    of = jax.jit(perplexity, static_argnums=1)
    assert of(np.full((4, 8), 5), 16) == 1
    np.testing.assert_allclose(of(np.arange(32).reshape(4, 8) % 16, 16), 16, rtol=1e-5)


def test_faults_name_the_value_and_the_choices():
    stage, _ = tiny("kl")
    with pytest.raises(UserError, match="unknown trainable first stage 'identity'; one of kl, vq"):
        make_loss(stage, kind="identity")
    with pytest.raises(UserError, match="unknown pixel loss 'l11'; did you mean 'l1'.*l1, l2"):
        make_loss(stage, kind="kl", pixel="l11")
