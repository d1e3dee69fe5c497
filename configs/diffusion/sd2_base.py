"""Stable Diffusion 2 (2.0 and 2.1 base), text-to-image at 512 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/sd2_base.py \\
    --workdir=runs/sd2_base --config.data.source.path=DIR \\
    --config.run.first_stage=runs/kl_f8 --config.run.conditioning=CLIP

Argument: `:tiny` (a smoke run).
Checkpoints `512-base-ema.ckpt` and `v2-1_512-ema-pruned.ckpt`: 865.9 M, on the last hidden layer
but one of OpenCLIP ViT-H (340.4 M, frozen). By the model card: 550,000 steps at 256 pixels, then
850,000 at 512, of 2048 images; AdamW, 1e-4 after 10,000 steps of warm-up. Not trained here.
"""

from configs import published, sections
from configs.first_stage import kl_f8

CONDITIONING = published.clip(dim=1024, depth=23, num_heads=16, activation="gelu", pad=0)
UNET = published.unet(
    320,
    (1, 2, 4, 4),
    (1, 2, 4),
    num_head_channels=64,
    transformer_depth=1,
    linear_projections=True,
    remat="full",
)


def get_config(arg=""):
    return published.stable_diffusion(
        arg,
        first_stage=kl_f8.NETWORK,
        conditioning=CONDITIONING,
        unet=UNET,
        sample=sections.sample(scale=9.0),
        run=sections.run(steps=850_000),
        published=dict(
            checkpoint="512-base-ema.ckpt",
            task="text-to-image",
            data="a subset of LAION-5B",
            parameters=dict(unet=865_910_724, first_stage=83_653_863, conditioning=340_387_840),
            source="model card of Stable Diffusion 2",
        ),
    )
