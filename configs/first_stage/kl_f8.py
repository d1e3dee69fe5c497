"""KL autoencoder, f = 8, 4 channels: phase 1 of churches, text and Stable Diffusion.

python -m latent_diffusion_jax train --config=configs/first_stage/kl_f8.py \\
    --workdir=runs/kl_f8 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `kl-f8`, 83,653,863 parameters. Table 8: R-FID 0.90, PSNR 24.19, PSIM 1.02, SSIM 0.69 on
ImageNet's validation set; 246,803 steps. Not trained here. The loss has LPIPS (weight 1) and, from
step 50,001, a discriminator of 3 layers (weight 0.5).
"""

from configs import published

NETWORK = published.autoencoder("kl", channel_mult=(1, 2, 4, 4), z_channels=4)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=1.8e-5,  # 4.5e-6 x 4
        batch_size=4,
        steps=246_803,
        disc_start=50_001,
        published=dict(
            checkpoint="first_stage_models/kl-f8",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=83_653_863),
            rfid=0.9,
            psnr=24.19,
            source="Table 8",
        ),
    )
