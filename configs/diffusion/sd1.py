"""Stable Diffusion 1 (1.1 to 1.5), text-to-image at 512 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/sd1.py --workdir=runs/sd1 \\
    --config.data.source.path=DIR --config.run.first_stage=runs/kl_f8 --config.run.conditioning=CLIP

Argument: `:tiny` (a smoke run).
Checkpoints `sd-v1-1.ckpt` to `sd-v1-4.ckpt` and `v1-5-pruned(-emaonly).ckpt`, one network: 859.5 M,
on the tokens of CLIP ViT-L/14 (123.1 M, frozen). By the model cards: 237,000 steps at 256 and
194,000 at 512 pixels (1.1), 515,000 more (1.2), then 595,000 with 10 % of the captions dropped
(1.5), all of 2048 images; AdamW, 1e-4 after 10,000 steps of warm-up. The cards plot FID, "not
optimized for" it. Not trained here.
"""

from configs import published, sections
from configs.first_stage import kl_f8

CONDITIONING = published.clip(dim=768, depth=12, num_heads=12, activation="quick_gelu")
UNET = published.unet(320, (1, 2, 4, 4), (1, 2, 4), num_heads=8, transformer_depth=1, remat="full")


def get_config(arg=""):
    return published.stable_diffusion(
        arg,
        first_stage=kl_f8.NETWORK,
        conditioning=CONDITIONING,
        unet=UNET,
        run=sections.run(steps=595_000),
        published=dict(
            checkpoint="v1-5-pruned-emaonly.ckpt",
            task="text-to-image",
            data="LAION-2B-en and subsets",
            parameters=dict(unet=859_520_964, first_stage=83_653_863, conditioning=123_060_480),
            source="model card of Stable Diffusion 1.5",
        ),
    )
