"""VQ autoencoder, f = 8, 256 codes of 4 channels: the small codebook.

python -m latent_diffusion_jax train --config=configs/first_stage/vq_f8_n256.py \\
    --workdir=runs/vq_f8_n256 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `vq-f8-n256`, 67,652,783 parameters; attention at resolution 32 of 256 is level 3. Table
8: R-FID 1.49, PSNR 22.35, PSIM 1.26, SSIM 0.62 on ImageNet's validation set; 1,608,649 steps. Not
trained here. The loss has LPIPS (weight 1) and, from step 250,001, a discriminator of 3 layers
(weight 0.75).
"""

from configs import published

NETWORK = published.autoencoder(
    "vq", channel_mult=(1, 2, 2, 4), z_channels=4, codebook_size=256, attention_levels=(3,)
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=4.5e-5,  # 4.5e-6 x 10
        batch_size=10,
        steps=1_608_649,
        disc_start=250_001,
        published=dict(
            checkpoint="first_stage_models/vq-f8-n256",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=67_652_783),
            rfid=1.49,
            psnr=22.35,
            source="Table 8",
        ),
    )
