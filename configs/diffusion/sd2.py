"""Stable Diffusion 2 (2.0 and 2.1), text-to-image at 768 pixels, v-prediction: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/sd2.py --workdir=runs/sd2 \\
    --config.data.source.path=DIR --config.run.first_stage=runs/kl_f8 --config.run.conditioning=CLIP

Argument: `:tiny` (a smoke run).
Checkpoints `768-v-ema.ckpt` and `v2-1_768-ema-pruned.ckpt`: `sd2_base`, trained on to predict v
instead of eps for 150,000 steps at 512 pixels, then for 140,000 at 768 (model card). Not trained
here.
"""

from configs import published, sections
from configs.diffusion import sd2_base
from configs.first_stage import kl_f8


def get_config(arg=""):
    return published.stable_diffusion(
        arg,
        data=sections.folder(768, flip=False, tokenizer=published.CLIP),
        first_stage=kl_f8.NETWORK,
        conditioning=sd2_base.CONDITIONING,
        unet=sd2_base.UNET,
        diffusion=sections.diffusion(schedule=sections.linear(0.00085, 0.012), prediction="v"),
        sample=sections.sample(scale=9.0),
        run=sections.run(steps=140_000),
        published=dict(
            checkpoint="768-v-ema.ckpt",
            task="text-to-image",
            data="a subset of LAION-5B",
            parameters=dict(unet=865_910_724, first_stage=83_653_863, conditioning=340_387_840),
            source="model card of Stable Diffusion 2",
        ),
    )
