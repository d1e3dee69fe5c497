"""What the configs of published models share; each of those files gives what is its own.

Where a checkpoint came with its settings, those stand; else the paper's tables (appendix E). Tables
are those of arXiv:2112.10752v2, "the model zoo" is the original repository's README. Learning rates
are for the published batch, by the original's rule: base rate x devices x images per device x
`accumulate`. Averages are kept everywhere (the two whose settings say `use_ema: False` came with
settings for sampling only); `sample` is as in the original's scripts. Section `published` says what
was published; training does not read it.

Every config has the argument `:tiny`, a smoke run on the embedded data.
"""

from configs import sections

BERT, CLIP = "bert-base-uncased", "openai/clip-vit-large-patch14"  # tokenizers; or a folder of one


def autoencoder(kind, channel_mult, z_channels, **changes):
    """A first stage's network, as published: 128 channels, f = 2^(levels - 1)."""
    section = dict(
        kind=kind,
        channels=128,
        channel_mult=channel_mult,
        num_res_blocks=2,
        z_channels=z_channels,
        embed_dim=z_channels,
        attention_levels=(),
        mid_attention=True,
        dropout=0.0,
        num_groups=32,
        remat="none",
    )
    return {**section, **changes}


def unet(model_channels, channel_mult, attention_resolutions, **changes):
    """A UNet, as published; `changes` hold `num_heads` or `num_head_channels`."""
    section = dict(
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=2,
        attention_resolutions=attention_resolutions,
        transformer_depth=0,
        dropout=0.0,
        num_groups=32,
        remat="none",
    )
    return {**section, **changes}


def text(dim, depth):
    """The paper's transformer on BERT's tokens, 77 of them."""
    return dict(kind="text", vocab_size=30_522, max_length=77, dim=dim, depth=depth)


def clip(dim, depth, num_heads, activation, **changes):
    """CLIP's frozen text tower, on 77 tokens."""
    section = dict(
        kind="clip",
        max_length=77,
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        activation=activation,
    )
    return {**section, **changes}


def inpainting(text):
    """Stable Diffusion's condition for inpainting: its text, and the masked image beside z_t."""
    return dict(
        kind="several",
        text=text,
        inpainting=dict(kind="inpainting", mask="stable_diffusion"),
    )


def layout(num_classes, depth):
    """The paper's transformer on 30 boxes and the crop."""
    return dict(
        kind="layout",
        vocab_size=8192,
        max_objects=30,
        num_classes=num_classes,
        dim=512,
        depth=depth,
    )


def first_stage(arg, *, network, lr, batch_size, steps, disc_start, published, **changes):
    """A first stage as published; `changes` are of its discriminator.

    The model zoo's were trained on OpenImages (shorter side 384, crops of 256), with this batch and
    this rate per device; on how many is not published. The original's recipes for ImageNet
    (`configs/autoencoder`) take batches of 12, twice accumulated, at 1.08e-4. Without the files of
    LPIPS: --config.loss.perceptual_weight=0.
    """
    losses = dict(
        kl=dict(pixel="l1", perceptual_weight=1.0, kl_weight=1e-6),
        vq=dict(
            pixel="l1",
            perceptual_weight=1.0,
            codebook_weight=1.0,
            beta=0.25,
            legacy=True,
            restart_after=0,
        ),
    )
    weight = dict(kl=0.5, vq=0.75)[network["kind"]]
    return sections.make(
        arg,
        {"tiny": tiny},
        phase="first_stage",
        data=sections.folder(256, flip=False),
        first_stage=network,
        loss=losses[network["kind"]],
        discriminator=sections.discriminator(lr, disc_start, **{"weight": weight, **changes}),
        optim=sections.adam(lr),
        train=sections.train(batch_size, ema_decay=0.0, ema_networks=()),
        run=sections.run(steps=steps),
        published=published,
    )


def diffusion(arg, variants=None, **own):
    """A diffusion model as published.

    The sections that `own` lacks: 256 pixels, a latent used as it is, no condition, no guidance.
    """
    shared = dict(
        phase="diffusion",
        data=sections.folder(256, flip=False),
        conditioning=dict(kind="none"),
        diffusion=sections.diffusion(condition_dropout=0.0),
        latents=sections.latents(scale=1.0),
        sample=sections.sample(scale=1.0),
    )
    return sections.make(arg, {**(variants or {}), "tiny": tiny}, **{**shared, **own})


def stable_diffusion(arg, variants=None, **own):
    """A Stable Diffusion as published, by its configs and model cards: 512 pixels, guidance."""
    shared = dict(
        data=sections.folder(512, flip=False, tokenizer=CLIP),
        diffusion=sections.diffusion(schedule=sections.linear(0.00085, 0.012)),
        latents=sections.latents(scale=0.18215),
        optim=sections.adamw(1e-4, schedule=sections.warm_up(10_000)),
        train=sections.train(2048),
        sample=sections.sample(scale=7.5),
    )
    return diffusion(arg, variants, **{**shared, **own})


SMALL = {
    "label": dict(dim=8, num_classes=12),
    "text": dict(dim=8, depth=1, num_heads=2, head_dim=4),
    "layout": dict(dim=8, depth=1, num_heads=2, head_dim=4, num_classes=12),
    "clip": dict(dim=8, depth=1, num_heads=2),
}


SMALL_DISCRIMINATOR = dict(channels=8, num_layers=2, start=2)


def tiny(config):
    """Changes that make any published config small, with all of its parts but the UNet's levels."""
    changes = {**sections.TINY_RUN, "train.batch_size": 8, "train.accumulate": 1}
    factor = 1
    if config.first_stage.kind != "identity":
        levels = len(config.first_stage.channel_mult)
        factor *= 2 ** (levels - 1)
        changes |= _few_channels("first_stage", levels, channels=8, num_groups=2)
    if config.phase == "first_stage":
        changes |= {f"discriminator.{key}": v for key, v in SMALL_DISCRIMINATOR.items()}
        changes["loss.perceptual_weight"] = 0.0  # it would take the files of LPIPS
    if config.phase == "diffusion":
        factor *= 2
        heads = dict(num_heads=2) if "num_heads" in config.unet else dict(num_head_channels=4)
        changes |= _few_channels("unet", 2, model_channels=8, num_groups=4, **heads)
        changes["unet.transformer_depth"] = min(1, config.unet.transformer_depth)
        changes |= _small_condition("conditioning", config.conditioning)
        changes["sample.steps"] = 4
        if config.conditioning.kind == "text":
            changes["data.tokenizer"] = "basic"
    data = sections.shapes(max(32, factor))
    return {**changes, **{f"data.{key}": value for key, value in data.items()}}


def _few_channels(section, levels, **sizes):
    sizes = {**sizes, "channel_mult": (1,) * levels, "num_res_blocks": 1}
    return {f"{section}.{key}": value for key, value in sizes.items()}


def _small_condition(name, section):
    changes = {f"{name}.{key}": value for key, value in SMALL.get(section.kind, {}).items()}
    if section.kind == "several":
        for part in set(section) - {"kind"}:
            changes |= _small_condition(f"{name}.{part}", section[part])
    return changes
