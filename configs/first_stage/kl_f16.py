"""KL autoencoder, f = 16, 16 channels: phase 1 of `diffusion/retrieval768.py`.

python -m latent_diffusion_jax train --config=configs/first_stage/kl_f16.py \\
    --workdir=runs/kl_f16 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `kl-f16`, 69,610,963 parameters; attention at resolution 16 of 256 is level 4. Table 8:
R-FID 0.87, PSNR 24.08, PSIM 1.07, SSIM 0.68 on ImageNet's validation set; 442,998 steps. Not
trained here. The loss has LPIPS (weight 1) and, from step 50,001, a discriminator of 3 layers
(weight 0.5).
"""

from configs import published

NETWORK = published.autoencoder(
    "kl", channel_mult=(1, 1, 2, 2, 4), z_channels=16, attention_levels=(4,)
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=2.7e-5,  # 4.5e-6 x 6
        batch_size=6,
        steps=442_998,
        disc_start=50_001,
        published=dict(
            checkpoint="first_stage_models/kl-f16",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=69_610_963),
            rfid=0.87,
            psnr=24.08,
            source="Table 8",
        ),
    )
