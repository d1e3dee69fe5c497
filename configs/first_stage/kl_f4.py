"""KL autoencoder, f = 4, 3 channels: phase 1 of inpainting with a KL latent.

python -m latent_diffusion_jax train --config=configs/first_stage/kl_f4.py \\
    --workdir=runs/kl_f4 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `kl-f4`, 55,312,063 parameters. Table 8: R-FID 0.27, PSNR 27.53, PSIM 0.55, SSIM 0.82 on
ImageNet's validation set; 176,991 steps. Not trained here. The loss has LPIPS (weight 1) and, from
step 50,001, a discriminator of 3 layers (weight 0.5).
"""

from configs import published

NETWORK = published.autoencoder("kl", channel_mult=(1, 2, 4), z_channels=3)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=4.5e-5,  # 4.5e-6 x 10
        batch_size=10,
        steps=176_991,
        disc_start=50_001,
        published=dict(
            checkpoint="first_stage_models/kl-f4",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=55_312_063),
            rfid=0.27,
            psnr=27.53,
            source="Table 8",
        ),
    )
