"""What is computed again changes what is kept, and no parameter; gradients: tests of the losses."""

import jax
import jax.numpy as jnp
import pytest

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.first_stage.stage import make_first_stage
from latent_diffusion_jax.nn.remat import policies
from latent_diffusion_jax.nn.unet import UNet

SMALL = dict(channel_mult=(1, 2), num_res_blocks=1, num_groups=2)
KEY, Z = jax.random.key(0), jnp.zeros((1, 16, 16, 3))
COND = Cond(context=jnp.zeros((1, 1, 4)))


def unet(remat, **options):
    """A function of the parameters, and their shapes."""
    attention = dict(attention_resolutions=(1, 2), num_heads=2, transformer_depth=1)
    options = {**SMALL, **attention, **options}
    network = UNet(model_channels=8, out_channels=3, remat=remat, **options)
    shapes = jax.eval_shape(network.init, KEY, Z, 0, COND)["params"]
    return lambda params: network.apply({"params": params}, Z, 0, COND), shapes


def autoencoder(remat):
    options = dict(channels=8, z_channels=2, embed_dim=2, attention_levels=(0,), **SMALL)
    stage = make_first_stage(kind="kl", remat=remat, **options)
    shapes = jax.eval_shape(stage.init, KEY)
    return lambda params: stage.decode(params, stage.mode(stage.encode(params, Z))), shapes


def arrays_kept(network, remat, **options):
    """What the backward pass finds, and the shapes of the parameters."""
    function, shapes = network(remat, **options)
    return jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(function, p)[1], shapes)), shapes


def kept(network, remat):
    """Bytes that the backward pass finds, and the shapes of the parameters."""
    arrays, shapes = arrays_kept(network, remat)
    return sum(x.size * x.dtype.itemsize for x in arrays), shapes


@pytest.mark.parametrize("network", [unet, autoencoder])
def test_less_is_kept_resolution_by_resolution(network):
    found = {r: kept(network, r) for r in ("none", "2:full", "1:full", "full", "dots")}
    size = {remat: bytes_kept for remat, (bytes_kept, _) in found.items()}
    assert size["none"] > size["2:full"] > size["1:full"] > size["full"]
    # a finer resolution has four times the positions, here with half the channels
    assert size["none"] - size["1:full"] > 1.5 * (size["none"] - size["2:full"])
    assert size["none"] > size["dots"] > size["full"]
    assert all(shapes == found["none"][1] for _, shapes in found.values())


def test_changing_up_inside_a_block_counts_as_the_finer():
    changes = dict(resblock_updown=True, attention_resolutions=(), channel_mult=(1, 3))
    fine, coarse = (arrays_kept(unet, remat, **changes)[0] for remat in ("1:full", "2:full"))
    inside = (1, 16, 16, 24)  # the coarser level's channels at the finer resolution
    assert inside not in [x.shape for x in fine]
    assert inside in [x.shape for x in coarse]


def test_policies_by_resolution():
    assert policies("none", 2) == {1: "none", 2: "none"}
    assert policies("full", 3) == {1: "full", 2: "full", 4: "full"}
    assert policies("1:full,4:dots", 3) == {1: "full", 2: "none", 4: "dots"}
    for remat, message in {
        "ful": "unknown policy in remat: 'ful'; did you mean 'full'",
        "3:full": "unknown factor in remat: '3'; one of 1, 2",
        "1:dot": "'dot'; did you mean 'dots'",
        False: "unknown policy in remat: False; one of dots, full, none",
        "1:full,dots": "neither a policy nor pairs as '1:full,2:dots'",
    }.items():
        with pytest.raises(UserError, match=message):
            policies(remat, 2)
