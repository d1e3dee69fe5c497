"""Class-conditional LDM-4 of 16 M parameters at 64 pixels: what `bench --size=S` measures, phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/bench.py --workdir=runs/bench/ldm \\
    --config.run.first_stage=runs/bench/ae

Argument: `:tiny` (a smoke run). The published architecture on latents of 16 x 16 x 4. Made to be
timed, not trained: nothing is known of its quality.
"""

from configs import sections
from configs.first_stage import bench as first_stage


def get_config(arg=""):
    return sections.make(
        arg,
        {
            "tiny": {
                **first_stage.TINY,
                **sections.TINY_RUN,
                "train.batch_size": 8,
                "unet.model_channels": 8,
                "unet.channel_mult": (1, 2),
                "unet.num_groups": 8,
                "sample.steps": 4,
            },
        },
        phase="diffusion",
        data=sections.shapes(64),
        first_stage=first_stage.NETWORK,
        conditioning=dict(kind="label", num_classes=12, dim=128),
        unet=dict(
            model_channels=64,
            channel_mult=(1, 2, 4),
            num_res_blocks=1,
            attention_resolutions=(2, 4),
            num_heads=4,
            transformer_depth=1,
            num_groups=32,
            remat="none",
        ),
        diffusion=sections.diffusion(),
        latents=sections.latents(scale=1.0),
        optim=sections.adamw(1e-4),
        train=sections.train(16),
        sample=sections.sample(scale=2.0),
        run=sections.run(steps=1_000),
    )
