"""The architectures of `bench` in PyTorch: the same configs, made by diffusers, measured alike.

    python -m latent_diffusion_jax bench --peers    # starts `python -m benchmarks.peers SPEC`

Networks are of equal parameter count, or nothing is measured, with random weights. A peer's name is
`eager` or `compile` (`torch.compile` of each network; "max-autotune" on GPUs), and `_nhwc` for
channels_last. Attention is diffusers' default, SDPA. In bfloat16, training is under autocast with
float32 weights, everything else has bfloat16 weights. Training is AdamW (fused), with averages of
the UNet by `torch._foreach_lerp_`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # shapes alone are asked of it

from collections.abc import Callable
from typing import Any

import diffusers
import jax
import torch
import torch.nn.functional as F
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.bench.measures import STEPS, changed, sampling_options
from latent_diffusion_jax.bench.worker import Measured, serve
from latent_diffusion_jax.config import read_config
from latent_diffusion_jax.convert.diffusers import first_stage, unet_config
from latent_diffusion_jax.describe import count
from latent_diffusion_jax.errors import UserError, choose

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Peer:
    """How a row is to be run: `peer` of the spec, and its dtype."""

    def __init__(self, name: str, dtype: str):
        self.compiled, self.dtype = name.startswith("compile"), DTYPES[dtype]
        self.layout = torch.channels_last if name.endswith("nhwc") else torch.contiguous_format

    def place(self, network: torch.nn.Module, training: bool = False) -> torch.nn.Module:
        """The network on the device; for inference in the dtype, for training in float32."""
        network = network.to(DEVICE, memory_format=self.layout)
        return network.train() if training else network.eval().to(self.dtype)

    def compile(self, function: Callable) -> Callable:
        """The function compiled, if this peer compiles."""
        if not self.compiled:
            return function
        return torch.compile(function, mode="max-autotune" if CUDA else None)

    def array(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers on the device; images [B, C, H, W] in the layout."""
        x = torch.randn(shape, device=DEVICE, dtype=dtype or self.dtype)
        return x.contiguous(memory_format=self.layout) if x.ndim == 4 else x

    def autocast(self) -> torch.autocast:
        """bfloat16 where training is in it."""
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype != torch.float32)


def make(config: dict[str, Any], parameters: int) -> torch.nn.Module:
    """diffusers' network of a config.json, which must have so many parameters."""
    torch.manual_seed(0)
    network = getattr(diffusers, config["_class_name"]).from_config(config)
    theirs = sum(p.numel() for p in network.parameters())
    if theirs != parameters:
        raise ValueError(f"{theirs:,} parameters, not {parameters:,} as here")
    return network


def make_unet(config: ConfigDict) -> torch.nn.Module:
    """The UNet of a config."""
    network, cond = build.unet(config), build.cond_shapes(config)
    params = build.param_shapes(config)["unet"]
    channels = params["input_blocks.0.0"]["kernel"].shape[2]
    context = None if cond.context is None else cond.context.shape[-1]
    side = build.latent_shape(config)[0]
    theirs = unet_config.to_config(network, channels, context, side)
    return make(theirs, count(params))


def make_stage(config: ConfigDict) -> torch.nn.Module:
    """The first stage of a config."""
    stage = build.first_stage(config)
    if stage.autoencoder is None:
        raise UserError("the first stage is the identity")
    theirs = first_stage.to_config(stage.autoencoder, 1.0, config.data.image_size)
    return make(theirs, count(jax.eval_shape(stage.init, jax.random.key(0))))


