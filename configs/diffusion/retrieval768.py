"""Retrieval-augmented LDM-16 (RDM), on CLIP's embeddings of neighbours, at 768 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/retrieval768.py \\
    --workdir=runs/retrieval768 --config.data.source.path=DIR --config.run.first_stage=runs/kl_f16

Argument: `:tiny` (a smoke run).
Checkpoint `rdm768x768`, a preliminary one (Blattmann et al. 2022, arXiv:2204.11824): how it was
trained and how well it does is not published, the batch and steps here are ours. Conditions are
embeddings of CLIP ViT-L/14, 768 wide: of a text, of images that are near it in a database (20 at
most, as here), or of both; zeros are "none". Not trained here.
"""

from configs import published, sections
from configs.first_stage import kl_f16


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(768, flip=False),
        first_stage=kl_f16.NETWORK,
        conditioning=dict(kind="embeddings", number=20, dim=768),
        unet=published.unet(
            448, (1, 2, 3, 4), (1, 2, 4), num_head_channels=32, transformer_depth=1, remat="full"
        ),
        diffusion=sections.diffusion(schedule=sections.linear(0.0015, 0.015)),
        latents=sections.latents(scale=0.22765929),
        optim=sections.adamw(1e-4),
        train=sections.train(64),
        sample=sections.sample(scale=5.0),
        run=sections.run(),
        published=dict(
            checkpoint="rdm/rdm768x768",
            task="retrieval-augmented",
            data="LAION",
            parameters=dict(unet=1_335_480_400, first_stage=69_610_963),
            source="model zoo",
        ),
    )
