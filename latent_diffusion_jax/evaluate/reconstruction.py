"""How well a first stage reconstructs images, over a whole set of any size."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from latent_diffusion_jax import build
from latent_diffusion_jax.data.transforms import to_float
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.evaluate.sets import Images
from latent_diffusion_jax.first_stage.losses import use_of_codes
from latent_diffusion_jax.first_stage.lpips import Lpips
from latent_diffusion_jax.first_stage.quality import quality
from latent_diffusion_jax.pipeline import Trained
from latent_diffusion_jax.train.metrics import Progress
from latent_diffusion_jax.train.sharding import gather, put_rows, replicated


def measure_reconstructions(
    trained: Trained, mesh: Mesh, images: Images, *, batch: int, lpips: Any = None
) -> dict[str, float]:
    """Means over images of `quality`, of LPIPS where its parameters are given, and use of codes.

    Of the most probable latent. Images are of one size, and pass by: none is kept.

    Raises:
      UserError: a first stage without weights.
    """
    config = trained.config
    if config.first_stage.kind == "identity":
        raise UserError("first stage 'identity' reconstructs every image as it is")
    size = config.first_stage.get("codebook_size")
    run = _make_run(config, mesh)
    rows = -(-batch // mesh.size) * mesh.size
    sums: dict[str, Any] = defaultdict(float)
    codes = np.zeros(size or 0, np.int64)
    progress, done, originals = Progress(images.number, unit="image"), 0, images.read(0)
    while chunk := list(itertools.islice(originals, rows)):
        padded = np.pad(to_float(np.stack(chunk)), [(0, rows - len(chunk))] + [(0, 0)] * 3)
        image = put_rows(mesh, {"image": padded})["image"]
        found = jax.device_get(run(trained.params["autoencoder"], lpips, image))
        if size:
            codes += np.bincount(found.pop("codes")[: len(chunk)].reshape(-1), minlength=size)
        for name, values in found.items():
            sums[name] += values[: len(chunk)].sum(dtype=np.float64)
        done += len(chunk)
        progress.line(done, "reconstructed")
    progress.close()
    means = {name: float(total / done) for name, total in sums.items()}
    use = use_of_codes(codes / codes.sum()) if size else {}
    return means | {name: float(value) for name, value in use.items()}


def _make_run(config: Any, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """Builds run(params, lpips, image [B, H, W, 3]) -> values of each image [B], codes [B, n]."""
    stage = build.first_stage(config)
    autoencoder: Any = stage.autoencoder
    distance: Any = Lpips()

    def run(params, lpips, image):
        params, lpips = gather(mesh, (params, lpips))
        z = stage.mode(stage.encode(params, image))
        hat = stage.decode(params, z).astype(jnp.float32)
        found = jax.vmap(lambda a, b: quality(a[None], b[None]))(image, hat)
        if lpips is not None:
            found["lpips"] = distance.apply({"params": lpips}, image, hat)
        if autoencoder.codebook_size:
            quantized = autoencoder.apply({"params": params}, z, method="quantized")
            found["codes"] = quantized.indices.reshape(len(image), -1)
        return found

    return jax.jit(run, out_shardings=replicated(mesh))
