"""What phase 1 minimises, worked out by hand, and where its gradients go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.adversary import make_adversary
from latent_diffusion_jax.first_stage.losses import hinge, nll_sum, use_of_codes
from latent_diffusion_jax.first_stage.objective import make_criterion
from latent_diffusion_jax.first_stage.quality import quality, signs_of_trouble
from latent_diffusion_jax.first_stage.stage import make_first_stage
from latent_diffusion_jax.train.objective import make_objective
from latent_diffusion_jax.train.optim import make_optimizer
from tests.train import toy

IMAGE = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 3)).astype(np.float32)
LARGER = np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)
KINDS = {"kl": {}, "vq": {"codebook_size": 16}}
PIXEL = {"l1": np.abs, "l2": np.square}
VQ_TERMS = dict(codebook_weight=0.7, beta=0.25, legacy=False)
KEY = jax.random.key(0)


def tiny(kind, **options):
    """A first stage of f = 1, and parameters far from their initial values."""
    network = dict(
        channels=4, channel_mult=(1,), num_res_blocks=1, z_channels=3, embed_dim=2, num_groups=2
    )
    stage = make_first_stage(kind=kind, **{**KINDS[kind], **network, **options})
    random = np.random.default_rng(1)
    return stage, jax.tree.map(
        lambda x: random.normal(0, 0.5, x.shape).astype(np.float32),
        jax.eval_shape(stage.init, KEY),
    )


def criterion(stage, kind, **terms):
    return make_criterion(stage, kind=kind, **{"perceptual_weight": 0.0, **terms})


def train_metrics(stage, kind, params, seed=0, **terms):
    """(gradients, metrics) of a training step's batch."""
    (gradients,) = criterion(stage, kind, **terms).gradients

    def call(params, key):
        return gradients({"autoencoder": params}, {}, {}, {"image": IMAGE}, key, 0)[1:]

    found, metrics = jax.jit(call)(params, jax.random.key(seed))
    return found["autoencoder"], metrics


def evaluated(stage, kind, params, seed=0, image=IMAGE, **terms):
    evaluate = criterion(stage, kind, **terms).evaluate

    def call(params, key):
        return evaluate({"autoencoder": params}, {}, {}, {"image": image}, key)

    return jax.jit(call)(params, jax.random.key(seed))


@pytest.mark.parametrize("kind,pixel", [("kl", "l1"), ("kl", "l2"), ("vq", "l1"), ("vq", "l2")])
def test_loss_and_metrics_by_hand(kind, pixel):
    stage, params = tiny(kind)
    terms = dict(kl_weight=0.1) if kind == "kl" else VQ_TERMS
    metrics = evaluated(stage, kind, params, pixel=pixel, **terms)
    moments = jax.jit(stage.encode)(params, IMAGE)
    z = stage.mode(moments)
    image_hat = np.asarray(jax.jit(stage.decode)(params, z))
    error = (IMAGE - image_hat).astype(np.float64)
    clipped = np.clip(IMAGE, -1, 1) - np.clip(image_hat, -1, 1).astype(np.float64)
    psnr = 10 * np.log10(4 / np.mean(clipped**2, axis=(1, 2, 3)))
    expected = dict(l1=np.abs(error).mean(), psnr=psnr.mean(), rec=PIXEL[pixel](error).mean())
    expected |= dict(z_mean=z.mean((0, 1, 2)), z_std=z.std((0, 1, 2)))
    if kind == "kl":
        mean, logvar = np.split(np.asarray(moments, np.float64), 2, axis=-1)
        expected["kl"] = 0.5 * np.sum(mean**2 + np.exp(logvar) - 1 - logvar) / 3
        # both summed over an image
        expected["nll"] = PIXEL[pixel](error).sum() / 3
        expected["loss"] = expected["nll"] + 0.1 * expected["kl"]
    else:
        entries = params["quantize"]["embedding"]["embedding"]
        distances = np.square(np.asarray(z, np.float64)[..., None, :] - entries).sum(axis=-1)
        expected["codebook"] = 1.25 * distances.min(axis=-1).mean() / stage.channels
        expected["codes"] = np.bincount(distances.argmin(axis=-1).ravel(), minlength=16) / 48
        # both means over everything
        expected["nll"] = PIXEL[pixel](error).mean()
        expected["loss"] = expected["nll"] + 0.7 * expected["codebook"]
    assert metrics.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_loss_and_reach_every_part(kind):
    stage, params = tiny(kind)
    parts, metrics = train_metrics(stage, kind, params)
    regulariser = {"kl": "kl", "vq": "codebook"}[kind]

    def loss(params):  # the same, by differentiating the whole at once
        moments = stage.encode(params, IMAGE)
        if kind == "kl":
            z = stage.sample(moments, jax.random.split(KEY, 3)[0])
        else:
            z = stage.autoencoder.apply({"params": params}, moments, method="quantized").z
        image_hat = stage.autoencoder.apply({"params": params}, z, method="decode")
        error = jnp.abs(IMAGE - image_hat)
        return jnp.sum(error) / 3 if kind == "kl" else jnp.mean(error)

    assert metrics[regulariser] > 0
    expected = jax.jit(jax.grad(loss))(params)["decoder"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * abs(b).max()),
        parts["decoder"],
        expected,
    )
    codebook = {"quantize"} if kind == "vq" else set()
    assert parts.keys() == {"encoder", "decoder", "quant_conv", "post_quant_conv"} | codebook
    for part, modules in parts.items():
        for name, module in modules.items():
            assert max(jnp.abs(x).max() for x in jax.tree.leaves(module)) > 0, (part, name)
    # of the log-variances too, through the sample
    assert (np.abs(parts["quant_conv"]["kernel"]).max(axis=0) > 0).all()


