"""OpenCLIP's text tower <-> transformers' names."""

import numpy as np
import pytest

from latent_diffusion_jax.convert.files import Tensor
from latent_diffusion_jax.convert.openclip import HF, OPENCLIP, hf_to_openclip, openclip_to_hf
from latent_diffusion_jax.errors import UserError
from tests.published import value

WIDTH, BLOCKS = 8, 3
SHAPES = {  # of a block in open_clip's TextTransformer
    "ln_1.weight": (WIDTH,),
    "ln_1.bias": (WIDTH,),
    "attn.in_proj_weight": (3 * WIDTH, WIDTH),
    "attn.in_proj_bias": (3 * WIDTH,),
    "attn.out_proj.weight": (WIDTH, WIDTH),
    "attn.out_proj.bias": (WIDTH,),
    "ln_2.weight": (WIDTH,),
    "ln_2.bias": (WIDTH,),
    "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
    "mlp.c_fc.bias": (4 * WIDTH,),
    "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
    "mlp.c_proj.bias": (WIDTH,),
}
UNUSED = {"text_projection": (WIDTH, WIDTH), "logit_scale": (), "attn_mask": (5, 5)}


def arrays():
    shapes = {
        "token_embedding.weight": (11, WIDTH),
        "positional_embedding": (5, WIDTH),
        "ln_final.weight": (WIDTH,),
        "ln_final.bias": (WIDTH,),
        **UNUSED,
    }
    for block in range(BLOCKS):
        for key, shape in SHAPES.items():
            shapes[f"transformer.resblocks.{block}.{key}"] = shape
    return {OPENCLIP + key: np.asarray(value(key, shape)) for key, shape in shapes.items()}


def lazy(tensors):
    return {k: Tensor(a.shape, a.dtype, lambda a=a: a) for k, a in tensors.items()}


def test_names_shapes_and_what_is_left():
    tensors = {"betas": np.zeros(3, np.float32), **arrays()}
    found, unused = openclip_to_hf(lazy(tensors))
    last = [f"{OPENCLIP}transformer.resblocks.{BLOCKS - 1}.{key}" for key in SHAPES]
    assert set(unused) == {*(OPENCLIP + key for key in UNUSED), *last}
    assert "betas" in found
    block = f"{HF}encoder.layers.1"
    fused = tensors[f"{OPENCLIP}transformer.resblocks.1.attn.in_proj_weight"]
    for i, which in enumerate("qkv"):
        tensor = found[f"{block}.self_attn.{which}_proj.weight"]
        np.testing.assert_array_equal(tensor.read(), fused[i * WIDTH : (i + 1) * WIDTH])
        assert tensor.shape == (WIDTH, WIDTH)
    assert found[f"{HF}embeddings.position_embedding.weight"].shape == (5, WIDTH)
    assert not any(key.startswith(f"{HF}encoder.layers.{BLOCKS - 1}.") for key in found)


def test_back_again():
    tensors = arrays()
    found, unused = openclip_to_hf(lazy(tensors))
    back = hf_to_openclip({key: tensor.read for key, tensor in found.items()})
    assert set(back) == set(tensors) - set(unused)
    for key, make in back.items():
        np.testing.assert_array_equal(make(), tensors[key])


def test_errors():
    tensors = lazy(arrays())
    with pytest.raises(UserError, match="no text encoder of OpenCLIP"):
        openclip_to_hf({})
    with pytest.raises(UserError, match="no text encoder of CLIP"):
        hf_to_openclip({})
    found, _ = openclip_to_hf(tensors)
    with pytest.raises(UserError, match=r"lacks 'cond_stage_model\.model\.ln_final\.bias'"):
        openclip_to_hf({k: t for k, t in tensors.items() if not k.endswith("ln_final.bias")})
    with pytest.raises(UserError, match=r"lacks .*layers\.0\.mlp\.fc1\.bias"):
        hf_to_openclip({k: t.read for k, t in found.items() if not k.endswith("0.mlp.fc1.bias")})
