"""Class-conditional LDM-1, -2, -4 and -8 on the embedded coloured shapes: the sweep of f in small.

python -m latent_diffusion_jax encode --config=configs/diffusion/shapes_sweep.py:8 \\
    --workdir=runs/sweep/ldm8 --config.run.first_stage=runs/sweep/ae8
python -m latent_diffusion_jax train (the same arguments)

Arguments: `:1` (no first stage, nothing to encode), `:2`, `:4` (so without an argument) and `:8`,
on `configs/first_stage/shapes.py` with `:f2`, without an argument and with `:f8`; and `:tiny`, as
in `:8,tiny` (a smoke run).
The demo's UNet with half of its channels, the same for all f, at a constant learning rate, as in
section 4.1 of the paper; steps are fewer where they cost more. Averages are stored, so that quality
can be measured along the training. Run by `launch/experiments/compression.sh`; results:
docs/experiments.md.
"""

from configs import sections
from configs.diffusion import shapes
from configs.first_stage import shapes as first_stage

STEPS = {"1": 100, "2": 450, "4": 1_500, "8": 2_500}


def factor(f):
    """Changes of the config for an f."""
    network = {**first_stage.KL, "channel_mult": first_stage.FACTORS.get(f)}
    return {
        "first_stage": dict(kind="identity") if f == "1" else network,
        "latents.source": "online" if f == "1" else "cache",
        "run.steps": STEPS[f],
        "run.snapshot_every": STEPS[f] // 10,
    }


def get_config(arg=""):
    base = shapes.get_config()
    return sections.make(
        arg,
        {
            **{f: factor(f) for f in STEPS},
            "tiny": {
                **sections.TINY_RUN,
                "train.batch_size": 8,
                "unet.model_channels": 8,
                "unet.num_groups": 8,
                "data.source.size": 64,
                "sample.steps": 4,
            },
        },
        **{name: base[name] for name in ("phase", "first_stage", "diffusion", "latents")},
        # backgrounds alike: trainings this short learn the shapes, not which background there is
        data=sections.shapes(32, size=3_000, backgrounds=("dark",)),
        conditioning=dict(kind="label", num_classes=12, dim=64),
        unet={**base.unet, "model_channels": 32},
        optim=sections.adamw(1e-3, schedule=sections.warm_up(20)),
        train=sections.train(32, ema_networks=("unet", "conditioning"), ema_lengths=(0.05, 0.1)),
        sample=base.sample,
        run=sections.run(
            steps=STEPS["4"],
            log_every=50,
            eval_every=0,
            image_every=0,
            checkpoint_every=250,
            snapshot_every=STEPS["4"] // 10,
            first_stage="runs/sweep/ae4",
        ),
    )
