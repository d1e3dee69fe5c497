"""Weights of published networks by formula (see golden/README.md), and the golden arrays.

A parameter's published key is its path joined by dots; its value follows from key and shape.
"""

import json
import math
import re
import zlib
from pathlib import Path

import jax
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def golden(name):
    """The arrays and the description of a case, image-like arrays to NHWC by `nhwc`."""
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    return arrays, json.loads((GOLDEN / f"{name}.json").read_text())


def nhwc(x):
    return np.moveaxis(x, 1, -1)


def value(key, shape, salt=""):
    """The weight of a key, in torch's layout."""
    seed = zlib.crc32((salt + key).encode())
    n = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)
    if re.search(r"(^|\.)(embedding|[a-z_]*emb)\.weight$", key):
        return n
    if len(shape) >= 2:
        fan_in = np.prod(shape[1:])
        if re.search(r"(^|\.)lin[0-4]\.model\.1\.weight$", key):
            n = np.abs(n)
        if re.search(r"(^|\.)net\.slice[1-5]\.[0-9]+\.weight$", key):
            fan_in = fan_in / 2
        return n * np.float32(1 / np.sqrt(fan_in))
    tenth = np.float32(0.1) * n
    if key.endswith("running_var"):
        return 1 + np.abs(tenth)
    return 1 + tenth if key.endswith("weight") else tenth


def weights(tree, prefix="", salt=""):
    """Formula weights for a tree of shapes."""

    def leaf(path, x):
        *modules, name = (p.key for p in path)
        key = prefix + ".".join([*modules, LEAVES[name]])
        if name == "kernel":  # [kh, kw, in, out] or [in, out]; torch: [out, in, kh, kw]
            torch_shape = (x.shape[-1], x.shape[-2], *x.shape[:-2])
            order = (*range(2, x.ndim), 1, 0)
            return np.ascontiguousarray(value(key, torch_shape, salt).transpose(order))
        return value(key, x.shape, salt)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def discriminator_variables(network, prefix="loss.discriminator."):
    """Parameters and running statistics of a `PatchDiscriminator`."""
    image = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), image, False))
    return {name: weights(tree, prefix) for name, tree in shapes.items()}


def check_module(name, module):
    """A single module of case `modules`, on ordinary and on small inputs, which show epsilons."""
    arrays, info = golden("modules")
    emb, context = arrays["emb"], arrays["context"]
    x, *more = {
        "emb": (nhwc(arrays["x"]), emb),
        "ctx": (nhwc(arrays["x"]), context),
        "tokctx": (arrays["tokens"], context),
        "tok": (arrays["tokens"],),
    }.get(info["call"][name], (nhwc(arrays["x"]),))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, *more)
    variables = {"params": weights(shapes["params"], f"mod.{name}.")}
    published = {k: math.prod(s) for k, s in info["state_dict_shapes"][name].items()}
    assert {k: v.size for k, v in named(variables["params"]).items()} == published
    apply = jax.jit(module.apply)
    for scale in ("1.0", "0.01"):
        expected = arrays[f"out_{name}/scale{scale}"]
        expected = nhwc(expected) if expected.ndim == 4 else expected
        ours = apply(variables, np.float32(scale) * x, *more)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def named(tree):
    """Leaves by published key."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join([*(p.key for p in path[:-1]), LEAVES[path[-1].key]]): x for path, x in leaves}