def test_remat_changes_no_gradient():
    stage, params = tiny("kl", dropout=0.5)
    remat, _ = tiny("kl", dropout=0.5, remat="full")
    expected = jax.tree.leaves(train_metrics(stage, "kl", params)[0])
    ours = jax.tree.leaves(train_metrics(remat, "kl", params)[0])
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize("kind,options", [("kl", {}), ("vq", {"dropout": 0.5})])
def test_sampling_and_dropout_act_in_training_alone(kind, options):
    stage, params = tiny(kind, **options)
    train = [train_metrics(stage, kind, params, seed)[1]["loss"] for seed in (0, 0, 1)]
    evaluation = [evaluated(stage, kind, params, seed)["loss"] for seed in (0, 1)]
    assert train[0] == train[1] != train[2]
    assert evaluation[0] == evaluation[1] != train[0]


def objective(stage, kind, adversary, **terms):
    tx, _ = make_optimizer(
        name="adam",
        lr=1e-3,
        b1=0.5,
        b2=0.9,
        eps=1e-8,
        schedule={"name": "constant"},
        clip_norm=0.0,
    )

    def init_params(key):
        _, params = tiny(kind, channel_mult=(1, 1))
        return {"autoencoder": params, "discriminator": adversary.init(key)[0]}

    return make_objective(
        init_params=init_params,
        criterion=criterion(stage, kind, adversary=adversary, **terms),
        optimizers={"autoencoder": tx, "discriminator": tx},
    )


