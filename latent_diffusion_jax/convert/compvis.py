"""Parameter trees <-> the layout of the published (CompVis) checkpoints.

Module names are the published ones, so that a key is the path through a tree joined by dots, with
`kernel`, `scale` and `embedding` read as `weight`. What is left is the order of a kernel's axes,
and how many axes of size 1 follow: torch keeps some linear maps as 1x1 convolutions.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latent_diffusion_jax import build
from latent_diffusion_jax.convert.files import Tensor
from latent_diffusion_jax.convert.pairs import CONDITIONING, FIRST_STAGE, UNET, Make
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.sharding import state_shardings
from latent_diffusion_jax.train.state import TRAINING_ONLY

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
EMA = "model_ema."
BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
POINTWISE = ("skip_connection", "nin_shortcut", "quant_conv", "post_quant_conv", "channel_mapper")


class Weights(NamedTuple):
    """What a checkpoint holds, as trees by network.

    params: what the config's phase trains; ema: its averages; frozen: first_stage, conditioning.
    """

    params: dict[str, Any]
    ema: dict[str, Any]
    frozen: dict[str, Any]


def shapes(config: ConfigDict) -> Weights:
    """The trees of shapes that a config's checkpoint fills."""
    params = build.param_shapes(config)
    params = {name: tree for name, tree in params.items() if name not in TRAINING_ONLY}
    ema = {name: params[name] for name in config.train.ema_networks}
    return Weights(params, ema, build.frozen_shapes(config))


def prefixes(config: ConfigDict) -> dict[str, str]:
    """Network -> what its keys begin with."""
    if config.phase == "first_stage":
        return {"autoencoder": ""}
    return {"unet": UNET, "first_stage": FIRST_STAGE, "conditioning": CONDITIONING}


def ema_key(key: str) -> str:
    """The name of a weight's average: without `model.`, and without dots."""
    return EMA + key.removeprefix("model.").replace(".", "")


def leaves(tree: Any, prefix: str) -> Iterator[tuple[str, str, Any]]:
    """(key, kind of leaf, leaf) for each leaf of a tree of parameters or shapes."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *modules, kind = (entry.key for entry in path)
        yield prefix + ".".join([*modules, LEAVES[kind]]), kind, leaf


def read_tree(
    tree: Any, prefix: str, tensors: Mapping[str, Tensor], mesh: Mesh, name: Callable[[str], str]
) -> Any:
    """Fills a tree of shapes from a checkpoint, laid out on the mesh, a tensor at a time.

    `name` maps a weight's key to the one to read, such as `ema_key`.

    Raises:
      UserError: a tensor that is missing, or has another shape or no numbers.
    """
    wanted = [name(key) for key, _, _ in leaves(tree, prefix)]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of {len(wanted)} tensors of this config, such as"
            f" {missing[0]!r}"
        )
    shardings = jax.tree.leaves(state_shardings(tree, mesh))

    def fill(key: str, kind: str, leaf: Any, sharding: Any) -> jax.Array:
        array = from_torch(key, tensors[key], kind, leaf.shape)
        # transfers run behind: not waited for, they would hold many arrays twice
        return jax.block_until_ready(jax.device_put(array, sharding))

    filled = [
        fill(name(key), kind, leaf, sharding)
        for (key, kind, leaf), sharding in zip(leaves(tree, prefix), shardings, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), filled)


def from_torch(key: str, tensor: Tensor, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter, float32 in this package's layout, from torch's.

    Raises:
      UserError: another shape, or not floating point.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{key!r} is {tensor.dtype} in the checkpoint, not floating point")
    if not fits(tensor.shape, kind, shape):
        raise UserError(
            f"{key!r} is {list(tensor.shape)} in the checkpoint, where the config has {list(shape)}"
            f" (a {kind})"
        )
    array = tensor.read().astype(np.float32, copy=False)
    if kind != "kernel":
        return array
    if len(shape) == 2:
        return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
    return np.ascontiguousarray(array.transpose(2, 3, 1, 0))


def fits(torch_shape: tuple[int, ...], kind: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of torch's can be the parameter of this shape."""
    if kind != "kernel":
        return torch_shape == shape
    if len(shape) == 2:
        return torch_shape[:2] == shape[::-1] and set(torch_shape[2:]) <= {1}
    return torch_shape == (shape[3], shape[2], *shape[:2])


def to_torch(leaf: Any, kind: str, rank: int) -> np.ndarray:
    """A parameter in torch's layout; `rank` is that of its tensor there."""
    array = np.asarray(leaf)
    if kind != "kernel":
        return array
    array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(array.reshape(*array.shape, *[1] * (rank - array.ndim)))


