"""Text-to-image LDM-8, on a KL latent, trained on LAION-400M at 256 pixels: phase 2, 1.45 B.

python -m latent_diffusion_jax train --config=configs/diffusion/text256.py \\
    --workdir=runs/text256 --config.data.source.path=DIR --config.run.first_stage=runs/kl_f8

Argument: `:tiny` (a smoke run).
Checkpoint `text2img-large` (config `txt2img-1p4B`; 1.45 B with the text encoder, Table 15), 390,000
steps of 680 images. FID on 30,000 captions of MS-COCO's validation set with 250 DDIM steps (Table
2): 12.63 at guidance scale 1.5, 23.31 without. Not trained here.
"""

from configs import published, sections
from configs.first_stage import kl_f8


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, flip=False, tokenizer=published.BERT),
        first_stage=kl_f8.NETWORK,
        conditioning=published.text(dim=1280, depth=32),
        unet=published.unet(
            320, (1, 2, 4, 4), (1, 2, 4), num_heads=8, transformer_depth=1, remat="full"
        ),
        diffusion=sections.diffusion(schedule=sections.linear(0.00085, 0.012)),
        latents=sections.latents(scale=0.18215),
        optim=sections.adamw(1e-4),
        train=sections.train(680),
        sample=sections.sample(scale=5.0, steps=200),
        run=sections.run(steps=390_000),
        published=dict(
            checkpoint="ldm/text2img-large",
            task="text-to-image",
            data="LAION-400M",
            parameters=dict(unet=872_300_484, first_stage=83_653_863, conditioning=581_994_042),
            fid=12.63,
            source="Table 2",
        ),
    )
