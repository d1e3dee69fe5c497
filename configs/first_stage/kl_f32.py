"""KL autoencoder, f = 32, 64 channels: the strongest compression of the model zoo.

python -m latent_diffusion_jax train --config=configs/first_stage/kl_f32.py \\
    --workdir=runs/kl_f32 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `kl-f32`, 103,880,131 parameters; attention at resolutions 16 and 8 of 256 is levels 4
and 5. Table 8: R-FID 2.04, PSNR 22.27, PSIM 1.41, SSIM 0.61 on ImageNet's validation set; 406,763
steps. Not trained here. The loss has LPIPS (weight 1) and, from step 50,001, a discriminator of 3
layers (weight 0.5).
"""

from configs import published

NETWORK = published.autoencoder(
    "kl", channel_mult=(1, 1, 2, 2, 4, 4), z_channels=64, attention_levels=(4, 5)
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=2.7e-5,  # 4.5e-6 x 6
        batch_size=6,
        steps=406_763,
        disc_start=50_001,
        published=dict(
            checkpoint="first_stage_models/kl-f32",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=103_880_131),
            rfid=2.04,
            psnr=22.27,
            source="Table 8",
        ),
    )