def torch_rank(key: str, keys: Mapping[str, Any], linear_projections: bool) -> int:
    """The rank that torch gives to a kernel of two axes: 3 and 4 are convolutions of width 1."""
    module = key.removesuffix(".weight")
    parent, _, last = module.rpartition(".")
    if last in POINTWISE or (last in ("q", "k", "v") and f"{parent}.norm.weight" in keys):
        return 4
    if last == "qkv" or (last == "proj_out" and f"{parent}.qkv.weight" in keys):
        return 3
    if last in ("proj_in", "proj_out"):
        return 2 if linear_projections and f"{parent}.proj_in.weight" in keys else 4
    return 2


def write_tree(tree: Any, prefix: str, linear_projections: bool = False) -> dict[str, Make]:
    """Key -> function that makes the tensor in torch's layout."""
    found = {key: (kind, leaf) for key, kind, leaf in leaves(tree, prefix)}

    def make(key: str, kind: str, leaf: Any) -> Make:
        rank = leaf.ndim
        if kind == "kernel" and rank == 2:
            rank = torch_rank(key, found, linear_projections)
        return lambda: to_torch(leaf, kind, rank)

    return {key: make(key, kind, leaf) for key, (kind, leaf) in found.items()}


def load(
    tensors: Mapping[str, Tensor], config: ConfigDict, mesh: Mesh, *, raw: bool = False
) -> Weights:
    """Reads a checkpoint of the config's model; keys that it has beyond are left.

    Averages are read where the config keeps some and the file has them; else, and with `raw`, they
    start at the weights.

    Raises:
      UserError: a tensor that is missing or has another shape, or averages of a part only.
    """
    wanted, prefix = shapes(config), prefixes(config)

    def read(network: str, tree: Any, name: Callable[[str], str] = str) -> Any:
        return read_tree(tree, prefix[network], tensors, mesh, name)

    averaged = not raw and any(key.startswith(EMA) for key in tensors)
    params = {network: read(network, tree) for network, tree in wanted.params.items()}
    ema = {
        network: read(network, tree, ema_key) if averaged else params[network]
        for network, tree in wanted.ema.items()
    }
    frozen = {n: read(n, tree) if tree else {} for n, tree in wanted.frozen.items()}
    return Weights(params, ema, frozen)


def named(weights: Weights, config: ConfigDict, step: int = 0) -> dict[str, Make]:
    """Every tensor of a checkpoint by its published key, in the published order.

    `step` counts the updates of the averages.
    """
    prefix = prefixes(config)
    if config.phase == "first_stage":
        return write_tree(weights.params["autoencoder"], prefix["autoencoder"])
    linear = bool(config.unet.get("linear_projections", False))
    trees = {**weights.params, **weights.frozen}
    constants = {**buffers(config), "scale_factor": np.float32(config.latents.scale)}
    out = {name: _constant(value) for name, value in constants.items()}
    out |= write_tree(trees["unet"], UNET, linear)
    if weights.ema:
        out[f"{EMA}decay"] = _constant(np.float32(config.train.ema_decay))
        out[f"{EMA}num_updates"] = _constant(np.int32(step))
    for network, tree in weights.ema.items():
        averages = write_tree(tree, prefix[network], linear)
        out |= {ema_key(key): make for key, make in averages.items()}
    out |= write_tree(trees.get("first_stage", {}), FIRST_STAGE)
    return out | write_tree(trees.get("conditioning", {}), CONDITIONING)


def _constant(value: Any) -> Make:
    return lambda: np.asarray(value)


def buffers(config: ConfigDict) -> dict[str, np.ndarray]:
    """The schedule as the original keeps it, float32 [T] each (Ho et al. 2020, eq. 4 to 7)."""
    betas = build.betas(config)
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1 - previous) / (1 - alphas_cumprod)
    values = (
        betas,
        alphas_cumprod,
        previous,
        np.sqrt(alphas_cumprod),
        np.sqrt(1 - alphas_cumprod),
        np.log(1 - alphas_cumprod),
        np.sqrt(1 / alphas_cumprod),
        np.sqrt(1 / alphas_cumprod - 1),
        variance,
        np.log(np.maximum(variance, 1e-20)),
        betas * np.sqrt(previous) / (1 - alphas_cumprod),
        (1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
    )
    return {name: v.astype(np.float32) for name, v in zip(BUFFERS, values, strict=True)}


def twin(key: str) -> str:
    """The first stage's key for one of a conditioner that is the first stage itself."""
    return FIRST_STAGE + key.removeprefix(CONDITIONING) if key.startswith(CONDITIONING) else key


def same_schedule(betas: np.ndarray, others: np.ndarray) -> bool:
    """Whether two schedules are one, but for rounding."""
    return betas.shape == others.shape and np.allclose(betas, others, rtol=1e-4, atol=0)
