"""Every task of the paper on scenes of coloured shapes at 64 pixels, LDM-4: phase 2.

python -m latent_diffusion_jax encode --config=configs/diffusion/shapes64.py:text \\
    --workdir=runs/shapes64/text --config.run.first_stage=runs/shapes64/ae
python -m latent_diffusion_jax train (the same arguments)

Arguments, one of: `:unconditional`, `:text`, `:layout`, `:semantic`, `:superres`, `:superres_bsr`,
`:inpainting` (without `encode`: its masked images are encoded in each step); without one, the class
of the largest shape. And `:tiny` (a smoke run), as in `:text,tiny`. A fifth of all captions never
occurs in training. Cost and quality reached: docs/tasks.md.
"""

from configs import sections, tasks
from configs.first_stage import shapes64 as first_stage

STEPS = 2_400
SHORT = {"run.steps": 1_200, "optim.schedule.max_decay_steps": 1_200}  # conditions that say most


def get_config(arg=""):
    return tasks.make(
        arg,
        {
            "text": {
                **tasks.TASKS["text"],
                "data.source.shapes": (1, 2),
                "data.source.held_out": 0.2,
            },
            "semantic": {**tasks.TASKS["semantic"], **SHORT},
            "superres": {**tasks.TASKS["superres"], **SHORT},
            "superres_bsr": {**tasks.TASKS["superres_bsr"], **SHORT},
            "inpainting": {**tasks.TASKS["inpainting"], **SHORT, "latents.source": "online"},
            "tiny": {
                "latents.source": "online",
                "first_stage.channels": 8,
                "first_stage.channel_mult": (1, 1, 1),
                **sections.TINY_RUN,
                "train.batch_size": 8,
                "unet.model_channels": 8,
                "unet.num_groups": 4,
                "data.source.size": 64,
                "sample.steps": 4,
            },
        },
        phase="diffusion",
        data=sections.shapes(64, shapes=(1, 3)),
        first_stage=first_stage.NETWORK,
        conditioning=dict(kind="label", num_classes=12, dim=128),
        unet=dict(
            model_channels=48,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(2, 4),
            num_heads=4,
            transformer_depth=1,
            num_groups=16,
        ),
        diffusion=sections.diffusion(prediction="v"),  # what is where is decided at much noise
        latents=sections.latents("cache"),
        optim=sections.adamw(1e-3, schedule=sections.cosine(STEPS, 100)),
        train=dict(batch_size=32, accumulate=1, ema_decay=0.9999, ema_networks=("unet",)),
        sample=sections.sample(scale=2.0, options=dict(eta=1.0)),
        run=sections.run(
            steps=STEPS,
            log_every=50,
            eval_every=500,
            image_every=1_000,
            checkpoint_every=250,
            eval_batches=8,
            first_stage="runs/shapes64/ae",
        ),
    )
