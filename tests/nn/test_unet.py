"""Published UNets against the original's numbers."""

import jax
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.nn.unet import UNet
from tests.published import golden, nhwc, weights


def unet_of(p):
    """The original's `unet_params` in this package's terms."""
    heads = (
        dict(num_head_channels=p["num_head_channels"])
        if "num_head_channels" in p
        else dict(num_heads=p["num_heads"])
    )
    return UNet(
        model_channels=p["model_channels"],
        out_channels=p["out_channels"],
        channel_mult=tuple(p["channel_mult"]),
        num_res_blocks=p["num_res_blocks"],
        attention_resolutions=tuple(p["attention_resolutions"]),
        transformer_depth=p.get("transformer_depth", 1) if p.get("use_spatial_transformer") else 0,
        use_scale_shift_norm=p.get("use_scale_shift_norm", False),
        resblock_updown=p.get("resblock_updown", False),
        **heads,
    )


@pytest.mark.parametrize(
    "name",
    [
        "bsr_sr",
        "celeba256",
        "cin256-v2",
        pytest.param("text2img256", marks=pytest.mark.slow),
        pytest.param("txt2img-1p4B-eval", marks=pytest.mark.slow),
    ],
)
def test_published_unet(name):
    a, info = golden(f"unet_{name}")
    unet = unet_of(info["unet_params"])
    z = nhwc(a["z"])
    cond = Cond(concat=nhwc(a["c_concat"]) if "c_concat" in a else None, context=a.get("context"))
    shapes = jax.eval_shape(unet.init, jax.random.key(0), z, a["t"], cond)["params"]
    params = weights(shapes, info["weight_key_prefix"])
    apply = jax.jit(unet.apply)
    eps = apply({"params": params}, z, a["t"], cond)
    assert np.abs(eps - nhwc(a["out_eps"])).max() < 3e-5
    zero = jax.tree.map(lambda x: np.zeros_like(x[:1]), (z, cond))
    eps = apply({"params": params}, zero[0], a["t"][:1], zero[1])
    assert np.abs(eps - nhwc(a["out_eps_zero_input"])).max() < 3e-5
