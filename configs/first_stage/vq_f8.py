"""VQ autoencoder, f = 8, 16384 codes of 4 channels: phase 1 of LDM-8 on ImageNet and COCO.

python -m latent_diffusion_jax train --config=configs/first_stage/vq_f8.py \\
    --workdir=runs/vq_f8 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Checkpoint `vq-f8`, 67,717,295 parameters; attention at resolution 32 of 256 is level 3. Table 8:
R-FID 1.14, PSNR 23.07, PSIM 1.17, SSIM 0.65 on ImageNet's validation set; 971,043 steps. Not
trained here. The loss has LPIPS (weight 1) and, from step 1, a discriminator of 2 layers (weight
0.6).
"""

from configs import published

NETWORK = published.autoencoder(
    "vq", channel_mult=(1, 2, 2, 4), z_channels=4, codebook_size=16_384, attention_levels=(3,)
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=4.5e-5,  # 4.5e-6 x 10
        batch_size=10,
        steps=971_043,
        disc_start=1,
        num_layers=2,
        weight=0.6,
        published=dict(
            checkpoint="first_stage_models/vq-f8",
            task="autoencoding",
            data="OpenImages",
            parameters=dict(autoencoder=67_717_295),
            rfid=1.14,
            psnr=23.07,
            source="Table 8",
        ),
    )
