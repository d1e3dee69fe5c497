"""Stable Diffusion 1.5, inpainting by text at 512 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/sd1_inpainting.py \\
    --workdir=runs/sd1_inpainting --config.data.source.path=DIR \\
    --config.run.first_stage=runs/kl_f8 --config.run.conditioning=CLIP

Argument: `:tiny` (a smoke run).
Checkpoint `sd-v1-5-inpainting.ckpt`: Stable Diffusion 1.5 with 5 more channels of input, trained on
for 440,000 steps, 10 % of the captions dropped and in 25 % the whole image masked (its model card;
rate and warm-up by its config). Not trained here.
"""

from configs import published, sections
from configs.diffusion import sd1
from configs.first_stage import kl_f8


def get_config(arg=""):
    return published.stable_diffusion(
        arg,
        first_stage=kl_f8.NETWORK,
        conditioning=published.inpainting(sd1.CONDITIONING),
        unet=sd1.UNET,
        optim=sections.adamw(7.5e-5, schedule=sections.warm_up(2_500)),
        train=sections.train(2048),
        run=sections.run(steps=440_000),
        published=dict(
            checkpoint="sd-v1-5-inpainting.ckpt",
            task="inpainting by text",
            data="LAION-Aesthetics v2 5+",
            parameters=dict(unet=859_535_364, first_stage=83_653_863, conditioning=123_060_480),
            source="model card of Stable Diffusion Inpainting",
        ),
    )
