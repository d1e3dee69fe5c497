"""KL autoencoder, f = 4, of 2.7 M parameters at 64 pixels: what `bench --size=S` measures, phase 1.

python -m latent_diffusion_jax train --config=configs/first_stage/bench.py --workdir=runs/bench/ae

Argument: `:tiny` (a smoke run). The published architecture with a quarter of the channels and half
of the blocks. Made to be timed, not trained: nothing is known of its quality.
"""

from configs import sections
from configs.first_stage import shapes

NETWORK = {**shapes.KL, "channels": 32, "channel_mult": (1, 2, 4), "num_groups": 16}
TINY = {**shapes.TINY, "first_stage.num_groups": 2}


def get_config(arg=""):
    return sections.make(
        arg,
        {"tiny": {**TINY, **sections.TINY_RUN, "train.batch_size": 8}},
        phase="first_stage",
        data=sections.shapes(64),
        first_stage=NETWORK,
        loss=dict(pixel="l2", perceptual_weight=0.0, kl_weight=1e-2),
        discriminator=sections.NO_DISCRIMINATOR,
        optim=sections.adam(1e-3),
        train=sections.train(16, ema_decay=0.0, ema_networks=()),
        run=sections.run(steps=1_000),
    )