@pytest.mark.parametrize("second_forward", [False, True])
def test_before_its_start_the_adversary_changes_nothing(second_forward):
    stage, _ = tiny("kl", channel_mult=(1, 1))
    adversary = make_adversary(
        channels=4, num_layers=2, start=1, second_forward=second_forward, weight=0.5
    )
    made = objective(stage, "kl", adversary)
    step = jax.jit(made.train_step)
    start = made.init(KEY)
    first, metrics = step(start, {}, {"image": LARGER}, KEY)
    toy.assert_same_bits(first.params["discriminator"], start.params["discriminator"])
    assert metrics["discriminator_factor"] == 0
    assert metrics["loss"] == metrics["nll"] + 1e-6 * metrics["kl"]
    second, metrics = step(first, {}, {"image": LARGER}, KEY)
    assert metrics["discriminator_factor"] == 1
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()),
        second.params["discriminator"],
        first.params["discriminator"],
    )
    assert min(jax.tree.leaves(moved["main.0"])) > 0
    # the weight makes the adversarial gradient at the last kernel as large as the other, halved
    assert metrics["adaptive_weight"] > 0
    total = metrics["nll"] + 1e-6 * metrics["kl"]
    total += metrics["adaptive_weight"] * metrics["generator_loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


def test_running_statistics_count_each_pass():
    """Reconstructions and images, once each; as published, reconstructions twice."""
    stage, _ = tiny("kl", channel_mult=(1, 1))
    found = {}
    for second_forward in (False, True):
        adversary = make_adversary(channels=4, num_layers=2, second_forward=second_forward)
        made = objective(stage, "kl", adversary)
        state, _ = jax.jit(made.train_step)(made.init(KEY), {}, {"image": LARGER}, KEY)
        found[second_forward] = state.buffers["discriminator"]["main.3"]["var"]
    # var starts at 1 and forgets a tenth with each pass; what it takes up is about 1e-2 here
    assert 0.81 < found[False].mean() < 0.9
    assert 0.729 < found[True].mean() < 0.81


def test_the_second_reconstruction_is_of_the_updated_autoencoder():
    stage, params = tiny("kl", channel_mult=(1, 1))
    adversary = make_adversary(channels=4, num_layers=2, second_forward=True)
    turns = criterion(stage, "kl", adversary=adversary).gradients
    variables = adversary.init(KEY)
    buffers = {"discriminator": variables[1]}

    def logits(params):
        both = {"autoencoder": params, "discriminator": variables[0]}
        return turns[1](both, buffers, {}, {"image": LARGER}, KEY, 0)[2]["logits_fake"]

    other = jax.tree.map(lambda x: 1.1 * x, params)
    assert logits(params) == logits(params) != logits(other)


def test_codes_that_are_not_used_start_again_from_latents():
    stage, params = tiny("vq")
    entries = np.full((16, 2), 50.0, np.float32)  # all but one are far from every latent
    entries[3] = 0
    params = {**params, "quantize": {"embedding": {"embedding": jnp.asarray(entries)}}}
    made = criterion(stage, "vq", restart_after=2)
    (gradients,) = made.gradients
    buffers = made.init_buffers()
    both = {"autoencoder": params}
    step = jax.jit(lambda *args: gradients(*args, {}, {"image": IMAGE}, KEY, 0)[0])
    after = []
    for _ in range(2):
        both, buffers = made.revise(both, step(both, buffers))
        after.append(np.asarray(both["autoencoder"]["quantize"]["embedding"]["embedding"]))
    np.testing.assert_array_equal(after[0], entries)
    z = np.asarray(jax.jit(stage.encode)(params, IMAGE)).reshape(-1, 2)
    np.testing.assert_array_equal(after[1][3], entries[3])
    for entry in np.delete(after[1], 3, axis=0):
        assert np.abs(z - entry).max(axis=1).min() < 1e-5
    assert (buffers["codebook"]["idle"] == 0).all()


def test_use_of_codes():
    of = jax.jit(use_of_codes)
    one = of(np.eye(16)[5])
    assert (one["perplexity"], one["codes_used"]) == (1, 1)
    even = of(np.full(16, 1 / 16))
    np.testing.assert_allclose((even["perplexity"], even["codes_used"]), (16, 16), rtol=1e-5)


def test_quality_of_known_pairs():
    black = np.full((2, 16, 16, 3), -1, np.float32)
    grey = black + np.float32([0.2, 0.4]).reshape(2, 1, 1, 1)  # 0.1 and 0.2 of the range
    found = quality(black, grey)
    np.testing.assert_allclose(found["psnr"], (20 + 20 * np.log10(5)) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["l1"], 0.3, rtol=1e-5)
    c1 = 0.01**2  # constant images: only the means count
    np.testing.assert_allclose(
        found["ssim"], np.mean([c1 / (0.01 + c1), c1 / (0.04 + c1)]), rtol=1e-3
    )
    beyond = quality(black, black - 3)  # what is out of range is clipped before it is compared
    assert (beyond["psnr"], beyond["ssim"]) == (np.inf, 1)
    assert "ssim" not in quality(black[:, :8], grey[:, :8])


def test_weights_of_images_and_hinge():
    error = np.stack([np.full((2, 2, 3), 1.0), np.full((2, 2, 3), 3.0)]).astype(np.float32)
    assert nll_sum(error) == 24
    assert nll_sum(error, weights=jnp.float32([1, 0])) == 6
    np.testing.assert_allclose(nll_sum(error, 0.5), 24 / np.exp(0.5) + 6, rtol=1e-6)
    assert hinge(jnp.float32([2.0]), jnp.float32([-3.0])) == 0
    assert hinge(jnp.float32([0.0]), jnp.float32([0.0])) == 1


def test_signs_of_trouble():
    good = dict(
        discriminator_factor=1, discriminator_loss=0.8, logits_real=0.1, logits_fake=0, perplexity=9
    )
    assert not signs_of_trouble(good, 512)
    won = {**good, "discriminator_loss": 0.02, "logits_real": 3.0, "logits_fake": -2.5}
    line = signs_of_trouble(won, None)["discriminator"]
    assert "has won (loss 0.02, logits 3 real, -2.5 reconstructed)" in line
    assert not signs_of_trouble({**won, "discriminator_factor": 0}, None)
    assert "perplexity 2 of 512" in signs_of_trouble({**good, "perplexity": 2.0}, 512)["codebook"]
    assert not signs_of_trouble({}, None)


def test_faults_name_the_value_and_the_choices():
    stage, _ = tiny("kl")
    with pytest.raises(UserError, match="unknown trainable first stage 'identity'; one of kl, vq"):
        make_criterion(stage, kind="identity")
    with pytest.raises(UserError, match="unknown pixel loss 'l11'; did you mean 'l1'.*l1, l2"):
        make_criterion(stage, kind="kl", pixel="l11")
    with pytest.raises(UserError, match="restart_after=5: first stage 'kl' has no codebook"):
        make_criterion(stage, kind="kl", restart_after=5)
