"""Inpainting with the big LDM-4, on Places at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/inpainting_big.py \\
    --workdir=runs/inpainting_big --config.data.source.path=DIR \\
    --config.run.first_stage=runs/vq_f4_noattn

Arguments: `:512` (the fine-tuning at 512 pixels, half an epoch), `:tiny` (a smoke run).
Checkpoint `inpainting_big` (387 M, section 4.5). FID on 30,000 crops of 512 of Places' test images
(Table 7): 2.40 before and 1.50 after the fine-tuning; where 40 to 50 % are masked, 12.89 and 9.39.
Masks are LaMa's. Batch and steps of the big model are not published: they are the small one's. Not
trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f4_noattn

CONDITIONING = dict(kind="inpainting", mask="ldm")
DIFFUSION = sections.diffusion(
    schedule=sections.linear(0.0015, 0.0205), loss="l1", condition_dropout=0.0
)
OPTIM = sections.adamw(
    1.28e-4,  # 1e-6 x 128, times the schedule, which is 0.1 at most
    schedule=dict(
        name="warmup_cosine",
        warm_up_steps=1_000,
        lr_start=0.001,
        lr_max=0.1,
        lr_min=0.0001,
        max_decay_steps=50_000,
    ),
)


def get_config(arg=""):
    return published.diffusion(
        arg,
        {"512": {"data.image_size": 512, "published.fid": 1.50}},
        first_stage=vq_f4_noattn.NETWORK,
        conditioning=CONDITIONING,
        unet=published.unet(256, (1, 2, 3, 4), (2, 4, 8), num_heads=8, resblock_updown=True),
        diffusion=DIFFUSION,
        optim=OPTIM,
        train=sections.train(128),
        sample=sections.sample(scale=1.0),
        run=sections.run(steps=360_000),
        published=dict(
            checkpoint="ldm/inpainting_big",
            task="inpainting",
            data="Places",
            parameters=dict(unet=387_245_827, first_stage=53_219_486),
            fid=2.40,
            source="Table 7",
        ),
    )
