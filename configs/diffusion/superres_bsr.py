"""Super-resolution of degraded images, 64 to 256 pixels, LDM-4, on OpenImages: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/superres_bsr.py \\
    --workdir=runs/superres_bsr --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `bsr_sr`, known as LDSR or LDM-BSR (169 M with its first stage). Small images are made by
BSRGAN's degradation, made milder (appendix D.6.1). No figure is published. Not trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f4

CONDITIONING = dict(kind="lowres", factor=4)
UNET = published.unet(160, (1, 2, 2, 4), (8,), num_head_channels=32)
DIFFUSION = sections.diffusion(schedule=sections.linear(0.0015, 0.0155), condition_dropout=0.0)


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, crop="zoom", flip=False, degradation="bsr_light"),
        first_stage=vq_f4.NETWORK,
        conditioning=CONDITIONING,
        unet=UNET,
        diffusion=DIFFUSION,
        optim=sections.adamw(6.4e-5),  # 1e-6 x 64
        train=sections.train(64),
        sample=sections.sample(scale=1.0, steps=100, options=dict(eta=1.0)),
        run=sections.run(),
        published=dict(
            checkpoint="ldm/bsr_sr",
            task="super-resolution",
            data="OpenImages",
            parameters=dict(unet=113_622_563, first_stage=55_322_782),
            source="model zoo",
        ),
    )
