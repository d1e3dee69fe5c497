"""Class-conditional LDM-4 on the embedded coloured shapes at 32 pixels: phase 2 of the demo.

python -m latent_diffusion_jax encode --config=configs/diffusion/shapes.py \\
    --workdir=runs/shapes/ldm --config.run.first_stage=runs/shapes/ae
python -m latent_diffusion_jax train (the same arguments)

Arguments: `:vq` (on the VQ first stage), `:pixels` (f = 1, no first stage), `:tiny` (a smoke run).
The published architecture (spatial transformers, the class as one token of context), with few
channels. The paper has no such row; cost and quality reached are in the README.
"""

from configs import sections
from configs.first_stage import shapes as first_stage

STEPS = 1_700


def get_config(arg=""):
    return sections.make(
        arg,
        {
            "vq": {"first_stage": first_stage.VQ},
            "pixels": {"first_stage": dict(kind="identity"), "latents.source": "online"},
            "tiny": {
                **first_stage.TINY,
                **sections.TINY_RUN,
                "train.batch_size": 8,
                "unet.model_channels": 8,
                "unet.num_groups": 8,
                "data.source.size": 64,
                "latents.source": "online",
                "sample.steps": 4,
            },
        },
        phase="diffusion",
        data=sections.shapes(32),
        first_stage=first_stage.KL,
        conditioning=dict(kind="label", num_classes=12, dim=128),
        unet=dict(
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2,),
            num_heads=4,
            transformer_depth=1,
            num_groups=32,
            remat="none",
        ),
        diffusion=sections.diffusion(),
        latents=sections.latents("cache"),
        optim=sections.adamw(1e-3, schedule=sections.cosine(STEPS, 100)),
        train=sections.train(32),
        sample=sections.sample(scale=2.0, options=dict(eta=1.0)),
        run=sections.run(
            steps=STEPS,
            log_every=50,
            eval_every=500,
            image_every=1_000,
            checkpoint_every=500,
            eval_batches=8,
            first_stage="runs/shapes/ae",
        ),
    )
