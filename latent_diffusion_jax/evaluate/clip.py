"""CLIP score: how well images fit their captions, by CLIP (Radford et al. 2021).

100 max(cos, 0) of the embeddings of an image and its caption, averaged: torchmetrics' convention.
Module names are those of transformers' `CLIPModel`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from latent_diffusion_jax.nn.layers import conv, dense, layer_norm
from latent_diffusion_jax.nn.transformer import ClipText, clip_layers

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
BATCH = 32


class ClipImage(nn.Module):
    """CLIP's image tower, a vision transformer whose first token stands for the image.

    Attributes:
      image_size, patch_size: in pixels.
      dim, depth, num_heads, activation: as for `ClipText`.
    """

    image_size: int
    patch_size: int
    dim: int
    depth: int
    num_heads: int
    activation: str

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """float32 [B, image_size, image_size, 3], as `prepare` makes them -> [B, dim]."""
        place, plain = "vision_model.embeddings", nn.initializers.normal(0.02)
        patches = conv(
            self.dim,
            f"{place}.patch_embedding",
            dtype=jnp.float32,
            width=self.patch_size,
            stride=self.patch_size,
            padding=0,
            use_bias=False,
        )(images)
        first = self.param(f"{place}.class_embedding", plain, (self.dim,))
        first = jnp.broadcast_to(first, (len(images), 1, self.dim))
        x = jnp.concatenate([first, patches.reshape(len(images), -1, self.dim)], axis=1)
        positions = nn.Embed(x.shape[1], self.dim, name=f"{place}.position_embedding")
        x = x + positions(jnp.arange(x.shape[1])[None])
        x = layer_norm("vision_model.pre_layrnorm", dtype=jnp.float32)(x)
        x = clip_layers(
            x,
            "vision_model.encoder.layers",
            depth=self.depth,
            num_heads=self.num_heads,
            activation=self.activation,
            is_causal=False,
            dtype=jnp.float32,
        )
        return layer_norm("vision_model.post_layernorm", dtype=jnp.float32)(x[:, 0])


class Clip(nn.Module):
    """Both towers and their projections to `projection_dim` channels."""

    text: ClipText
    image: ClipImage
    projection_dim: int

    @nn.compact
    def __call__(self, images: jax.Array, tokens: jax.Array) -> jax.Array:
        """Images as `ClipImage`'s, tokens int32 [B, n] -> the cosines, float32 [B].

        A caption is what its end token has seen: the first of the highest number.
        """

        def unit(x, name):
            x = dense(self.projection_dim, name, dtype=jnp.float32, use_bias=False)(x)
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        ends = jnp.argmax(tokens, axis=1)[:, None, None]
        read = jnp.take_along_axis(self.text(tokens), ends, axis=1)[:, 0]
        seen = self.image(images)
        return jnp.sum(unit(seen, "visual_projection") * unit(read, "text_projection"), axis=-1)


def prepare(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [side, side, 3]: the short side resized bicubically, then cut."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    size = (int(width * scale), int(height * scale))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    square = resized[top : top + side, left : left + side].astype(np.float32) / 255
    return (square - MEAN) / DEVIATION


def make_clip_score(
    network: Clip, params: Any, tokenize: Callable[[Sequence[str]], np.ndarray]
) -> Callable[[Sequence[np.ndarray], Sequence[Mapping[str, Any]]], dict[str, float]]:
    """Gives the measure of images uint8 [H, W, 3] and examples that hold a `caption` each."""
    cosines = jax.jit(network.apply)
    side = network.image.image_size

    def measure(images, examples):
        total = 0.0
        captions = [example["caption"] for example in examples]
        for start in range(0, len(images), BATCH):
            rows = np.stack([prepare(image, side) for image in images[start : start + BATCH]])
            tokens = tokenize(captions[start : start + BATCH])
            number = len(rows)
            rows = np.pad(rows, [(0, BATCH - number)] + [(0, 0)] * 3)
            tokens = np.pad(tokens, [(0, BATCH - number), (0, 0)])
            found = np.asarray(cosines({"params": params}, rows, tokens))[:number]
            total += float(np.maximum(found, 0).sum())
        return {"clip_score": 100 * total / len(images)}

    return measure
