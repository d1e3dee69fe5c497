"""A regression that trains in milliseconds: what the training code is tested with."""

import functools
import hashlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.train import averages, loop
from latent_diffusion_jax.train.checkpoint import Checkpointer
from latent_diffusion_jax.train.metrics import Writer
from latent_diffusion_jax.train.objective import from_loss, make_objective
from latent_diffusion_jax.train.optim import make_optimizer
from latent_diffusion_jax.train.sharding import make_mesh

OPTIM = {
    "name": "adamw",
    "lr": 1e-2,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "schedule": {"name": "constant"},
    "clip_norm": 1.0,
}
WIDTH = 256  # 16 x 256 stays whole, 256 x 512 is split over `fsdp`


def init_params(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "net": {
            "a": jax.random.normal(a, (16, WIDTH)) / 4,
            "b": jax.random.normal(b, (WIDTH, 512)) / 16,
            "bias": jnp.zeros((512,)),
        },
        "head": {"c": jax.random.normal(c, (512, 1)) / 23},
    }


def mean_loss(params, frozen, batch, key, train):
    """Mean over rows; independent of the key."""
    hidden = jnp.tanh(batch["x"] @ params["net"]["a"]) @ params["net"]["b"]
    out = jnp.tanh(hidden + params["net"]["bias"][None]) @ params["head"]["c"] * frozen["scale"]
    error = jnp.mean((out - batch["y"]) ** 2)
    return error, {"mse": error}


def noisy_loss(params, frozen, batch, key, train):
    """As above with noise, so that keys matter."""
    noise = 0.1 * jax.random.normal(key, batch["x"].shape)
    return mean_loss(params, frozen, {**batch, "x": batch["x"] + noise}, key, train)


FROZEN = {"scale": np.float32(1.5)}


def make(loss=noisy_loss, **options):
    tx, lr_at = make_optimizer(**OPTIM)
    return make_objective(
        init_params=init_params,
        criterion=from_loss(loss),
        optimizers={"net": tx, "head": tx},
        lr_at=lr_at,
        **{"ema_decay": 0.99, "ema_networks": ("net",), **options},
    )


def rows(index, size=16):
    key = np.random.default_rng(index)
    x = key.standard_normal((size, 16), np.float32)
    return {"x": x, "y": np.sin(x.sum(1, keepdims=True))}


class Batches:
    """Batch i follows from i alone."""

    def __init__(self, bad=()):
        self.index, self.bad = 0, bad

    def __next__(self):
        batch = rows(self.index)
        if self.index in self.bad:
            batch["x"][3, 5] = np.nan
        self.index += 1
        return batch

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


def train(workdir, *, steps, mesh, loss=noisy_loss, lengths=(), **options):
    """Runs the real loop in `workdir`, with objects of its own; `lengths` of averages to store."""
    stored = Checkpointer(averages.folder(str(workdir)), keep=None) if lengths else None
    if stored:
        options["snapshot"] = functools.partial(averages.write, stored, lengths=lengths)
    checkpointer = Checkpointer(str(workdir), keep=options.pop("keep", 3))
    every = {"log_every": 3, "eval_every": 0, "image_every": 0, "checkpoint_every": 4}
    arguments = {"batches": Batches(), "meta": {}, **every, **options}
    try:
        return loop.train(
            objective=make(loss, ema_lengths=lengths),
            frozen=FROZEN,
            mesh=mesh,
            checkpointer=checkpointer,
            writer=Writer(str(workdir)),
            key=jax.random.key(0),
            steps=steps,
            **arguments,
        )
    finally:
        checkpointer.close()
        if stored:
            stored.close()


def assert_same_bits(a, b):
    a, b = (jax.tree_util.tree_leaves_with_path(jax.device_get(tree)) for tree in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


class SlowBatches(Batches):
    """Leaves time for a kill to fall into any part of a step."""

    def __next__(self):
        time.sleep(0.02)
        return super().__next__()


def digest(tree):
    leaves = jax.tree.leaves(jax.device_get(tree))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def train_slowly(workdir):
    return train(
        workdir,
        steps=40,
        mesh=make_mesh(data=2),
        batches=SlowBatches(),
        log_every=1,
        checkpoint_every=3,
    )


if __name__ == "__main__":
    print(digest(train_slowly(sys.argv[1])))
