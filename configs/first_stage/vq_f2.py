"""VQ autoencoder, f = 2, 2048 codes of 2 channels: phase 1 of LDM-2.

python -m latent_diffusion_jax train --config=configs/first_stage/vq_f2.py \\
    --workdir=runs/vq_f2 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Table 8: R-FID 0.16, PSNR 30.85, PSIM 0.27, SSIM 0.91 on ImageNet's validation set. Neither the
checkpoint nor its settings were published: levels, batch and rate are `vq_f4_noattn`'s, a level
less (attention over 128 x 128 positions would hold 2^28 weights per image). Not trained here.
"""

from configs import published

NETWORK = published.autoencoder(
    "vq", channel_mult=(1, 2), z_channels=2, codebook_size=2048, mid_attention=False
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=3.6e-5,  # 4.5e-6 x 8
        batch_size=8,
        steps=500_000,
        disc_start=11,
        published=dict(
            task="autoencoding", data="OpenImages", rfid=0.16, psnr=30.85, source="Table 8"
        ),
    )
