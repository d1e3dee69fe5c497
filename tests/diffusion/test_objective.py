"""The phase-2 loss against published values, and the dropout of conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.cond import Cond, Conditioner, unconditional
from latent_diffusion_jax.diffusion import objective
from latent_diffusion_jax.diffusion.objective import (
    drop_condition,
    example_errors,
    init_logvar,
    loss_metrics,
    make_loss,
    prior_bits_per_dim,
    variational_weights,
)
from latent_diffusion_jax.diffusion.prediction import PREDICTIONS
from latent_diffusion_jax.diffusion.schedule import at, make_schedule
from latent_diffusion_jax.errors import UserError
from tests.published import golden

SCHEDULE = make_schedule(name="linear", linear_start=0.0015, linear_end=0.0195)
CLASSES = 10
LABELS = Conditioner(
    init=lambda key: {"table": jax.random.normal(key, [CLASSES + 1])},
    apply=lambda params, inputs: Cond(embedding=params["table"][inputs["label"]][:, None]),
    null=lambda params, inputs: {"label": jnp.full_like(inputs["label"], CLASSES)},
    inputs=lambda height, width: {"label": jax.ShapeDtypeStruct((), jnp.int32)},
)


def network(params, z_t, t, cond, key=None):
    shift = 0.0 if cond.embedding is None else cond.embedding[:, :, None, None]
    return params["scale"] * z_t + shift


def conditioning(conditioner):
    return dict(
        condition=lambda params, frozen, inputs: conditioner.apply(
            params.get("conditioning"), inputs
        ),
        null=lambda params, frozen, inputs: conditioner.null({}, inputs),
        keys=conditioner.keys,
    )


def loss_for(conditioner, **options):
    return make_loss(
        denoise_network=network,
        **conditioning(conditioner),
        latents=lambda frozen, batch, key: frozen * batch["z"],
        schedule=SCHEDULE,
        **options,
    )


def batch_of(size):
    z = jax.random.normal(jax.random.key(5), [size, 2, 2, 1])
    return {"z": z, "label": jnp.arange(size) % CLASSES}


def published_loss(monkeypatch, arrays, **options):
    """Our loss and metrics of the stored z, t and eps, with the stored network."""
    c = arrays["c"].reshape(-1, 1, 1, 1)
    monkeypatch.setattr(objective, "draw", lambda *keys: (arrays["t"], arrays["noise"]))
    loss_function = make_loss(
        denoise_network=lambda params, z_t, t, cond, key: (
            0.6 * z_t + 0.1 * jnp.sin(t / 100).reshape(-1, 1, 1, 1) + 0.05 * c
        ),
        **conditioning(unconditional()),
        latents=lambda frozen, batch, key: jnp.asarray(arrays["x0"]),
        schedule=SCHEDULE,
        **options,
    )
    params = {"unet": {}, "logvar": init_logvar(SCHEDULE, options.get("logvar_init", 0.0))}
    return loss_function(params, None, {}, jax.random.key(0), True)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("prediction", ["eps", "x0"])
@pytest.mark.parametrize("elbo_weight,learned", [(0.0, False), (0.1, False), (0.1, True)])
def test_loss_equals_published(monkeypatch, loss, prediction, elbo_weight, learned):
    arrays, _ = golden("diffusion_ops")
    logvar = dict(learn_logvar=True, logvar_init=0.2, l_simple_weight=0.7) if learned else {}
    options = dict(loss=loss, prediction=prediction, elbo_weight=elbo_weight, **logvar)
    found, metrics = published_loss(monkeypatch, arrays, **options)
    expected = arrays[f"out_loss_{loss}_{prediction}_elbo{elbo_weight}_logvar{learned:d}"]
    terms = dict(zip(("loss", "loss_simple", "loss_vlb"), expected, strict=True))
    np.testing.assert_allclose(found, terms["loss"], rtol=1e-5)
    assert elbo_weight == 0 or terms.keys() <= metrics.keys()
    for name in terms.keys() & metrics.keys():
        np.testing.assert_allclose(metrics[name], terms[name], rtol=1e-5, err_msg=name)


def test_a_logvar_that_is_not_learned_weighs_the_same(monkeypatch):
    arrays, _ = golden("diffusion_ops")
    weights = dict(logvar_init=0.2, l_simple_weight=0.7, elbo_weight=0.1)
    found, metrics = published_loss(monkeypatch, arrays, **weights)
    np.testing.assert_allclose(found, arrays["out_loss_l2_eps_elbo0.1_logvar1"][0], rtol=1e-5)
    assert "logvar" not in metrics


@pytest.mark.parametrize("prediction,suffix", [("eps", ""), ("x0", "_x0")])
@pytest.mark.parametrize(
    "case,name,rtol", [("txt2img", "linear", 5e-5), ("cosine", "cosine", 2e-4)]
)
def test_variational_weights_equal_published(case, name, rtol, prediction, suffix):
    """As far as float32 allows: neighbours of a table are subtracted, by them as well."""
    arrays, info = golden("schedules")
    options = {k: v for k, v in info["schedules"][case].items() if k != "beta_schedule"}
    found = variational_weights(make_schedule(name=name, **options), prediction)
    np.testing.assert_allclose(found, arrays[f"{case}/lvlb_weights{suffix}"], rtol=rtol)


def test_eps_and_v_have_the_same_bound():
    """The same network, told as eps and as v."""
    keys = jax.random.split(jax.random.key(0), 3)
    z, eps, output = (jax.random.normal(key, [999, 2, 2, 1]) for key in keys)
    t = jnp.arange(1, 1000)
    alpha, sigma = at(SCHEDULE, t, 4)

    def bound(prediction, network):
        errors = example_errors(network, SCHEDULE, z, t, eps, prediction=prediction, loss="l2")
        return variational_weights(SCHEDULE, prediction)[1:] * errors

    of_v = bound("v", lambda z_t, t: output)
    of_eps = bound("eps", lambda z_t, t: sigma * z_t + alpha * output)
    np.testing.assert_allclose(of_v, of_eps, rtol=1e-4)


def test_gradient_of_the_learned_logvar():
    """d/dlogvar mean(L / exp(logvar) + logvar) at 0 is mean(1 - L), at the drawn t alone."""
    loss_function = loss_for(unconditional(), learn_logvar=True)
    params = {"unet": {"scale": jnp.array(0.0)}, "logvar": init_logvar(SCHEDULE, 0.0)}
    gradient = jax.jit(jax.grad(loss_function, has_aux=True), static_argnums=4)
    found, metrics = gradient(params, 1.0, {"z": batch_of(64)["z"]}, jax.random.key(0), True)
    found = found["logvar"]["table"]["bias"]
    np.testing.assert_allclose(found.sum(), 1 - metrics["loss_simple"], rtol=1e-5)
    assert 32 < (found != 0).sum() <= 64


def test_bits_of_the_prior_are_the_published():
    arrays, _ = golden("diffusion_ops")
    found = prior_bits_per_dim(SCHEDULE, jnp.asarray(arrays["x0"]))
    np.testing.assert_allclose(found, arrays["out_prior_bpd"], rtol=1e-5)


@pytest.mark.parametrize("prediction,closed", [("eps", 1.0), ("x0", 4.0), ("v", None)])
def test_zero_network_leaves_the_power_of_the_target(prediction, closed):
    """E|eps|^2 = 1, E|z|^2 = 4, E|v|^2 = alpha^2 + 4 sigma^2 for z of variance 4."""
    keys = jax.random.split(jax.random.key(0))
    t = jnp.arange(1000)
    z, eps = (jax.random.normal(key, [1000, 8, 8, 1]) for key in keys)
    losses = example_errors(
        lambda z_t, t: jnp.zeros_like(z_t),
        SCHEDULE,
        2 * z,
        t,
        eps,
        prediction=prediction,
        loss="l2",
    )
    alpha, sigma = at(SCHEDULE, t)
    expected = closed or float((alpha**2 + 4 * sigma**2).mean())
    np.testing.assert_allclose(losses.mean(), expected, rtol=0.025)  # 4 standard errors


def test_below_every_snr_gamma_is_a_factor_on_the_error_of_x0():
    params, batch = {"unet": {"scale": jnp.array(0.3)}}, {"z": batch_of(64)["z"]}
    gamma = 1e-9

    def loss(**options):
        function = loss_for(unconditional(), prediction="x0", **options)
        return function(params, 1.0, batch, jax.random.key(1), True)[0]

    found = loss(weighting="min_snr", min_snr_gamma=gamma)
    np.testing.assert_allclose(found, gamma * loss(weighting="uniform"), rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_loss_is_differentiable_and_reports_itself(prediction, weighting):
    loss_function = loss_for(LABELS, prediction=prediction, weighting=weighting)
    params = {"unet": {"scale": jnp.array(0.3)}, "conditioning": LABELS.init(jax.random.key(0))}
    value = jax.jit(jax.value_and_grad(loss_function, has_aux=True), static_argnums=4)
    (loss, metrics), grads = value(params, 1.0, batch_of(64), jax.random.key(1), True)
    assert metrics["loss"] == loss > 0
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert sorted(metrics) == ["loss", "loss_t0", "loss_t1", "loss_t2", "loss_t3"]
    assert all(jnp.isfinite(metric) and metric.shape == () for metric in metrics.values())


def test_draws_depend_on_the_key_alone():
    loss_function = jax.jit(loss_for(unconditional()), static_argnums=4)
    params, batch = {"unet": {"scale": jnp.array(0.3)}}, {"z": batch_of(64)["z"]}
    first, again, other = (
        loss_function(params, 1.0, batch, jax.random.key(seed), True)[0] for seed in (0, 0, 1)
    )
    assert first == again != other


def test_times_and_noise_cover_their_distributions():
    """A network that returns its inputs shows what the loss fed it."""
    seen = {}

    def spy(params, z_t, t, cond, key):
        seen.update(t=t, z_t=z_t)
        return jnp.zeros_like(z_t)

    loss_function = make_loss(
        denoise_network=spy,
        **conditioning(unconditional()),
        latents=lambda frozen, batch, key: jnp.zeros([20_000, 1, 1, 1]),
        schedule=SCHEDULE,
    )
    loss_function({"unet": {}}, None, {}, jax.random.key(0), True)
    t = np.asarray(seen["t"])
    assert t.min() == 0
    assert t.max() == 999
    quarters = np.bincount(t // 250) / len(t)
    np.testing.assert_allclose(quarters, 0.25, atol=4 * np.sqrt(0.1875 / len(t)))
    eps = seen["z_t"].ravel() / at(SCHEDULE, t)[1]
    assert abs(eps.mean()) < 4 / np.sqrt(len(t))
    assert abs(eps.var() - 1) < 4 * np.sqrt(2 / len(t))
    assert abs(np.corrcoef(eps, t)[0, 1]) < 4 / np.sqrt(len(t))


def test_the_network_has_a_dropout_key_in_training_alone():
    keys = []

    def spy(params, z_t, t, cond, key):
        keys.append(key)
        return jnp.zeros_like(z_t)

    loss_function = make_loss(
        denoise_network=spy,
        **conditioning(unconditional()),
        latents=lambda frozen, batch, key: batch["z"],
        schedule=SCHEDULE,
    )
    for seed, train in ((0, True), (0, True), (1, True), (0, False)):
        loss_function({"unet": {}}, None, batch_of(2), jax.random.key(seed), train)
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] is None


def seen_labels(train, rate, size=4000):
    seen = []

    def apply(params, inputs):
        seen.append(inputs["label"])
        return Cond()

    loss_function = loss_for(LABELS._replace(apply=apply), condition_dropout=rate)
    params = {"unet": {"scale": jnp.array(0.3)}}
    loss_function(params, 1.0, batch_of(size), jax.random.key(0), train)
    return np.asarray(seen[0]), np.asarray(batch_of(size)["label"])


def test_conditions_are_dropped_at_the_rate_in_training():
    seen, given = seen_labels(train=True, rate=0.1)
    dropped = seen == CLASSES
    assert abs(dropped.mean() - 0.1) < 4 * np.sqrt(0.09 / len(seen))
    np.testing.assert_array_equal(seen[~dropped], given[~dropped])


@pytest.mark.parametrize("train,rate", [(False, 1.0), (True, 0.0)])
def test_conditions_are_kept_in_evaluation_and_at_rate_0(train, rate):
    np.testing.assert_array_equal(*seen_labels(train, rate))


def test_rate_1_is_the_null_condition():
    params = {"unet": {"scale": jnp.array(0.3)}, "conditioning": LABELS.init(jax.random.key(0))}
    batch, key = batch_of(64), jax.random.key(2)
    dropped, _ = loss_for(LABELS, condition_dropout=1.0)(params, 1.0, batch, key, True)
    null_batch = batch | LABELS.null({}, {"label": batch["label"]})
    expected, _ = loss_for(LABELS)(params, 1.0, null_batch, key, False)
    assert dropped == expected


def test_all_inputs_of_an_example_drop_together():
    inputs = {"tokens": jnp.ones([200, 7], jnp.int32), "image": jnp.ones([200, 2, 2, 3])}
    null = jax.tree.map(jnp.zeros_like, inputs)
    out = drop_condition(jax.random.key(0), inputs, null, 0.5)
    assert out["tokens"].dtype == jnp.int32
    kept = np.asarray(out["tokens"][:, 0])
    assert 0 < kept.mean() < 1
    np.testing.assert_array_equal(out["tokens"], np.repeat(kept[:, None], 7, axis=1))
    np.testing.assert_array_equal(out["image"].reshape(200, 12), np.repeat(kept[:, None], 12, 1))


def test_metrics_by_quarter_of_t():
    losses, t = jnp.array([1.0, 3.0, 5.0, 7.0]), jnp.array([0, 249, 250, 999])
    metrics = loss_metrics(losses, t, 1000)
    expected = {"loss": 4.0, "loss_t0": 2.0, "loss_t1": 5.0, "loss_t2": 4.0, "loss_t3": 7.0}
    assert {name: float(value) for name, value in metrics.items()} == expected  # t2 is empty


@pytest.mark.parametrize(
    "options,message",
    [
        ({"prediction": "noise"}, "unknown prediction"),
        ({"loss": "l3"}, "unknown loss"),
        ({"min_snr_gamma": 0}, "min_snr_gamma 0 must be above 0"),
        ({"weighting": "min_snt"}, "did you mean 'min_snr'"),
        ({"loss": "l1", "weighting": "min_snr"}, "squared errors"),
        ({"condition_dropout": -0.1}, "-0.1"),
        ({"elbo_weight": -0.2}, "-0.2"),
        ({"l_simple_weight": -0.3}, "-0.3"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(UserError, match=message):
        loss_for(unconditional(), **options)
