"""Phase 2's training against the original's: six steps of a class-conditional model."""

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.convert.compvis import CONDITIONING, UNET, write_tree
from latent_diffusion_jax.diffusion import objective as diffusion_objective
from tests.published import golden, nhwc, weights

ARRAYS, INFO = golden("train_ldm_class")
PREFIX = {"unet": UNET, "conditioning": CONDITIONING}
ADAM = INFO["optimizer"]
UNET_KEYS = (
    "model_channels",
    "attention_resolutions",
    "num_res_blocks",
    "channel_mult",
    "num_heads",
    "transformer_depth",
)


def config():
    """The run's; the latent is the image itself."""
    network, table = INFO["unet_params"], INFO["cond_stage"]["params"]
    return ConfigDict(
        dict(
            phase="diffusion",
            dtype="float32",
            data=dict(image_size=network["image_size"]),
            first_stage=dict(kind="identity", image_channels=network["in_channels"]),
            conditioning=dict(
                kind="label",
                num_classes=table["n_classes"],
                dim=table["embed_dim"],
                null_class=False,
            ),
            unet={key: network[key] for key in UNET_KEYS},
            diffusion=dict(schedule=dict(name="linear", **INFO["schedule"]), condition_dropout=0.0),
            latents=dict(source="online"),
            optim=dict(
                name="adamw",
                lr=ADAM["lr"],
                b1=ADAM["betas"][0],
                b2=ADAM["betas"][1],
                eps=ADAM["eps"],
                weight_decay=ADAM["weight_decay"],
                schedule=dict(name="constant"),
                clip_norm=0.0,
            ),
            train=dict(batch_size=4, ema_networks=("unet",)),
        )
    )


def statistics(params):
    """Mean, standard deviation, the first four values and the norm of each, by published key."""
    rows = {}
    for network, tree in params.items():
        for key, make in write_tree(tree, PREFIX[network]).items():
            x = np.asarray(make(), np.float64)
            rows[key] = [x.mean(), x.std(), *x.reshape(-1)[:4], np.linalg.norm(x)]
    return rows


def test_training_as_published(monkeypatch):
    """AdamW on the network and the class embedding, the average on the network alone."""
    objective = build.objective(config())
    shapes = jax.eval_shape(build.init_params(config()), jax.random.key(0))
    start = {network: weights(tree, PREFIX[network]) for network, tree in shapes.items()}
    frozen = {"first_stage": {}, "latent_scale": np.float32(1)}

    @jax.jit
    def step(state, batch, draws):
        monkeypatch.setattr(diffusion_objective, "draw", lambda *unused: draws)
        return objective.train_step(state, frozen, batch, jax.random.key(0))

    state = jax.jit(objective.start)(start, {"unet": start["unet"]}, jax.random.key(0))
    steps = zip(*(ARRAYS[name] for name in ("x", "cond", "t", "noise")), strict=True)
    losses, norms, moments = [], [], []
    for x, label, t, noise in steps:
        batch = {"image": nhwc(x), "label": label.astype(np.int32)}
        state, metrics = step(state, batch, (t, nhwc(noise)))
        losses.append(metrics["loss"])
        norms.append(np.hypot(metrics["grad_norm_unet"], metrics["grad_norm_conditioning"]))
        moments.append({n: optax.tree_utils.tree_get(s, "mu") for n, s in state.opt_state.items()})

    # ten times what the original's own float32 run is off by
    accuracy = {name: 10 * about["f32_max_abs_err"] for name, about in INFO["accuracy"].items()}
    expected = ARRAYS["out_losses"][:, 0]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=accuracy["losses"])
    expected = ARRAYS["out_grad_norms"]
    np.testing.assert_allclose(norms, expected, rtol=0, atol=accuracy["grad_norms"])

    names, gradients = INFO["param_names"], ARRAYS["out_grad0_stats"]
    found = statistics(moments[0])  # the first gradient, weighed by 1 - b1
    found = np.array([found[name] for name in names]) / (1 - ADAM["betas"][0])
    np.testing.assert_allclose(found, gradients, rtol=0, atol=accuracy["grad0_stats"])

    # where the gradient is nothing but rounding, Adam makes steps of the learning rate of it
    learning = dict(zip(names, gradients[:, -1] > 1e-6, strict=True))
    averaged = [f"model.{name}" for name in INFO["ema_names"]]
    for keys, params, expected in (
        (names, state.params, ARRAYS["out_param_stats"]),
        (averaged, state.ema, ARRAYS["out_ema_stats"]),
    ):
        found = statistics(params)
        assert found.keys() == set(keys)
        error = np.abs(np.array([found[key][:-1] for key in keys]) - expected)
        assert error.max() < INFO["steps"] * ADAM["lr"]
        assert error[[learning[key] for key in keys]].max() < 1e-5


def test_a_learned_logvar_is_a_network_of_its_own():
    own = config()
    own.diffusion.update(dict(learn_logvar=True, logvar_init=0.2))
    init = jax.jit(lambda key: build.init_params(own)(key)["logvar"])
    (table,) = jax.tree.leaves(init(jax.random.key(0)))
    np.testing.assert_array_equal(table, np.full(INFO["schedule"]["timesteps"], 0.2, np.float32))
    state = jax.eval_shape(build.objective(own).init, jax.random.key(0))
    assert state.params.keys() == state.opt_state.keys() == {"unet", "conditioning", "logvar"}
    assert state.ema.keys() == {"unet"}
