"""KL autoencoder, f = 4, on a folder of your own images at 64 pixels: phase 1.

python -m latent_diffusion_jax train --config=configs/first_stage/folder64.py \\
    --workdir=runs/mine/ae --config.data.source.path=DIR

Arguments: `:vq` (VQ instead of KL, 1024 codes), `:gan` (a discriminator from half-way on), `:tiny`
(a smoke run of seconds); several, as in `:vq,gan`. The perceptual term is off, for its weights are
files that you get yourself (docs/first_stage.md): --config.loss.perceptual_weight=1
--config.run.lpips=FILES.
DIR holds class folders, or images beside a `metadata.jsonl`; see docs/emoji.md for a run on 1,449
images with its cost and pictures. Sized for a CPU: on a GPU raise `first_stage.channels` to 128
and `train.batch_size`, as the paper's f = 4 models have.
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
VQ = dict(kind="vq", codebook_size=1024, **NETWORK)
TINY = {"first_stage.channels": 8, "first_stage.channel_mult": (1, 1, 1)}
STEPS = 1_500


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
                    restart_after=100,  # else 157 of 1024 entries are ever used
                ),
            },
            "gan": {
                "discriminator": sections.discriminator(
                    lr=5e-4, start=STEPS // 2, weight=0.5, channels=32
                ),
            },
            "tiny": {**TINY, **sections.TINY_RUN, "train.batch_size": 8},
        },
        phase="first_stage",
        data=sections.folder(64),
        first_stage=KL,
        # the published 1e-6 presumes perceptual and adversarial terms; 1e-2 makes latents smooth,
        # which a short phase 2 needs, at about 1 dB of PSNR
        loss=dict(pixel="l2", perceptual_weight=0.0, kl_weight=1e-2),
        discriminator=sections.NO_DISCRIMINATOR,
        optim=sections.adam(2e-3, schedule=sections.cosine(STEPS, 50)),
        train=sections.train(16, ema_decay=0.0, ema_networks=()),
        run=sections.run(
            steps=STEPS,
            log_every=50,
            eval_every=250,
            image_every=500,
            checkpoint_every=250,
            eval_batches=8,
        ),
    )