def given(config: ConfigDict, peer: Peer, **types: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(z_t with what is beside it, t, context or none) for the UNet."""
    rows, cond = config.train.batch_size, build.cond_shapes(config)
    side, _, channels = build.latent_shape(config)
    if cond.embedding is not None:
        raise UserError("no peer takes an embedding that is added to the one of t")
    channels += 0 if cond.concat is None else cond.concat.shape[-1]
    z, t = peer.array(rows, channels, side, side, **types), torch.full((rows,), 500, device=DEVICE)
    if cond.context is None:
        return z, t
    return z, t, peer.array(rows, *cond.context.shape[1:], **types)


def forward(config: ConfigDict, peer: Peer) -> Measured:
    """The UNet, once."""
    network = peer.place(make_unet(config))
    call, inputs = peer.compile(network), given(config, peer)

    @torch.no_grad()
    def run():
        call(*inputs, return_dict=False)

    return measured(config, run, network)


def train(config: ConfigDict, peer: Peer, online: bool = False) -> Measured:
    """A step of phase 2: noise, UNet, mean squared error, AdamW, averages.

    Of a condition that is trained too, the class's embedding is; other encoders have no peer.
    """
    kind = config.conditioning.kind
    if kind not in ("none", "label") and not build.conditioner(config).frozen:
        raise UserError(f"no peer trains a conditioning of kind {kind!r}")
    network = peer.place(make_unet(config), training=True)
    z, t, *context = given(config, peer, dtype=torch.float32)
    averaged = [p.detach().clone() for p in network.parameters()]
    trained = list(network.parameters())
    table = None
    if kind == "label":
        classes = count(jax.eval_shape(build.conditioner(config).init, jax.random.key(0)))
        dim = config.conditioning.dim
        table = torch.nn.Embedding(classes // dim, dim, device=DEVICE)
        trained += list(table.parameters())
        labels = torch.zeros((config.train.batch_size,), dtype=torch.long, device=DEVICE)
    if online:
        side, rows = config.data.image_size, config.train.batch_size
        stage = peer.place(make_stage(config))
        image = peer.array(rows, 3, side, side)
        encode = peer.compile(stage.encode)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=True)
    call = peer.compile(network)
    alphas = torch.linspace(0.999, 0.01, 1000, device=DEVICE)

    def run():
        z0 = z
        if online:
            with torch.no_grad():
                found = encode(image)
                z0 = found.latent_dist.sample() if "latent_dist" in found else found.latents
                z0 = z0.float()
        noise, a = torch.randn_like(z0), alphas[torch.randint_like(t, 1000)].view(-1, 1, 1, 1)
        z_t = a.sqrt() * z0 + (1 - a).sqrt() * noise
        words = (table(labels)[:, None],) if table is not None else tuple(context)
        with peer.autocast():
            out = call(z_t, t, *words, return_dict=False)[0]
        F.mse_loss(out.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(network.parameters()), 1e-4)

    return measured(config, run, network, *([] if table is None else [table]))


def train_online(config: ConfigDict, peer: Peer) -> Measured:
    """A step of phase 2 that encodes its images."""
    return train(config, peer, online=True)


def train_first_stage(config: ConfigDict, peer: Peer) -> Measured:
    """A step of phase 1: squared error and KL, Adam."""
    if config.loss.perceptual_weight or config.discriminator.kind != "none":
        raise UserError("no peer has LPIPS or a discriminator")
    if config.first_stage.kind != "kl":
        raise UserError("no peer trains a first stage but of kind 'kl'")
    network = peer.place(make_stage(config), training=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    rows, side = config.train.batch_size, config.data.image_size
    image = peer.array(rows, 3, side, side, dtype=torch.float32)
    encode, decode = peer.compile(network.encode), peer.compile(network.decode)
    weight = config.loss.kl_weight

    def run():
        with peer.autocast():
            found = encode(image).latent_dist
            out = decode(found.sample()).sample
        loss = F.mse_loss(out.float(), image) + weight * found.kl().float().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measured(config, run, network)


def encode(config: ConfigDict, peer: Peer) -> Measured:
    """Images to moments, from the host and back."""
    network = peer.place(make_stage(config))
    rows, side = config.train.batch_size, config.data.image_size
    image, call = torch.randn(rows, 3, side, side), peer.compile(network.encode)

    @torch.no_grad()
    def run():
        x = image.to(DEVICE, peer.dtype).contiguous(memory_format=peer.layout)
        found = call(x)
        (found.latent_dist.parameters if "latent_dist" in found else found.latents).float().cpu()

    return measured(config, run, network)


def decode(config: ConfigDict, peer: Peer) -> Measured:
    """Latents to images."""
    network, stage = peer.place(make_stage(config)), build.first_stage(config)
    side = config.data.image_size // stage.factor
    z = peer.array(config.train.batch_size, stage.channels, side, side)
    call = peer.compile(network.decode)

    @torch.no_grad()
    def run():
        call(z, return_dict=False)

    return measured(config, run, network)


def sample(config: ConfigDict, peer: Peer) -> Measured:
    """Images by 50 steps of DDIM with guidance; encoders of text are left out."""
    network, stage = peer.place(make_unet(config)), peer.place(make_stage(config))
    scale = sampling_options(config)["scale"]
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(STEPS)
    call, decode = peer.compile(network), peer.compile(stage.decode)
    z, _, *context = given(config, peer)
    own = build.latent_shape(config)[2]
    beside = z[:, own:]
    guided = scale != 1

    def twice(x):
        return torch.cat([x, x]) if guided else x

    @torch.no_grad()
    def run():
        x, rest = torch.randn_like(z[:, :own]), [twice(c) for c in context]
        for t in scheduler.timesteps:
            both = twice(torch.cat([x, beside], 1))
            out = call(both, t.to(DEVICE).expand(len(both)), *rest, return_dict=False)[0]
            if guided:
                null, asked = out.chunk(2)
                out = null + scale * (asked - null)
            x = scheduler.step(out, t, x).prev_sample
        decode(x, return_dict=False)

    return measured(config, run, network, stage)


MEASURES = {
    "forward": forward,
    "train_cached": train,
    "train_online": train_online,
    "train_first_stage": train_first_stage,
    "encode": encode,
    "decode": decode,
    "sample": sample,
}


def measured(config: ConfigDict, run: Callable[[], Any], *networks: torch.nn.Module) -> Measured:
    """What a worker serves: done when the device is."""

    def call():
        run()
        if CUDA:
            torch.cuda.synchronize()

    return Measured(
        call,
        config.train.batch_size,
        parameters=sum(p.numel() for network in networks for p in network.parameters()),
        device=f"1 x {torch.cuda.get_device_name() if CUDA else 'cpu'}",
        peak=torch.cuda.max_memory_allocated if CUDA else None,
    )


def prepare(spec: dict[str, Any]) -> Measured:
    """What a row of `bench` asks of a peer."""
    if hasattr(os, "sched_getaffinity"):  # as many threads as XLA has
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as JAX does
    torch.backends.cudnn.benchmark = True
    config = read_config(spec["config"])
    config = changed(config, {"train.batch_size": spec["batch"], "dtype": "float32"})
    peer = Peer(spec["peer"], spec["dtype"])
    return choose("measure of peers", spec["what"], MEASURES)(config, peer)


if __name__ == "__main__":
    serve(prepare)
