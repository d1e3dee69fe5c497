"""Class labels through the cross-attention port (paper section 4.3.1; the code's ClassEmbedder).

One token per class, and one for "no class", which condition dropout trains and guidance uses: the
published ImageNet model's class 1000.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from latent_diffusion_jax.conditioning.cond import Cond, Conditioner
from latent_diffusion_jax.errors import UserError, choose


def label(*, num_classes: int, dim: int, null_class: bool = True) -> Conditioner:
    """Labels int32 [B] -> context [B, 1, dim]; the null label is `num_classes`.

    Without `null_class`, as in the published LDM-8 for ImageNet, there is no such label: `null`
    raises UserError.
    """
    rows = num_classes + null_class
    table = nn.Embed(rows, dim, embedding_init=nn.initializers.normal(1.0))

    def init(key):
        return {"embedding": table.init(key, jnp.zeros((1,), jnp.int32))["params"]}

    def apply(params, inputs, to_latent=None):
        tokens: Any = table.apply({"params": params["embedding"]}, inputs["label"])
        return Cond(context=tokens[:, None, :])

    def null(params, inputs):
        if not null_class:
            raise UserError(
                "this model was trained without a null class: it takes guidance scale 1 and"
                " diffusion.condition_dropout 0"
            )
        return {"label": jnp.full_like(jnp.asarray(inputs["label"]), num_classes)}

    def inputs(height, width):
        return {"label": jax.ShapeDtypeStruct((), jnp.int32)}

    return Conditioner(init, apply, null, inputs)


def parse_labels(text: str, num_classes: int, names: Sequence[str] | None) -> list[int]:
    """Reads "red circle,5" as label numbers.

    Raises:
      UserError: a number out of range or a name that is not a class.
    """
    numbers = {name: i for i, name in enumerate(names or ())}
    labels = []
    for word in (word.strip() for word in text.split(",")):
        if word in numbers or not word.removeprefix("-").isdecimal():
            labels.append(choose("class", word, numbers or {f"0..{num_classes - 1}": 0}))
        elif 0 <= int(word) < num_classes:
            labels.append(int(word))
        else:
            raise UserError(f"class {word} is not one of 0..{num_classes - 1}")
    return labels
