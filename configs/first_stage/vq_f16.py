"""VQ autoencoder, f = 16, 16384 codes of 8 channels: phase 1 of LDM-16.

python -m latent_diffusion_jax train --config=configs/first_stage/vq_f16.py \\
    --workdir=runs/vq_f16 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `vq-f16`, 69,593,371 parameters; attention at resolution 16 of 256 is level 4. Table 8:
R-FID 5.15, PSNR 20.83, PSIM 1.73, SSIM 0.54 on ImageNet's validation set; 1,101,166 steps. Not
trained here. The loss has LPIPS (weight 1) and, from step 250,001, a discriminator of 2 layers
(weight 0.75).
"""

from configs import published

NETWORK = published.autoencoder(
    "vq", channel_mult=(1, 1, 2, 2, 4), z_channels=8, codebook_size=16_384, attention_levels=(4,)
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=6.3e-5,  # 4.5e-6 x 14
        batch_size=14,
        steps=1_101_166,
        disc_start=250_001,
        num_layers=2,
        published=dict(
            checkpoint="first_stage_models/vq-f16",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=69_593_371),
            rfid=5.15,
            psnr=20.83,
            source="Table 8",
        ),
    )
