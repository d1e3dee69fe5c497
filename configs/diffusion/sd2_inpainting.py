"""Stable Diffusion 2, inpainting by text at 512 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/sd2_inpainting.py \\
    --workdir=runs/sd2_inpainting --config.data.source.path=DIR \\
    --config.run.first_stage=runs/kl_f8 --config.run.conditioning=CLIP

Argument: `:tiny` (a smoke run).
Checkpoint `512-inpainting-ema.ckpt`: `sd2_base` with 5 more channels of input, trained on for
200,000 steps with LaMa's masks, in 25 % the whole image masked (model card and config, rate
included). Not trained here.
"""

from configs import published, sections
from configs.diffusion import sd2_base
from configs.first_stage import kl_f8


def get_config(arg=""):
    return published.stable_diffusion(
        arg,
        first_stage=kl_f8.NETWORK,
        conditioning=published.inpainting(sd2_base.CONDITIONING),
        unet=sd2_base.UNET,
        optim=sections.adamw(5e-5),
        sample=sections.sample(scale=9.0),
        run=sections.run(steps=200_000),
        published=dict(
            checkpoint="512-inpainting-ema.ckpt",
            task="inpainting by text",
            data="a subset of LAION-5B",
            parameters=dict(unet=865_925_124, first_stage=83_653_863, conditioning=340_387_840),
            source="model card of Stable Diffusion 2",
        ),
    )
