"""Low-resolution inputs for super-resolution, made from a training image on the host.

`bicubic` is the plain task. `bsr_light` is the degradation that LDM-BSR was trained on (Rombach et
al., supplement, section D.6.1), the mild form of `bsr`, BSRGAN's (Zhang et al., *Designing a
Practical Degradation Model for Deep Blind Image Super-Resolution*, ICCV 2021): blur, two resizes,
noise and JPEG in random order. Its resizes are OpenCV's, which do not antialias.

Departure: a Gaussian kernel of even size with hardly any width averages the middle pixels; the
original's sums to zero there, and one image in some hundreds turns black.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # whose ndimage is loaded when it is used
from PIL import Image

from latent_diffusion_jax.errors import UserError

METHODS = ("linear", "cubic", "area")
HALVED = 0.25  # of the images are halved first, at factor 4
JPEG = 0.9  # of the images go through JPEG before the last one, too
KERNELS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {  # reach in pixels
    "linear": (1, lambda x: np.maximum(1 - x, 0)),
    "cubic": (2, lambda x: _cubic(x, -0.75)),
    "antialiased": (4, lambda x: _cubic(x / 2, -0.5) / 2),
}


class Settings(NamedTuple):
    """Where the two forms differ. Ranges include both ends."""

    blurs: int
    spread: float  # of the blurs, relative to BSRGAN's
    tilted_sizes: Sequence[int]  # of anisotropic kernels, in pixels
    round_sizes: Sequence[int]  # of isotropic kernels
    resized: float  # share of images that are shrunk by a resize, not by blur and decimation
    noise: tuple[int, int]  # standard deviation, of 255
    quality: tuple[int, int]  # of JPEG


LIGHT = Settings(1, 0.25, range(5, 15), range(5, 8), 0.8, (1, 2), (80, 95))
FULL = Settings(2, 1, range(7, 26, 2), range(7, 26, 2), 0.75, (2, 25), (30, 95))


def bicubic(image: np.ndarray, factor: int, generator: np.random.Generator) -> np.ndarray:
    """Shrinks uint8 [H, W, 3] to [H / factor, W / factor, 3], antialiased; draws nothing.

    Raises:
      UserError: `factor` does not divide the sides.
    """
    height, width = _target(image, factor)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def bsr_light(image: np.ndarray, factor: int, generator: np.random.Generator) -> np.ndarray:
    """Degrades uint8 [H, W, 3] to [H / factor, W / factor, 3] as for LDM-BSR.

    Raises:
      UserError: `factor` does not divide the sides.
    """
    return _degrade(image, factor, generator, LIGHT)


def bsr(image: np.ndarray, factor: int, generator: np.random.Generator) -> np.ndarray:
    """Degrades uint8 [H, W, 3] to [H / factor, W / factor, 3] as BSRGAN does.

    Raises:
      UserError: `factor` does not divide the sides.
    """
    return _degrade(image, factor, generator, FULL)


DEGRADATIONS = {"bicubic": bicubic, "bsr_light": bsr_light, "bsr": bsr}


def draw_order(blurs: int, generator: np.random.Generator) -> list[str]:
    """A random order of the operations in which `shrink` comes before `fit`."""
    names = generator.permutation(["blur"] * blurs + ["shrink", "fit", "noise", "jpeg"]).tolist()
    first, last = sorted((names.index("shrink"), names.index("fit")))
    names[first], names[last] = "shrink", "fit"
    return names


def resize(pixels: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
    """Resizes float32 [H, W, C] to `size` (height, width) as OpenCV does: no antialiasing.

    `method`: `linear`, `cubic` or `area`; `antialiased` is MATLAB's bicubic, for half the size.
    """
    for axis, sums in enumerate(("tkwc,tk->twc", "htkc,tk->htc")):
        index, weights = _taps(pixels.shape[axis], size[axis], method)
        pixels = np.einsum(sums, np.take(pixels, index, axis), weights)
    return pixels


def _degrade(
    image: np.ndarray, factor: int, generator: np.random.Generator, settings: Settings
) -> np.ndarray:
    size = _target(image, factor)
    pixels = image.astype(np.float32) / np.float32(255)
    scale = factor  # what is left to shrink by
    if factor == 4 and generator.random() < HALVED:
        method = generator.choice(METHODS) if generator.random() < 0.5 else "antialiased"
        half = (image.shape[0] // 2, image.shape[1] // 2)
        pixels = np.clip(resize(pixels, half, method), 0, 1)
        scale = 2
    operations = {
        "blur": lambda x: blur(x, scale, generator, settings),
        "shrink": lambda x: shrink(x, scale, generator, settings.resized),
        "fit": lambda x: resize(x, size, generator.choice(METHODS)),
        "noise": lambda x: x + draw_noise(x.shape, generator, settings.noise),
        "jpeg": lambda x: _jpeg(x, generator, settings) if generator.random() < JPEG else x,
    }
    for name in draw_order(settings.blurs, generator):
        pixels = np.clip(operations[name](pixels), 0, 1)
    return _to_uint8(_jpeg(pixels, generator, settings))


def _target(image: np.ndarray, factor: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if factor < 1 or height % factor or width % factor:
        raise UserError(f"an image of {height} x {width} cannot be shrunk {factor} times")
    return height // factor, width // factor


def blur(
    pixels: np.ndarray, scale: int, generator: np.random.Generator, settings: Settings
) -> np.ndarray:
    """A Gaussian, tilted and stretched or round with equal probability."""
    if generator.random() < 0.5:
        size = generator.choice(settings.tilted_sizes)
        angle = generator.uniform(0, np.pi)
        variances = settings.spread * (4 + scale) * generator.random(2)
        kernel = tilted_gaussian(size, angle, variances).astype(np.float32)
        return scipy.ndimage.convolve(pixels, kernel[..., None], mode="mirror")
    size = generator.choice(settings.round_sizes)
    deviation = settings.spread * (2 + 0.2 * scale) * generator.random()
    return _convolve_both(pixels, gaussian(size, deviation))


def shrink(
    pixels: np.ndarray, scale: int, generator: np.random.Generator, resized: float
) -> np.ndarray:
    """By a resize, by up to twice too much, or exactly, by a Gaussian and decimation."""
    if generator.random() < resized:
        ratio = generator.uniform(1, 2 * scale)
        height, width = (max(1, int(side / ratio)) for side in pixels.shape[:2])
        return resize(pixels, (height, width), generator.choice(METHODS))
    kernel = gaussian(25, generator.uniform(0.1, 0.6 * scale))
    # the first of `scale` pixels is kept: the kernel is centred on their middle
    kernel = scipy.ndimage.shift(kernel, -(scale - 1) / 2, order=1, mode="nearest")
    return _convolve_both(pixels, kernel / kernel.sum())[::scale, ::scale]


def draw_noise(
    shape: tuple[int, ...], generator: np.random.Generator, levels: tuple[int, int]
) -> np.ndarray:
    """Gaussian noise float32: grey, correlated between colours, or independent."""
    level = generator.integers(*levels, endpoint=True) / 255
    kind = generator.random()
    if kind < 0.4:
        noise = generator.normal(0, level, (*shape[:2], 1))
    elif kind < 0.6:
        axes = np.linalg.svd(generator.random((3, 3)))[0]
        covariance = np.abs(axes.T @ np.diag(generator.random(3)) @ axes) * (levels[1] / 255) ** 2
        noise = generator.multivariate_normal(np.zeros(3), covariance, shape[:2])
    else:
        noise = generator.normal(0, level, shape)
    return noise.astype(np.float32)


def _jpeg(pixels: np.ndarray, generator: np.random.Generator, settings: Settings) -> np.ndarray:
    file = io.BytesIO()
    quality = int(generator.integers(*settings.quality, endpoint=True))
    Image.fromarray(_to_uint8(pixels)).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file), np.float32) / np.float32(255)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels * 255).astype(np.uint8)


def gaussian(size: int, deviation: float) -> np.ndarray:
    """A Gaussian [size] that sums to 1."""
    x = np.arange(size) - (size - 1) / 2
    return _normalised(x**2 / max(deviation**2, 1e-12))


def tilted_gaussian(size: int, angle: float, variances: np.ndarray) -> np.ndarray:
    """A Gaussian [size, size] that sums to 1, its first axis `angle` radians from that of x."""
    x = np.arange(size)[None, :] - (size - 1) / 2
    along = np.cos(angle) * x + np.sin(angle) * x.T
    across = np.sin(angle) * x - np.cos(angle) * x.T
    first, second = np.maximum(variances, 1e-12)
    return _normalised(along**2 / first + across**2 / second)


def _normalised(square: np.ndarray) -> np.ndarray:
    kernel = np.exp(-0.5 * (square - square.min()))
    return kernel / kernel.sum()


def _convolve_both(pixels: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolves rows and columns with a round kernel's factor."""
    for axis in (0, 1):
        pixels = scipy.ndimage.convolve1d(pixels, kernel, axis, mode="mirror")
    return pixels


def _taps(source: int, target: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Which of `source` pixels each of `target` takes, and how much: [target, taps] each.

    Beyond the border the outermost pixel is repeated.
    """
    ratio = source / target
    start = np.arange(target)[:, None] * ratio
    if method == "area":
        places = np.floor(start) + np.arange(math.ceil(ratio) + 1)[None, :]
        overlap = np.minimum(start + ratio, places + 1) - np.maximum(start, places)
        weights = np.maximum(overlap, 0) / ratio
    else:
        reach, kernel = KERNELS[method]
        centre = start + (ratio - 1) / 2
        places = np.floor(centre) + np.arange(1 - reach, reach + 1)[None, :]
        weights = kernel(np.abs(centre - places))
    return np.clip(places, 0, source - 1).astype(int), weights.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution at distances `x`; `a` is its slope at 1."""
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
