"""Unconditional LDM-4 on LSUN bedrooms at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/lsun_bedrooms256.py \\
    --workdir=runs/lsun_bedrooms256 --config.data.source.path=DIR \\
    --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `lsun_beds256` (274 M, Table 12), 1,900,000 steps. FID 2.95 (Table 1; 3.0 by ADM's
script) of 50,000 samples with 200 DDIM steps and eta 1. Not trained here.
"""

from configs import published, sections
from configs.diffusion.celebahq256 import UNET
from configs.first_stage import vq_f4


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, crop="center"),
        first_stage=vq_f4.NETWORK,
        unet=UNET,
        optim=sections.adamw(9.6e-5),  # 2e-6 x 48
        train=sections.train(48),
        sample=sections.sample(scale=1.0, options=dict(eta=1.0)),
        run=sections.run(steps=1_900_000),
        published=dict(
            checkpoint="ldm/lsun_beds256",
            task="unconditional",
            data="LSUN bedrooms",
            parameters=dict(unet=274_056_163, first_stage=55_322_782),
            fid=2.95,
            source="Table 1",
        ),
    )
