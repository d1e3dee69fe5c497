"""Class-conditional LDM-4 on a folder of your own images at 64 pixels: phase 2.

python -m latent_diffusion_jax encode --config=configs/diffusion/folder64.py \\
    --workdir=runs/mine/ldm --config.data.source.path=DIR \\
    --config.conditioning.num_classes=N --config.run.first_stage=runs/mine/ae
python -m latent_diffusion_jax train (the same arguments)

Without an argument, the class of each image. Arguments: `:unconditional` (no label needed), `:text`
(captions), `:layout` (objects in boxes), `:semantic` (segmentation maps), `:superres`,
`:superres_bsr`, `:inpainting` (images alone); `:vq` (on the VQ first stage), `:tiny` (a smoke run).
Captions, boxes and maps are those of a `metadata.jsonl`: see latent_diffusion_jax/data/folder.py;
set `conditioning.num_classes` to the number of classes. See docs/emoji.md for a run with its cost
and pictures. Sized for a CPU: on a GPU raise `unet.model_channels` and `train.batch_size`.
"""

from configs import sections, tasks
from configs.first_stage import folder64 as first_stage

STEPS = 2_500


def get_config(arg=""):
    return tasks.make(
        arg,
        {
            "vq": {"first_stage": first_stage.VQ},
            "tiny": {
                **first_stage.TINY,
                **sections.TINY_RUN,
                "train.batch_size": 8,
                "unet.model_channels": 8,
                "unet.num_groups": 8,
                "latents.source": "online",
                "sample.steps": 4,
            },
        },
        phase="diffusion",
        data=sections.folder(64),
        first_stage=first_stage.KL,
        conditioning=dict(kind="label", num_classes=10, dim=128),
        unet=dict(
            model_channels=64,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            attention_resolutions=(2, 4),
            num_heads=4,
            transformer_depth=1,
            num_groups=32,
            remat="none",
        ),
        diffusion=sections.diffusion(),
        latents=sections.latents("cache"),
        optim=sections.adamw(5e-4, schedule=sections.cosine(STEPS, 100)),
        train=sections.train(32),
        sample=sections.sample(scale=2.0, options=dict(eta=1.0)),
        run=sections.run(
            steps=STEPS,
            log_every=50,
            eval_every=500,
            image_every=500,
            checkpoint_every=250,
            eval_batches=4,
        ),
    )
