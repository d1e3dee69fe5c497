"""Every task of the paper on scenes of coloured shapes at 64 pixels: phase 2.

python -m latent_diffusion_jax encode --config=configs/diffusion/shapes64.py:text \\
    --workdir=runs/shapes64/text --config.run.first_stage=runs/shapes64/f8
python -m latent_diffusion_jax train (the same arguments)

Arguments, one of: `:unconditional`, `:text`, `:layout`, without one the class of the largest shape:
LDM-8. Or `:semantic`, `:superres`, `:superres_bsr`, `:inpainting`: LDM-4, as in the paper, on the
first stage `runs/shapes64/f4` (inpainting without `encode`: its masked images are encoded in each
step). And `:tiny` (a smoke run), as in `:text,tiny`. A fifth of all captions never occurs in
training. Cost and quality reached: docs/tasks.md.
"""

from configs import sections, tasks
from configs.first_stage import shapes64 as first_stage

STEPS = 6_000


def steps(number):
    return {"run.steps": number, "optim.schedule.max_decay_steps": number}


LDM4 = {
    "data.source.size": 10_000,
    "diffusion.prediction": "v",  # better where the condition says most
    "first_stage": first_stage.F4,
    "run.first_stage": "runs/shapes64/f4",
    "unet.model_channels": 48,
    "unet.channel_mult": (1, 2, 2),
    "unet.attention_resolutions": (2, 4),
    "unet.num_groups": 16,
}


# What tokens mean is learned late: batches are small, and backgrounds, of which nothing is said,
# are alike.
TOKENS = {
    "data.source.backgrounds": ("dark",),
    "optim.lr": 4e-4,
    "train.batch_size": 16,
}


def get_config(arg=""):
    return tasks.make(
        arg,
        {
            "text": {
                **tasks.TASKS["text"],
                **TOKENS,
                **steps(20_000),
                "data.source.size": 90_000,
                "data.source.shapes": (1, 2),
                "data.source.held_out": 0.2,
                # which is where is decided in noise in which eps hardly asks for it
                "diffusion.prediction": "v",
                "sample.scale": 2.5,
            },
            "layout": {
                **tasks.TASKS["layout"],
                **TOKENS,
                **steps(8_000),
                "diffusion.weighting": "min_snr",
                "diffusion.min_snr_gamma": 0.5,
                "conditioning.max_objects": 3,
            },
            "semantic": {**tasks.TASKS["semantic"], **LDM4, **steps(1_200)},
            "superres": {**tasks.TASKS["superres"], **LDM4, **steps(1_200)},
            "superres_bsr": {**tasks.TASKS["superres_bsr"], **LDM4, **steps(2_400)},
            "inpainting": {
                **tasks.TASKS["inpainting"],
                **LDM4,
                **steps(2_400),
                "latents.source": "online",
            },
            "tiny": {
                "latents.source": "online",
                "first_stage.channels": 8,
                **sections.TINY_RUN,
                "train.batch_size": 8,
                "unet.model_channels": 8,
                "unet.num_groups": 4,
                "data.source.size": 64,
                "sample.steps": 4,
            },
        },
        phase="diffusion",
        data=sections.shapes(64, shapes=(1, 3), size=30_000),
        first_stage=first_stage.F8,
        conditioning=dict(kind="label", num_classes=12, dim=128),
        unet=dict(
            model_channels=64,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(1, 2),
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
            eval_every=1_000,
            image_every=2_000,
            checkpoint_every=500,
            eval_batches=8,
            first_stage="runs/shapes64/f8",
        ),
    )
