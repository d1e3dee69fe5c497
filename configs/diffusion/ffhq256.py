"""Unconditional LDM-4 on FFHQ at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/ffhq256.py \\
    --workdir=runs/ffhq256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `ffhq256` (274 M, Table 12), 635,000 steps. FID 4.98 (Table 1) of 50,000 samples with 200
DDIM steps and eta 1. Not trained here.
"""

from configs import published, sections
from configs.diffusion.celebahq256 import UNET
from configs.first_stage import vq_f4


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, crop="center", flip=False),
        first_stage=vq_f4.NETWORK,
        unet=UNET,
        optim=sections.adamw(8.4e-5),  # 2e-6 x 42
        train=sections.train(42),
        sample=sections.sample(scale=1.0, options=dict(eta=1.0)),
        run=sections.run(steps=635_000),
        published=dict(
            checkpoint="ldm/ffhq256",
            task="unconditional",
            data="FFHQ",
            parameters=dict(unet=274_056_163, first_stage=55_322_782),
            fid=4.98,
            source="Table 1",
        ),
    )
