"""What the adversarial term costs: passes of each network, counted in the traced step."""

import math
from collections import Counter

import jax
import jax.numpy as jnp

from latent_diffusion_jax.first_stage.adversary import judge, make_adversary
from latent_diffusion_jax.first_stage.losses import hinge
from latent_diffusion_jax.first_stage.objective import make_criterion
from latent_diffusion_jax.first_stage.stage import make_first_stage

SIDE, ROWS = 32, 2
STAGE = make_first_stage(
    kind="kl",
    channels=32,
    channel_mult=(1, 2, 4),
    num_res_blocks=1,
    z_channels=3,
    embed_dim=3,
)
ADVERSARY = make_adversary(channels=16, num_layers=2)
KEY = jax.random.key(0)
IMAGE = jax.ShapeDtypeStruct((ROWS, SIDE, SIDE, 3), jnp.float32)
AUTOENCODER = jax.eval_shape(STAGE.init, KEY)
DISCRIMINATOR, STATISTICS = jax.eval_shape(ADVERSARY.init, KEY)


def sub_jaxprs(equation):
    for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def products(jaxpr):
    """(operation, shapes) -> [how often, FLOPs] of the convolutions and products that count."""
    live = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    for equation in reversed(jaxpr.eqns):
        if not live.intersection(equation.outvars):
            continue  # nothing reads it: XLA takes it out
        live.update(v for v in equation.invars if not hasattr(v, "val"))
        for inner in sub_jaxprs(equation):
            yield from products(inner)
        name = equation.primitive.name
        if name not in ("conv_general_dilated", "dot_general"):
            continue
        out = math.prod(equation.outvars[0].aval.shape)
        left, right = (v.aval.shape for v in equation.invars)
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(left[axis] for axis in contracted)
        else:
            channel_out = equation.params["dimension_numbers"].rhs_spec[0]
            terms = math.prod(right) // right[channel_out]
        yield (name, left, right), 2 * out * terms


def cost(function, *arguments):
    """(FLOPs, how often each kind of product occurs)."""
    found = list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    return sum(flops for _, flops in found), Counter(kind for kind, _ in found)


def step_cost(adversary):
    criterion = make_criterion(STAGE, kind="kl", adversary=adversary, perceptual_weight=0.0)

    def step(params, buffers, image):
        total = []
        for gradients in criterion.gradients:
            _, found, metrics = gradients(params, buffers, {}, {"image": image}, KEY, 0)
            total.append((found, metrics.get("adaptive_weight", 0)))
        return total

    params = {"autoencoder": AUTOENCODER, "discriminator": DISCRIMINATOR}
    return cost(step, params, {"discriminator": STATISTICS}, IMAGE)


def of_discriminator():
    """Both batches forward, its own gradients, and the reconstruction's: its own part."""

    def own(params, statistics, image, image_hat):
        buffers = {"discriminator": statistics}
        both = {"discriminator": params}
        real, pull_real, _ = judge(ADVERSARY, both, buffers, image)
        fake, pull_fake, _ = judge(ADVERSARY, both, buffers, image_hat)
        d_real, d_fake = jax.grad(hinge, argnums=(0, 1))(real, fake)
        return pull_real(d_real)[0], pull_fake(d_fake)[0], pull_fake(-jnp.ones_like(fake))[1]

    return cost(own, DISCRIMINATOR, STATISTICS, IMAGE, IMAGE)


def test_the_autoencoder_runs_once_forward_and_once_backward():
    """The last convolution is pulled back once more; everything before it is as without."""
    forward, _ = cost(
        lambda p, x: STAGE.decode(p, STAGE.mode(STAGE.encode(p, x))), AUTOENCODER, IMAGE
    )
    plain, kinds = step_cost(None)
    assert 2.9 * forward < plain < 3.1 * forward  # a backward pass is two forward ones
    adversarial, more = step_cost(ADVERSARY)
    own, discriminator = of_discriminator()
    extra = more - kinds - discriminator
    last = (ROWS, SIDE, SIDE, 32)
    assert 1 <= sum(extra.values()) <= 2, extra
    assert all(last in kind or (3, 3, 32, 3) in kind for kind in extra)
    assert adversarial <= 1.35 * plain + own
    # far below the bound: what is left is that one convolution
    assert adversarial - own <= 1.02 * plain


def test_the_published_form_costs_another_forward_pass():
    plain, _ = step_cost(None)
    own, _ = of_discriminator()
    published, _ = step_cost(ADVERSARY._replace(second_forward=True))
    reused, _ = step_cost(ADVERSARY)
    assert published - reused > 0.3 * plain
    assert published > 1.3 * plain + own


def test_counting_agrees_with_xla():
    """The count above against XLA's own, of a program that has nothing that is not used."""

    def forward(params, image):
        return STAGE.encode(params, image)

    ours, _ = cost(forward, AUTOENCODER, IMAGE)
    theirs = jax.jit(forward).lower(AUTOENCODER, IMAGE).cost_analysis()["flops"]
    assert 0.85 < ours / theirs < 1.15
