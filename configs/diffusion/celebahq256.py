"""Unconditional LDM-4 on CelebA-HQ at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/celebahq256.py \\
    --workdir=runs/celebahq256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `celeba256` (274 M, Table 12), 410,000 steps. FID 5.11 (Table 1) of 50,000 samples with
500 DDIM steps; the model zoo gives the same for 200 steps and eta 0. Not trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f4

UNET = published.unet(224, (1, 2, 3, 4), (2, 4, 8), num_head_channels=32)


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, crop="center", flip=False),
        first_stage=vq_f4.NETWORK,
        unet=UNET,
        optim=sections.adamw(9.6e-5),  # 2e-6 x 48
        train=sections.train(48),
        sample=sections.sample(scale=1.0, options=dict(eta=1.0)),
        run=sections.run(steps=410_000),
        published=dict(
            checkpoint="ldm/celeba256",
            task="unconditional",
            data="CelebA-HQ",
            parameters=dict(unet=274_056_163, first_stage=55_322_782),
            fid=5.11,
            source="Table 1",
        ),
    )
