"""Class-conditional LDM-1, -2, -4, -8, -16 and -32 on ImageNet: section 4.1's comparison, phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/imagenet_sweep.py:8 \\
    --workdir=runs/imagenet_f8 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f8

Arguments: `:1` (no first stage), `:2` (on `vq_f2`), `:4` (on `vq_f4`; so without an argument), `:8`
(on `vq_f8`), `:16` (on `vq_f16`), `:32` (on `vq_f32`), and `:tiny` or, for one, `:8,tiny` (a smoke
run).
Never shipped; Table 13, 2,000,000 steps on one A100 each. Millions of parameters, printed and here:
LDM-1 396, 396.8; LDM-2 391, 390.9; LDM-4 391, 400.9; LDM-8 395, 395.0; LDM-16 395, 395.0; LDM-32
395, 395.1. No reading of LDM-4's column gives 391; Tables 3 and 10 print 400 for the same network.
FIDs, of 5,000 samples, are only plotted (figures 6 and 7). Not trained here.
"""

from configs import published, sections
from configs.diffusion.celebahq_sweep import LATENTS

COLUMNS = {  # channels, multipliers, batch, learning rate, parameters
    "1": (192, (1, 1, 2, 2, 4, 4), 7, 4.9e-5, 396_835_971),
    "2": (192, (1, 2, 2, 4, 4), 9, 6.3e-5, 390_888_578),
    "4": (192, (1, 2, 3, 5), 40, 8e-5, 400_920_579),
    "8": (256, (1, 2, 4), 64, 6.4e-5, 394_984_196),
    "16": (256, (1, 2, 4), 112, 4.5e-5, 395_002_632),
    "32": (256, (1, 2, 4), 112, 4.5e-5, 395_113_248),
}


def get_config(arg=""):
    f = next(filter(COLUMNS.get, arg.split(",")), "4")
    channels, channel_mult, batch_size, lr, parameters = COLUMNS[f]
    first_stage, attention = LATENTS[f]
    return published.diffusion(
        arg,
        dict.fromkeys(COLUMNS, {}),
        first_stage=first_stage,
        conditioning=dict(kind="label", num_classes=1000, dim=512, null_class=False),
        unet=published.unet(channels, channel_mult, attention, num_heads=1, transformer_depth=1),
        optim=sections.adamw(lr),
        train=sections.train(batch_size),
        sample=sections.sample(scale=1.0, steps=100),
        run=sections.run(steps=2_000_000),
        published=dict(
            task="class-conditional",
            data="ImageNet",
            parameters=dict(unet=parameters, conditioning=512_000),
            source="Table 13",
        ),
    )
