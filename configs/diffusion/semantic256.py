"""Semantic synthesis, LDM-4, of landscapes at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/semantic256.py \\
    --workdir=runs/semantic256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `semantic_synthesis256` (215 M), 360,000 steps. Table 15 says f = 8; the checkpoint and
section 4.3.2 say f = 4. No figure is published. Trained on crops of 256 from 384. Not trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f4

CONDITIONING = dict(kind="segmentation", num_classes=182, channels=3)
UNET = published.unet(128, (1, 4, 8), (), num_heads=8)  # attention in the middle alone
DIFFUSION = sections.diffusion(
    schedule=sections.linear(0.0015, 0.0205), loss="l1", condition_dropout=0.0
)


def get_config(arg=""):
    return published.diffusion(
        arg,
        first_stage=vq_f4.NETWORK,
        conditioning=CONDITIONING,
        unet=UNET,
        diffusion=DIFFUSION,
        optim=sections.adamw(4.8e-5),  # 1e-6 x 48
        train=sections.train(48),
        sample=sections.sample(scale=1.0, steps=200, options=dict(eta=1.0)),
        run=sections.run(steps=360_000),
        published=dict(
            checkpoint="ldm/semantic_synthesis256",
            task="semantic synthesis",
            data="landscapes from Flickr",
            parameters=dict(unet=215_229_315, first_stage=55_322_782, conditioning=546),
            source="Table 15",
        ),
    )
