"""Pieces that several configs share. A config is a dict of literals; its docstring documents it.

Sections: `phase`, `seed`, `dtype` (of the computation); `data`; the networks (`first_stage`,
`discriminator`, `conditioning`, `unet`); the loss (`loss` | `diffusion`, `latents`); `optim`,
`train`, `mesh`; `sample` (previews, and the defaults of the verb); and `run`: how long, how often
and from where, which may change when a run is resumed.
"""

from ml_collections import ConfigDict, config_dict

from latent_diffusion_jax.errors import choose


def make(arg, variants, **sections):
    """The config of `sections`, changed by the variants that `arg` names: "tiny", or "vq,tiny".

    A variant is dotted key -> value, or a function from the config so far to that.
    """
    mesh = dict(data=-1, fsdp=1, slices=0)
    config = ConfigDict(dict(seed=0, dtype="float32", mesh=mesh, **sections))
    for word in filter(None, arg.split(",")):
        changes = choose("config argument", word, variants)
        with config.unlocked():
            for key, value in (changes(config) if callable(changes) else changes).items():
                section, _, name = key.rpartition(".")
                target = config
                for part in filter(None, section.split(".")):
                    target = target[part]
                target[name] = value
    return config


def shapes(image_size, **changes):
    """The embedded data set."""
    source = dict(
        name="shapes",
        image_size=image_size,
        size=10_000,
        seed=0,
        shapes=(1, 1),
        backgrounds=("dark", "light"),
    )
    return dict(source={**source, **changes}, image_size=image_size, crop="center", flip=False)


def folder(image_size, crop="random", flip=True, **more):
    """A folder of images: --config.data.source.path=DIR; `more` as `tokenizer`, of captions."""
    source = dict(name="folder", path="", unreadable="error", validation_fraction=0.05)
    return dict(source=source, image_size=image_size, crop=crop, flip=flip, **more)


def adam(lr, **changes):
    """The first stages' optimiser, as published."""
    section = dict(name="adam", lr=lr, b1=0.5, b2=0.9, eps=1e-8, clip_norm=0.0)
    return {**section, "schedule": dict(name="constant"), **changes}


def adamw(lr, **changes):
    """The diffusion models' optimiser, as published: PyTorch's defaults."""
    section = dict(
        name="adamw", lr=lr, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=0.0
    )
    return {**section, "schedule": dict(name="constant"), **changes}


def adafactor(lr, **changes):
    """Far less memory than Adam's moments; `adamw(lr, mu_dtype="bfloat16")` is between the two."""
    section = dict(name="adafactor", lr=lr, clip_norm=0.0)
    return {**section, "schedule": dict(name="constant"), **changes}


def cosine(steps, warm_up_steps):
    """From 0 to the base rate and back to 1 % of it."""
    return dict(
        name="warmup_cosine",
        warm_up_steps=warm_up_steps,
        lr_start=0.0,
        lr_max=1.0,
        lr_min=0.01,
        max_decay_steps=steps,
    )


def warm_up(steps):
    """From 1e-6 of the base rate to the base rate, which stays."""
    return dict(
        name="warmup_linear",
        warm_up_steps=steps,
        f_start=1e-6,
        f_max=1.0,
        f_min=1.0,
        cycle_length=1e13,
    )


NO_DISCRIMINATOR = dict(kind="none")


def discriminator(lr, start, weight, **changes):
    """The patch discriminator and its part, as published; from step `start` on."""
    section = dict(
        kind="patch",
        channels=64,
        num_layers=3,
        loss="hinge",
        start=start,
        weight=weight,
        factor=1.0,
        second_forward=False,
        optim=adam(lr),
    )
    return {**section, **changes}


def linear(linear_start, linear_end):
    """The published noise schedule between two betas."""
    return dict(name="linear", timesteps=1000, linear_start=linear_start, linear_end=linear_end)


def diffusion(**changes):
    """The published objective, and the condition dropout that guidance needs."""
    section = dict(
        schedule=linear(0.0015, 0.0195),
        prediction="eps",
        loss="l2",
        weighting="uniform",
        condition_dropout=0.1,
    )
    return {**section, **changes}


def latents(source="online", scale=None, variants=1):
    """ "online" (encoded in each step) or "cache" (see the verb `encode`); scale None: measured.

    `encode` stores `variants` of each training image: 1 is cut centrally and not mirrored, more are
    each cut and mirrored anew, as section `data` says, and taken in turn, one in each epoch.
    """
    scale = config_dict.placeholder(float) if scale is None else scale
    return dict(source=source, scale=scale, variants=variants)


def train(batch_size, **changes):
    """Averages of the UNet's weights, as published.

    With `ema_lengths=(0.05, 0.1)`, others instead, which `run.snapshot_every` stores: of them
    averages of any length can be made later (docs/ema.md).
    """
    section = dict(
        batch_size=batch_size,
        accumulate=1,
        ema_decay=0.9999,
        ema_networks=("unet",),
        ema_lengths=(),
    )
    return {**section, **changes}


def sample(scale, **changes):
    """50 DDIM steps with guidance; eta 0 is deterministic, eta 1 forgives a short training more."""
    section = dict(
        sampler="ddim", options=dict(eta=0.0), steps=50, timesteps="uniform", scale=scale
    )
    return {**section, **changes}


def run(**changes):
    """In steps; `profile` is the first and the last of a trace. Where what is not trained comes
    from: phase 1 reads LPIPS from files (`lpips`), phase 2 takes weights from workdirs
    (`first_stage`, `conditioning`).
    """
    section = dict(
        steps=100_000,
        log_every=100,
        eval_every=5_000,
        image_every=5_000,
        checkpoint_every=5_000,
        snapshot_every=1_000,
        eval_batches=16,
        keep=3,
        max_skipped=10,
        profile=(0, 0),
        lpips="",
        first_stage="",
        conditioning="",
    )
    return {**section, **changes}


TINY_RUN = {
    "run.steps": 4,
    "run.log_every": 1,
    "run.eval_every": 2,
    "run.image_every": 2,
    "run.checkpoint_every": 2,
    "run.snapshot_every": 2,
    "run.eval_batches": 1,
}
