"""OpenCLIP's text tower, as Stable Diffusion 2's checkpoints hold it, and transformers' CLIP.

The same numbers under other names, q, k and v in one tensor. Stable Diffusion 2 reads the last
layer but one, so that the last block, the projection to the joint space, its temperature and the
causal mask are in the file and in no network here.
"""

import re
from collections.abc import Iterator, Mapping

from latent_diffusion_jax.convert.files import Tensor
from latent_diffusion_jax.convert.pairs import (
    CONDITIONING,
    Make,
    Pair,
    array_of,
    fused,
    join,
    layer,
    split,
    their_shapes,
)
from latent_diffusion_jax.errors import UserError

OPENCLIP = f"{CONDITIONING}model."
HF = f"{CONDITIONING}transformer.text_model."
BLOCK = re.compile(re.escape(OPENCLIP) + r"transformer\.resblocks\.(\d+)\.")
HF_BLOCK = re.compile(re.escape(HF) + r"encoder\.layers\.(\d+)\.")


def pairs(depth: int) -> Iterator[Pair]:
    """Every tensor of a tower of so many blocks: OpenCLIP's key and transformers' keys."""
    yield Pair(f"{OPENCLIP}token_embedding.weight", (f"{HF}embeddings.token_embedding.weight",))
    position = f"{HF}embeddings.position_embedding.weight"
    yield Pair(f"{OPENCLIP}positional_embedding", (position,))
    for block in range(depth):
        ours = f"{OPENCLIP}transformer.resblocks.{block}"
        theirs = f"{HF}encoder.layers.{block}"
        yield from layer(f"{ours}.ln_1", f"{theirs}.layer_norm1")
        keys = f"{ours}.attn.in_proj_weight", f"{ours}.attn.in_proj_bias"
        yield from fused(keys, (f"{theirs}.self_attn.{x}_proj" for x in "qkv"), heads=1)
        yield from layer(f"{ours}.attn.out_proj", f"{theirs}.self_attn.out_proj")
        yield from layer(f"{ours}.ln_2", f"{theirs}.layer_norm2")
        yield from layer(f"{ours}.mlp.c_fc", f"{theirs}.mlp.fc1")
        yield from layer(f"{ours}.mlp.c_proj", f"{theirs}.mlp.fc2")
    yield from layer(f"{OPENCLIP}ln_final", f"{HF}final_layer_norm")


def is_openclip(tensors: Mapping[str, object]) -> bool:
    """Whether a checkpoint holds its text encoder under OpenCLIP's names."""
    return any(BLOCK.match(key) for key in tensors)


def openclip_to_hf(
    tensors: Mapping[str, Tensor], depth: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """A checkpoint with its text encoder under transformers' names.

    Args:
      tensors: by CompVis key; those beside the text encoder are kept as they are.
      depth: blocks to keep; default: all but the last, as Stable Diffusion 2.

    Returns:
      The tensors, lazy as before, and the keys of OpenCLIP's that are not among them.

    Raises:
      UserError: no text encoder of OpenCLIP's, a part of one, or impossible shapes.
    """
    blocks = {int(match[1]) for key in tensors if (match := BLOCK.match(key))}
    if not blocks:
        raise UserError(f"no text encoder of OpenCLIP: there are no tensors {OPENCLIP}*")
    depth = max(blocks) if depth is None else depth
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith(OPENCLIP)}
    used = set()
    for pair in pairs(depth):
        if pair.ours not in tensors:
            raise UserError(f"OpenCLIP's text encoder lacks {pair.ours!r}")
        used.add(pair.ours)
        found |= _split(pair, tensors[pair.ours])
    return found, [key for key in tensors if key.startswith(OPENCLIP) and key not in used]


def _split(pair: Pair, tensor: Tensor) -> dict[str, Tensor]:
    def part(index: int) -> Make:
        return lambda: split(pair, tensor.read())[index]

    shapes = their_shapes(pair, tensor.shape)
    return {
        name: Tensor(shape, tensor.dtype, part(index))
        for index, (name, shape) in enumerate(zip(pair.theirs, shapes, strict=True))
    }


def hf_to_openclip(tensors: Mapping[str, Make]) -> dict[str, Make]:
    """A checkpoint with its text encoder under OpenCLIP's names, tensors made when asked for.

    What `openclip_to_hf` leaves out is not made up: the last block, `text_projection`,
    `logit_scale` and `attn_mask` are absent.

    Raises:
      UserError: no text encoder of CLIP's, or a part of one.
    """
    blocks = {int(match[1]) for key in tensors if (match := HF_BLOCK.match(key))}
    if not blocks:
        raise UserError(f"no text encoder of CLIP: there are no tensors {HF}*")
    made = {key: make for key, make in tensors.items() if not key.startswith(HF)}
    for pair in pairs(max(blocks) + 1):
        missing = [name for name in pair.theirs if name not in tensors]
        if missing:
            raise UserError(f"CLIP's text encoder lacks {missing[0]!r}")
        made[pair.ours] = _join(pair, [tensors[name] for name in pair.theirs])
    return made


def _join(pair: Pair, parts: list[Make]) -> Make:
    return lambda: join(pair, tuple(array_of(part) for part in parts))
