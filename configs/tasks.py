"""The tasks of the paper as changes of a config: how each conditions, and what its data brings.

`make(arg, ...)` adds the arguments `:unconditional`, `:text`, `:layout`, `:semantic`, `:superres`,
`:superres_bsr` and `:inpainting` to a class-conditional config.
"""

from configs import sections

TRANSFORMER = dict(dim=128, depth=2, num_heads=4, head_dim=32)
# what is trained along is averaged along: samples read both
AVERAGED = {"train.ema_networks": ("unet", "conditioning")}
CONCAT = {"unet.transformer_depth": 0, "diffusion.condition_dropout": 0.0, "sample.scale": 1.0}

TASKS = {
    "unconditional": {**CONCAT, "conditioning": dict(kind="none")},
    "text": {
        "data.tokenizer": "basic",  # the vocabulary that ships
        **AVERAGED,
        "conditioning": dict(kind="text", vocab_size=636, max_length=24, **TRANSFORMER),
    },
    "layout": {
        **AVERAGED,
        "conditioning": dict(
            kind="layout",
            vocab_size=8192,  # corners on a grid of 90 x 90
            max_objects=8,
            num_classes=12,
            encoder="boxes",
            dim=128,
        ),
    },
    "semantic": {
        **CONCAT,
        "conditioning": dict(kind="segmentation", num_classes=13, channels=8, halvings=2),
    },
    "superres": {
        **CONCAT,
        "data.degradation": "bicubic",
        "conditioning": dict(kind="lowres", factor=4),
    },
    "superres_bsr": {
        **CONCAT,
        "data.degradation": "bsr_light",
        "conditioning": dict(kind="lowres", factor=4),
    },
    "inpainting": {**CONCAT, "conditioning": dict(kind="inpainting", mask="ldm")},
}


def make(arg, variants, **own):
    """`sections.make` with the tasks as further arguments."""
    return sections.make(arg, {**TASKS, **variants}, **own)
