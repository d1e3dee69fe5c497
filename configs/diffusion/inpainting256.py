"""Inpainting, LDM-4, on Places at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/inpainting256.py \\
    --workdir=runs/inpainting256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Arguments: `:noattn` (on `vq_f4_noattn`), `:kl` (on `kl_f4`, its scale measured), `:pixels` (LDM-1,
no first stage), `:tiny` (a smoke run).
Never shipped; Table 15's column Inpainting (215 M), 360,000 steps on eight V100; loss, noise
schedule and rate schedule are `inpainting_big`'s. FID on 30,000 crops of 512 of Places' test images
(Table 7): 2.15; `:noattn` 2.37. On 2000 validation images after 6 epochs (Table 6): 14.99,
`:noattn` 15.95, `:kl` 15.21, `:pixels` 24.74. Masks are LaMa's. Not trained here.
"""

from configs import published, sections
from configs.diffusion.inpainting_big import CONDITIONING, DIFFUSION, OPTIM
from configs.first_stage import kl_f4, vq_f4, vq_f4_noattn


def get_config(arg=""):
    return published.diffusion(
        arg,
        {
            "noattn": {
                "first_stage": vq_f4_noattn.NETWORK,
                "published.parameters.first_stage": 53_219_486,
                "published.fid": 2.37,
            },
            "kl": {
                "first_stage": kl_f4.NETWORK,
                "latents": sections.latents(),
                "published": dict(
                    task="inpainting",
                    data="Places",
                    parameters=dict(unet=215_230_467, first_stage=55_312_063),
                    fid=15.21,
                    source="Table 6",
                ),
            },
            "pixels": {
                "first_stage": dict(kind="identity"),
                "published": dict(
                    task="inpainting",
                    data="Places",
                    parameters=dict(unet=215_230_467),
                    fid=24.74,
                    source="Table 6",
                ),
            },
        },
        first_stage=vq_f4.NETWORK,
        conditioning=CONDITIONING,
        unet=published.unet(128, (1, 4, 8), (), num_heads=1),
        diffusion=DIFFUSION,
        optim=OPTIM,
        train=sections.train(128),
        sample=sections.sample(scale=1.0),
        run=sections.run(steps=360_000),
        published=dict(
            task="inpainting",
            data="Places",
            parameters=dict(unet=215_230_467, first_stage=55_322_782),
            fid=2.15,
            source="Table 7",
        ),
    )
