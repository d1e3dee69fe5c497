"""Semantic synthesis, LDM-4, of landscapes, fine-tuned at 512 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/semantic512.py \\
    --workdir=runs/semantic512 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `semantic_synthesis512`: `semantic256`, trained further on crops of 512 from 768, for how
long is not published. No figure is published. Not trained here.
"""

from configs import published, sections
from configs.diffusion.semantic256 import CONDITIONING, DIFFUSION, UNET
from configs.first_stage import vq_f4


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(512, flip=False),
        first_stage=vq_f4.NETWORK,
        conditioning=CONDITIONING,
        unet=UNET,
        diffusion=DIFFUSION,
        optim=sections.adamw(8e-6),  # 1e-6 x 8
        train=sections.train(8),
        sample=sections.sample(scale=1.0, steps=200, options=dict(eta=1.0)),
        run=sections.run(),
        published=dict(
            checkpoint="ldm/semantic_synthesis512",
            task="semantic synthesis",
            data="landscapes from Flickr",
            parameters=dict(unet=215_229_315, first_stage=55_322_782, conditioning=546),
            source="model zoo",
        ),
    )
