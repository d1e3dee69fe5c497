"""Super-resolution of bicubically reduced images, 64 to 256 pixels, LDM-4, on ImageNet: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/superres_bicubic.py \\
    --workdir=runs/superres_bicubic --config.data.source.path=DIR \\
    --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Never shipped; Table 15's column Super Resolution (169 M with its first stage), 860,000 steps; the
rest is `superres_bsr`'s. On ImageNet's validation set with 100 DDIM steps (Tables 5 and 11): FID
2.8 against validation and 4.8 against training images; 2.6 and 4.6 after 15 epochs more. Of the big
model (552 M, FID 2.4 and 4.3) only the size is published. Images whose shorter side is below 256
were left out. Not trained here.
"""

from configs import published, sections
from configs.diffusion.superres_bsr import CONDITIONING, DIFFUSION, UNET
from configs.first_stage import vq_f4


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, crop="zoom", flip=False, degradation="bicubic"),
        first_stage=vq_f4.NETWORK,
        conditioning=CONDITIONING,
        unet=UNET,
        diffusion=DIFFUSION,
        optim=sections.adamw(6.4e-5),
        train=sections.train(64),
        sample=sections.sample(scale=1.0, steps=100, options=dict(eta=1.0)),
        run=sections.run(steps=860_000),
        published=dict(
            task="super-resolution",
            data="ImageNet",
            parameters=dict(unet=113_622_563, first_stage=55_322_782),
            fid=2.8,
            source="Table 5",
        ),
    )
