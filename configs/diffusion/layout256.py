"""Layout-to-image LDM-4 on OpenImages at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/layout256.py \\
    --workdir=runs/layout256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `layout2img-openimages256` (305.1 M with the encoder of layouts; Table 15 prints 306 M),
4,400,000 steps. FID 32.02 on 2048 centre crops of the validation set with 200 DDIM steps and eta 0
(Table 9); fine-tuned on COCO it reaches 40.91 there. Its classes are OpenImages' 300 most frequent
and those that COCO has too; their exact number, here 300, enters class tokens only. Not trained
here.
"""

from configs import published, sections
from configs.first_stage import vq_f4


def get_config(arg=""):
    return published.diffusion(
        arg,
        first_stage=vq_f4.NETWORK,
        conditioning=published.layout(num_classes=300, depth=16),
        unet=published.unet(
            128, (1, 2, 3, 4), (2, 4, 8), num_head_channels=32, transformer_depth=3
        ),
        diffusion=sections.diffusion(
            schedule=sections.linear(0.0015, 0.0205), loss="l1", condition_dropout=0.0
        ),
        optim=sections.adamw(4.8e-5),  # 2e-6 x 24
        train=sections.train(24),
        sample=sections.sample(scale=1.0, steps=200),
        run=sections.run(steps=4_400_000),
        published=dict(
            checkpoint="ldm/layout2img-openimages256",
            task="layout-to-image",
            data="OpenImages",
            parameters=dict(unet=246_277_379, first_stage=55_322_782, conditioning=58_858_496),
            fid=32.02,
            source="Table 9",
        ),
    )
