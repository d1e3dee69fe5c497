"""Layout-to-image LDM-8 on COCO at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/layout_coco256.py \\
    --workdir=runs/layout_coco256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f8

Argument: `:tiny` (a smoke run).
Never shipped; Table 15's column COCO, 170,000 steps; loss and noise schedule are those of the model
for OpenImages. FID 42.06 on COCO's 2048 examples with 100 DDIM steps (Table 9). Table 15's 345 M is
what an encoder of 8 blocks gives (345,893,252); with Table 17's 16 it would be 371,100,036. Not
trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f8


def get_config(arg=""):
    return published.diffusion(
        arg,
        first_stage=vq_f8.NETWORK,
        conditioning=published.layout(num_classes=184, depth=8),
        unet=published.unet(
            192, (1, 2, 4), (1, 2, 4), num_heads=1, transformer_depth=2, dropout=0.1
        ),
        diffusion=sections.diffusion(
            schedule=sections.linear(0.0015, 0.0205), loss="l1", condition_dropout=0.0
        ),
        optim=sections.adamw(4.8e-5),
        train=sections.train(48),
        sample=sections.sample(scale=1.0, steps=100),
        run=sections.run(steps=170_000),
        published=dict(
            task="layout-to-image",
            data="COCO",
            parameters=dict(unet=312_241_540, first_stage=67_717_295, conditioning=33_651_712),
            fid=42.06,
            source="Table 9",
        ),
    )
