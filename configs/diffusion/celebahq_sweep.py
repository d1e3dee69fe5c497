"""Unconditional LDM-1, -2, -4, -8, -16 and -32 on CelebA-HQ: section 4.1's comparison, phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/celebahq_sweep.py:8 \\
    --workdir=runs/celebahq_f8 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f8

Arguments: `:1` (no first stage), `:2` (on `vq_f2`), `:4` (on `vq_f4`; so without an argument), `:8`
(on `vq_f8`), `:16` (on `vq_f16`), `:32` (on `vq_f32`), and `:tiny` or, for one, `:8,tiny` (a smoke
run).
Never shipped; Table 14, 500,000 steps on one A100 each. Millions of parameters, printed and here:
LDM-1 270, 270.5; LDM-2 265, 264.5; LDM-4 274, 274.1; LDM-8 258, 257.7; LDM-16 260, 257.8; LDM-32
258, 257.9. No reading of LDM-16's column gives 260. FIDs, of 5,000 samples, are only plotted
(figure 7). Not trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f2, vq_f4, vq_f8, vq_f16, vq_f32

LATENTS = {  # first stage, and where the UNet has attention: at 32, 16 and 8, where it gets there
    "1": (dict(kind="identity"), (8, 16, 32)),
    "2": (vq_f2.NETWORK, (4, 8, 16)),
    "4": (vq_f4.NETWORK, (2, 4, 8)),
    "8": (vq_f8.NETWORK, (1, 2, 4)),
    "16": (vq_f16.NETWORK, (1, 2, 4)),
    "32": (vq_f32.NETWORK, (1, 2, 4)),
}
COLUMNS = {  # channels, multipliers, batch, learning rate, parameters
    "1": (192, (1, 1, 2, 2, 4, 4), 9, 9e-5, 270_458_115),
    "2": (192, (1, 2, 2, 4, 4), 11, 1.1e-4, 264_510_722),
    "4": (224, (1, 2, 3, 4), 48, 9.6e-5, 274_056_163),
    "8": (256, (1, 2, 4), 96, 9.6e-5, 257_733_124),
    "16": (256, (1, 2, 4), 128, 1.3e-4, 257_751_560),
    "32": (256, (1, 2, 4), 128, 1.3e-4, 257_862_176),
}


def get_config(arg=""):
    f = next(filter(COLUMNS.get, arg.split(",")), "4")
    channels, channel_mult, batch_size, lr, parameters = COLUMNS[f]
    first_stage, attention = LATENTS[f]
    return published.diffusion(
        arg,
        dict.fromkeys(COLUMNS, {}),
        data=sections.folder(256, crop="center", flip=False),
        first_stage=first_stage,
        unet=published.unet(channels, channel_mult, attention, num_head_channels=32),
        optim=sections.adamw(lr),
        train=sections.train(batch_size),
        sample=sections.sample(scale=1.0, steps=100),
        run=sections.run(steps=500_000),
        published=dict(
            task="unconditional",
            data="CelebA-HQ",
            parameters=dict(unet=parameters),
            source="Table 14",
        ),
    )
