"""VQ autoencoder, f = 32, 16384 codes of 32 channels: phase 1 of LDM-32.

python -m latent_diffusion_jax train --config=configs/first_stage/vq_f32.py \\
    --workdir=runs/vq_f32 --config.data.source.path=DIR

Argument: `:tiny` (a smoke run).
Tables 13 and 14 give LDM-32 latents of 8 x 8 x 32; Table 8 lists f = 32 with 16 channels only
(R-FID 31.83). Neither the checkpoint nor its settings were published: levels are `kl_f32`'s, batch
and rate `vq_f16`'s. Not trained here.
"""

from configs import published

NETWORK = published.autoencoder(
    "vq",
    channel_mult=(1, 1, 2, 2, 4, 4),
    z_channels=32,
    codebook_size=16_384,
    attention_levels=(4, 5),
)


def get_config(arg=""):
    return published.first_stage(
        arg,
        network=NETWORK,
        lr=6.3e-5,  # 4.5e-6 x 14
        batch_size=14,
        steps=1_000_000,
        disc_start=250_001,
        num_layers=2,
        published=dict(task="autoencoding", data="OpenImages", source="Tables 13 and 14"),
    )
