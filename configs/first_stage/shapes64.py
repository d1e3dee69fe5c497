"""KL autoencoder, f = 4, on scenes of one to three coloured shapes at 64 pixels: phase 1.

python -m latent_diffusion_jax train --config=configs/first_stage/shapes64.py \\
    --workdir=runs/shapes64/ae

Argument: `:tiny` (a smoke run of seconds).
The first stage of every task of `configs/diffusion/shapes64.py`. The paper has no such row; cost
and quality reached are in docs/tasks.md.
"""

from configs import sections
from configs.first_stage import shapes

NETWORK = shapes.KL
STEPS = 2_000


def get_config(arg=""):
    return sections.make(
        arg,
        {"tiny": {**shapes.TINY, **sections.TINY_RUN, "train.batch_size": 8}},
        phase="first_stage",
        data=sections.shapes(64, shapes=(1, 3)),
        first_stage=NETWORK,
        loss=dict(pixel="l2", perceptual_weight=0.0, kl_weight=1e-2),
        discriminator=sections.NO_DISCRIMINATOR,
        optim=sections.adam(2e-3, schedule=sections.cosine(STEPS, 50)),
        train=dict(batch_size=8, accumulate=1, ema_decay=0.0, ema_networks=()),
        run=sections.run(
            steps=STEPS,
            log_every=50,
            eval_every=500,
            image_every=500,
            checkpoint_every=250,
            eval_batches=16,
        ),
    )
