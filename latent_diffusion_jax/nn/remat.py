"""Which activations a network keeps for its backward pass, and which it computes again there.

Source: Chen et al. 2016. By resolution, because activations at twice the side take four times the
memory, while most FLOPs are where channels are many.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from latent_diffusion_jax.errors import UserError, choose


def _is_product(primitive: Any, *args: Any, **params: Any) -> bool:
    """Convolutions and products with weights; attention's own grow with the square of positions."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive.name == "conv_general_dilated" or dots(primitive, *args, **params)


# policy -> what is kept within a block beside its input
POLICIES: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": _is_product,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def policies(remat: str, levels: int) -> dict[int, str]:
    """Downsampling factor -> policy, for 1, 2, 4 ... of `levels` resolutions.

    `remat` is a policy for all, "full", or pairs, "1:full,2:dots", where the others have "none".

    Raises:
      UserError: a policy or a factor that there is not.
    """
    found = {2**level: "none" for level in range(levels)}
    pairs = [pair.split(":") for pair in str(remat).split(",")]  # of a config: any value
    if len(pairs[0]) == 1:
        pairs = [[str(factor), remat] for factor in found]
    for factor, *policy in pairs:
        if len(policy) != 1:
            raise UserError(f"remat={remat!r} is neither a policy nor pairs as '1:full,2:dots'")
        choose("factor in remat:", factor, {str(f): f for f in found})
        choose("policy in remat:", policy[0], POLICIES)
        found[int(factor)] = policy[0]
    return found


def rematerialise(target: Any, policy: str, static_argnums: Sequence[int] = ()) -> Any:
    """A module class, or a function (module, x), by a policy; same parameters, same numbers."""
    if policy == "none":
        return target
    return nn.remat(target, policy=POLICIES[policy], static_argnums=tuple(static_argnums))
