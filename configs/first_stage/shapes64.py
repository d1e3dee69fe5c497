"""KL autoencoder, f = 4, on scenes of one to three coloured shapes at 64 pixels: phase 1.

python -m latent_diffusion_jax train --config=configs/first_stage/shapes64.py \\
    --workdir=runs/shapes64/f4

Arguments: `:f8` (f = 8), `:tiny` (a smoke run of seconds).
The first stages of the tasks of `configs/diffusion/shapes64.py`, which says which of them each
takes. The paper has no such row; cost and quality reached are in docs/tasks.md.
"""

from configs import sections
from configs.first_stage import shapes

F4 = shapes.KL
F8 = {**F4, "channel_mult": (1, 2, 2, 4)}
STEPS = 2_000


def get_config(arg=""):
    return sections.make(
        arg,
        {
            "f8": {
                "first_stage": F8,
                "run.steps": 2 * STEPS,
                "optim.schedule.max_decay_steps": 2 * STEPS,
            },
            "tiny": {"first_stage.channels": 8, **sections.TINY_RUN, "train.batch_size": 8},
        },
        phase="first_stage",
        data=sections.shapes(64, shapes=(1, 3)),
        first_stage=F4,
        loss=dict(pixel="l2", perceptual_weight=0.0, kl_weight=1e-2),
        discriminator=sections.NO_DISCRIMINATOR,
        optim=sections.adam(2e-3, schedule=sections.cosine(STEPS, 50)),
        train=sections.train(8, ema_decay=0.0, ema_networks=()),
        run=sections.run(
            steps=STEPS,
            log_every=50,
            eval_every=500,
            image_every=500,
            checkpoint_every=250,
            eval_batches=16,
        ),
    )
