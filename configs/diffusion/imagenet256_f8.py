"""Class-conditional LDM-8 on ImageNet at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/imagenet256_f8.py \\
    --workdir=runs/imagenet256_f8 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f8

Argument: `:tiny` (a smoke run).
Checkpoint `cin256` (395 M, Table 10), 4,800,000 steps of 64 images. FID of 50,000 samples with 200
DDIM steps: 15.51 (Table 10; the model zoo: 15.82 with eta 1). It has no "no class", so its
guidance, FID 7.76, took a classifier of noisy latents, which is not here. Not trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f8

UNET = published.unet(256, (1, 2, 4), (1, 2, 4), num_head_channels=32, transformer_depth=1)


def get_config(arg=""):
    return published.diffusion(
        arg,
        first_stage=vq_f8.NETWORK,
        conditioning=dict(kind="label", num_classes=1000, dim=512, null_class=False),
        unet=UNET,
        optim=sections.adamw(6.4e-5),  # 1e-6 x 64
        train=sections.train(64),
        sample=sections.sample(scale=1.0, steps=200, options=dict(eta=1.0)),
        run=sections.run(steps=4_800_000),
        published=dict(
            checkpoint="ldm/cin256",
            task="class-conditional",
            data="ImageNet",
            parameters=dict(unet=394_984_196, first_stage=67_717_295, conditioning=512_000),
            fid=15.51,
            source="Table 10",
        ),
    )
