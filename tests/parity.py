"""The table of docs/parity.md: `python -m tests.parity` (minutes, and 8 GB for the 1.45 B model).

The shipped configs' networks, with weights made by the formula of golden/README.md, against the
original's numbers: largest absolute difference here, and that of the original itself in float32.
"""

import sys

import jax
import numpy as np

from latent_diffusion_jax import build
from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.convert import compvis
from tests.published import golden, nhwc, weights

FIRST_STAGES = {"kl-f4": "kl_f4", "kl-f8": "kl_f8", "vq-f4": "vq_f4", "vq-f8": "vq_f8"}
UNETS = {
    "celeba256": "celebahq256",
    "bsr_sr": "superres_bsr",
    "cin256-v2": "imagenet256",
    "text2img256": "text2img256",
    "txt2img-1p4B-eval": "text256",
}
TEXTS = {"cond_bert_text2img256": "text2img256", "cond_bert_txt2img-1p4B": "text256"}


def first_stage(name):
    """(output, ours, published) of a first stage: encoder, decoder, and all-zero inputs."""
    a, _ = golden(f"fs_{name}")
    config = load_config(f"configs/first_stage/{FIRST_STAGES[name]}.py")
    stage = build.first_stage(config)
    params = weights(compvis.shapes(config).params["autoencoder"])
    encode = jax.jit(stage.encode)
    decode = jax.jit(lambda p, z: stage.autoencoder.apply({"params": p}, z, method="decode"))
    x, z = nhwc(a["x"]), nhwc(a["z_given"])
    moments = encode(params, x)
    if "out_moments" in a:
        yield "moments", moments, nhwc(a["out_moments"])
        yield "dec_z", decode(params, z), nhwc(a["out_dec_z"])
        yield "recon_mode", stage.decode(params, stage.mode(moments)), nhwc(a["out_recon_mode"])
        yield "zero_moments", encode(params, np.zeros_like(x[:1])), nhwc(a["out_zero_moments"])
        yield "zero_dec", decode(params, np.zeros_like(z[:1])), nhwc(a["out_zero_dec"])
    else:
        yield "z", moments, nhwc(a["out_z"])
        yield "dec_noquant", decode(params, z), nhwc(a["out_dec_noquant"])
        yield "dec_quant", stage.decode(params, z), nhwc(a["out_dec_quant"])
        yield "recon", stage.decode(params, moments), nhwc(a["out_recon"])


def unet(name):
    """(output, ours, published) of a UNet, on an ordinary and on an all-zero input."""
    a, _ = golden(f"unet_{name}")
    config = load_config(f"configs/diffusion/{UNETS[name]}.py")
    params = weights(compvis.shapes(config).params["unet"], compvis.UNET)
    z = nhwc(a["z"])
    cond = Cond(concat=nhwc(a["c_concat"]) if "c_concat" in a else None, context=a.get("context"))
    network = jax.jit(build.denoise_network(config))
    yield "eps", network(params, z, a["t"], cond), nhwc(a["out_eps"])
    z, cond = jax.tree.map(lambda x: np.zeros_like(x[:1]), (z, cond))
    yield "eps_zero_input", network(params, z, a["t"][:1], cond), nhwc(a["out_eps_zero_input"])


def text(name):
    """(output, ours, published) of a text encoder."""
    a, info = golden(name)
    config = load_config(f"configs/diffusion/{TEXTS[name]}.py")
    conditioner = build.conditioner(config)
    shapes = jax.eval_shape(conditioner.init, jax.random.key(0))
    params = weights(shapes, info["weight_key_prefix"])
    apply = jax.jit(lambda params, tokens: conditioner.apply(params, {"tokens": tokens}).context)
    yield "out", apply(params, a["tokens"]), a["out"]


def rows():
    """(case, output, error here, error of the original) for every case."""
    cases = [(f"fs_{name}", first_stage(name)) for name in FIRST_STAGES]
    cases += [(f"unet_{name}", unet(name)) for name in UNETS]
    cases += [(name, text(name)) for name in TEXTS]
    for case, outputs in cases:
        accuracy = golden(case)[1]["accuracy"]
        for output, ours, published in outputs:
            error = float(np.abs(np.asarray(ours) - published).max())
            yield case, output, error, accuracy[output]["f32_max_abs_err"]
            print(case, output, error, file=sys.stderr, flush=True)


def main():
    """Prints the table."""
    print("| case | output | here | original, float32 |\n|---|---|---|---|")
    for case, output, error, theirs in rows():
        print(f"| {case} | {output} | {error:.1e} | {theirs:.1e} |")


if __name__ == "__main__":
    main()
