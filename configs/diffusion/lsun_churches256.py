"""Unconditional LDM-8, on a KL latent, on LSUN churches at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/lsun_churches256.py \\
    --workdir=runs/lsun_churches256 --config.data.source.path=DIR \\
    --config.run.first_stage=runs/kl_f8

Argument: `:tiny` (a smoke run).
Checkpoint `lsun_churches256` (294 M, Table 12), 500,000 steps; the latent's scale was measured and
is in the checkpoint. FID 4.02 of 50,000 samples with 200 DDIM steps (Table 1); the model zoo says
400 steps and eta 0, which in the original's sampler are 500; Table 18 says 100 steps of a
checkpoint at 410,000 and 256 M. Not trained here.
"""

from configs import published, sections
from configs.first_stage import kl_f8


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, crop="center"),
        first_stage=kl_f8.NETWORK,
        unet=published.unet(
            192,
            (1, 2, 2, 4, 4),
            (1, 2, 4, 8),
            num_heads=8,
            use_scale_shift_norm=True,
            resblock_updown=True,
        ),
        diffusion=sections.diffusion(
            schedule=sections.linear(0.0015, 0.0155), loss="l1", condition_dropout=0.0
        ),
        latents=sections.latents(),
        # not times the batch: the original's config asks for `--scale_lr False`
        optim=sections.adamw(5e-5, schedule=sections.warm_up(10_000)),
        train=sections.train(96),
        sample=sections.sample(scale=1.0, options=dict(eta=1.0)),
        run=sections.run(steps=500_000),
        published=dict(
            checkpoint="ldm/lsun_churches256",
            task="unconditional",
            data="LSUN churches",
            parameters=dict(unet=294_966_916, first_stage=83_653_863),
            fid=4.02,
            source="Table 1",
        ),
    )
