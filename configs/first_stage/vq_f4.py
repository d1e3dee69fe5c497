"""VQ autoencoder, f = 4, 8192 codes of 3 channels: phase 1 of most of the paper's models.

python -m latent_diffusion_jax train --config=configs/first_stage/vq_f4.py \\
    --workdir=runs/vq_f4 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `vq-f4`, 55,322,782 parameters. Table 8: R-FID 0.58, PSNR 27.43, PSIM 0.53, SSIM 0.82 on
ImageNet's validation set; 533,066 steps. Not trained here. The loss has LPIPS (weight 1) and, from
step 0, a discriminator of 3 layers (weight 0.75).
"""

from configs import published

NETWORK = published.autoencoder("vq", channel_mult=(1, 2, 4), z_channels=3, codebook_size=8192)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=3.6e-5,  # 4.5e-6 x 8
        batch_size=8,
        steps=533_066,
        disc_start=0,
        published=dict(
            checkpoint="first_stage_models/vq-f4",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=55_322_782),
            rfid=0.58,
            psnr=27.43,
            source="Table 8",
        ),
    )
