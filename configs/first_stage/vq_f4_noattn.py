"""VQ autoencoder, f = 4, 8192 codes of 3 channels without attention: phase 1 of large inpainting.

python -m latent_diffusion_jax train --config=configs/first_stage/vq_f4_noattn.py \\
    --workdir=runs/vq_f4_noattn --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `vq-f4-noattn`, 53,219,486 parameters. Table 8: R-FID 1.06, PSNR 25.21, PSIM 0.72, SSIM
0.76 on ImageNet's validation set; 658,131 steps. Without attention, large images decode in less
memory. Not trained here. The loss has LPIPS (weight 1) and, from step 11, a discriminator of 3
layers (weight 0.75).
"""

from configs import published

NETWORK = published.autoencoder(
    "vq", channel_mult=(1, 2, 4), z_channels=3, codebook_size=8192, mid_attention=False
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=3.6e-5,  # 4.5e-6 x 8
        batch_size=8,
        steps=658_131,
        disc_start=11,
        published=dict(
            checkpoint="first_stage_models/vq-f4-noattn",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=53_219_486),
            rfid=1.06,
            psnr=25.21,
            source="Table 8",
        ),
    )
