"""KL autoencoder, f = 4, on the embedded coloured shapes at 32 pixels: phase 1 of the demo.

python -m latent_diffusion_jax train --config=configs/first_stage/shapes.py --workdir=runs/shapes/ae

Arguments: `:vq` (VQ instead of KL, 512 codes), `:f2` and `:f8` (f = 2 and 8; with VQ: `:vq,f8`),
`:tiny` (a smoke run of seconds).
The published architecture, with few channels. The paper has no such row; cost and quality reached
are in the README.
"""

from configs import sections

NETWORK = dict(
    channels=16,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    z_channels=4,
    embed_dim=4,
    attention_levels=(),
    mid_attention=True,
    dropout=0.0,
    num_groups=2,  # of 8 channels: groups of two leave little more than signs
    remat="none",
)
KL = dict(kind="kl", **NETWORK)
VQ = dict(kind="vq", codebook_size=512, **NETWORK)
TINY = {"first_stage.channels": 8, "first_stage.channel_mult": (1, 1, 1)}
FACTORS = {"2": (1, 2), "4": (1, 2, 2), "8": (1, 2, 2, 2)}  # f -> multipliers of channels
STEPS = 1_200


def get_config(arg=""):
    return sections.make(
        arg,
        {
            "vq": {
                "first_stage": VQ,
                "loss": dict(
                    pixel="l2",
                    perceptual_weight=0.0,
                    codebook_weight=1.0,
                    beta=0.25,
                    legacy=False,
                    restart_after=0,
                ),
            },
            "f2": {"first_stage.channel_mult": FACTORS["2"]},
            "f8": {"first_stage.channel_mult": FACTORS["8"]},
            "tiny": {**TINY, **sections.TINY_RUN, "train.batch_size": 8},
        },
        phase="first_stage",
        data=sections.shapes(32),
        first_stage=KL,
        loss=dict(pixel="l2", perceptual_weight=0.0, kl_weight=1e-2),
        discriminator=sections.NO_DISCRIMINATOR,
        optim=sections.adam(2e-3, schedule=sections.cosine(STEPS, 50)),
        train=sections.train(16, ema_decay=0.0, ema_networks=()),
        run=sections.run(
            steps=STEPS,
            log_every=50,
            eval_every=250,
            image_every=250,
            checkpoint_every=250,
            eval_batches=8,
        ),
    )
