"""Published first stages against the original's numbers."""

import jax
import numpy as np
import pytest

from latent_diffusion_jax.first_stage import posterior
from latent_diffusion_jax.first_stage.autoencoder import (
    Downsample,
    NonLocalAttention,
    ResnetBlock,
    Upsample,
)
from latent_diffusion_jax.first_stage.stage import make_first_stage
from tests.published import check_module, golden, nhwc, weights


def stage_of(info):
    """The case's config in this package's terms."""
    dd = info["ddconfig"]
    mult = tuple(dd["ch_mult"])
    network = dict(
        channels=dd["ch"],
        channel_mult=mult,
        num_res_blocks=dd["num_res_blocks"],
        z_channels=dd["z_channels"],
        embed_dim=info["embed_dim"],
        attention_levels=tuple(
            level for level in range(len(mult)) if 256 // 2**level in dd["attn_resolutions"]
        ),
    )
    if info["n_embed"]:
        return make_first_stage(kind="vq", codebook_size=info["n_embed"], **network)
    return make_first_stage(kind="kl", **network)


@pytest.fixture(params=["kl-f4", "kl-f8", "vq-f4", "vq-f8"], scope="module")
def case(request):
    arrays, info = golden(f"fs_{request.param}")
    stage = stage_of(info)
    params = weights(jax.eval_shape(stage.init, jax.random.key(0)), info["weight_key_prefix"])
    return stage, params, arrays


def close(ours, published, tolerance=3e-5):
    assert np.abs(np.asarray(ours) - nhwc(published)).max() < tolerance


def test_published_first_stage(case):
    stage, params, a = case
    encode = jax.jit(stage.encode)
    decode = jax.jit(lambda p, z: stage.autoencoder.apply({"params": p}, z, method="decode"))
    moments = encode(params, nhwc(a["x"]))
    close(
        decode(params, nhwc(a["z_given"])),
        a["out_dec_z" if "out_dec_z" in a else "out_dec_noquant"],
    )
    if "out_moments" in a:
        close(moments, a["out_moments"])
        close(stage.mode(moments), a["out_mean"])
        close(posterior.sample(moments, nhwc(a["eps"])), a["out_sample"])
        np.testing.assert_allclose(posterior.kl(moments), a["out_kl"], rtol=1e-5)
        close(stage.decode(params, stage.mode(moments)), a["out_recon_mode"])
        # all-zero inputs show wrong epsilons in the norms
        close(encode(params, np.zeros_like(nhwc(a["x"])[:1])), a["out_zero_moments"])
        close(decode(params, np.zeros_like(nhwc(a["z_given"])[:1])), a["out_zero_dec"])
    else:
        close(moments, a["out_z"])
        quantized = stage.autoencoder.apply({"params": params}, moments, method="quantized")
        np.testing.assert_array_equal(quantized.indices.reshape(-1), a["out_indices"].reshape(-1))
        close(quantized.entries, a["out_zq"])
        close(stage.decode(params, moments), a["out_recon"])
        close(stage.decode(params, nhwc(a["z_given"])), a["out_dec_quant"])


@pytest.mark.parametrize(
    "name,module",
    [
        ("fs_resnet", ResnetBlock(128)),
        ("fs_attn", NonLocalAttention()),
        ("fs_down", Downsample()),
        ("fs_up", Upsample()),
    ],
)
def test_published_block(name, module):
    check_module(name, module)
