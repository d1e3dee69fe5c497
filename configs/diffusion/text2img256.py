"""Text-to-image LDM-4, fine-tuned on Conceptual Captions at 256 pixels: phase 2.

python -m latent_diffusion_jax train --config=configs/diffusion/text2img256.py \\
    --workdir=runs/text2img256 --config.data.source.path=DIR --config.run.first_stage=runs/vq_f4

Argument: `:tiny` (a smoke run).
Checkpoint `text2img256`, not in the paper: fine-tuned from LAION, for how long is not published.
FID 16.79 with 100 DDIM steps and eta 0 (the model zoo). Not trained here.
"""

from configs import published, sections
from configs.first_stage import vq_f4


def get_config(arg=""):
    return published.diffusion(
        arg,
        data=sections.folder(256, flip=False, tokenizer=published.BERT),
        first_stage=vq_f4.NETWORK,
        conditioning=published.text(dim=640, depth=32),
        unet=published.unet(
            192, (1, 2, 3, 5), (2, 4, 8), num_head_channels=32, transformer_depth=1
        ),
        diffusion=sections.diffusion(),
        optim=sections.adamw(5.6e-5),  # 2e-6 x 28
        train=sections.train(28),
        sample=sections.sample(scale=1.0, steps=100),
        run=sections.run(),
        published=dict(
            checkpoint="ldm/text2img256",
            task="text-to-image",
            data="Conceptual Captions",
            parameters=dict(unet=403_623_939, first_stage=55_322_782, conditioning=186_154_682),
            fid=16.79,
            source="model zoo",
        ),
    )
