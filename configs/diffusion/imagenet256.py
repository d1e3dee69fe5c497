"""Class-conditional LDM-4 on ImageNet at 256 pixels: phase 2 of the paper's best ImageNet model.

python -m latent_diffusion_jax train --config=configs/diffusion/imagenet256.py \\
    --workdir=runs/imagenet256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `cin256-v2` (400 M, Tables 3 and 10; Table 15 says 395 M), 178,000 steps of 1200 images.
FID of 50,000 samples with 250 DDIM steps (Table 10): 3.60 at guidance scale 1.5, 3.95 at 1.25,
10.56 without. Class 1000 is "no class". Not trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f4

UNET = published.unet(192, (1, 2, 3, 5), (2, 4, 8), num_heads=1, transformer_depth=1)


def get_config(arg=""):
    return published.diffusion(
        arg,
        first_stage=vq_f4.NETWORK,
        conditioning=dict(kind="label", num_classes=1000, dim=512),
        unet=UNET,
        diffusion=sections.diffusion(),
        optim=sections.adamw(1e-4),
        train=sections.train(1200),
        sample=sections.sample(scale=3.0, steps=20),
        run=sections.run(steps=178_000),
        published=dict(
            checkpoint="ldm/cin256-v2",
            task="class-conditional",
            data="ImageNet",
            parameters=dict(unet=400_920_579, first_stage=55_322_782, conditioning=512_512),
            fid=3.60,
            source="Table 10",
        ),
    )
