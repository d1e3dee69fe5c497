"""Degradations: sizes, shares and moments as published; resizes against OpenCV's numbers."""

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.data import degrade
from latent_diffusion_jax.data.degrade import DEGRADATIONS
from latent_diffusion_jax.errors import UserError

ROW = np.array([0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4], np.float32)
OPENCV = {  # cv2.resize of ROW to 3 and to 10 pixels
    "linear": (
        [0.633333, 0.7, 0.666667],
        [0.1, 0.54, 0.75, 0.33, 0.56, 0.525, 0.23, 0.65, 0.62, 0.4],
    ),
    "cubic": (
        [0.714815, 0.7, 0.740741],
        [0.034975, 0.606206, 0.834375, 0.311475, 0.586447]
        + [0.542062, 0.207378, 0.688672, 0.683731, 0.367487],
    ),
    "area": (
        [0.471429, 0.442857, 0.542857],
        [0.1, 0.557143, 0.814286, 0.3, 0.585714, 0.557143, 0.2, 0.714286, 0.628571, 0.4],
    ),
}


def scene(side=128):
    """Waves and a disc: smooth, with an edge."""
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(9 * x + 4 * y), np.sin(13 * y), np.cos(7 * x * y)]
    disc = (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.05
    return (128 + 60 * np.stack(waves, -1) + 50 * disc[..., None]).astype(np.uint8)


def psnr(a, b):
    return -10 * np.log10(np.mean((a / 255.0 - b / 255.0) ** 2) + 1e-12)


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize(
    "height, width, factor", [(32, 32, 4), (32, 32, 2), (48, 20, 4), (24, 36, 3), (4, 8, 4)]
)
def test_sizes(name, height, width, factor):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (height, width, 3), np.uint8)
    for _ in range(15):
        out = DEGRADATIONS[name](image, factor, generator)
        assert out.shape == (height // factor, width // factor, 3)
        assert out.dtype == np.uint8


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_generator_in_the_same_state_degrades_alike(name):
    image, degradation = scene(32), DEGRADATIONS[name]
    before = image.copy()
    first, again, other = (degradation(image, 4, np.random.default_rng(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, before)
    assert (first != other).any() == (name != "bicubic")


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("shape, factor", [((32, 30), 4), ((31, 32), 2), ((32, 32), 0)])
def test_a_factor_that_does_not_divide_is_refused(name, shape, factor):
    image = np.zeros((*shape, 3), np.uint8)
    with pytest.raises(UserError, match=f"{shape[0]} x {shape[1]} .* {factor} times"):
        DEGRADATIONS[name](image, factor, np.random.default_rng(0))


@pytest.mark.parametrize("method", OPENCV)
@pytest.mark.parametrize("axis", [0, 1])
def test_resizes_are_those_of_opencv(method, axis):
    row = np.moveaxis(np.tile(ROW[:, None, None], (1, 2, 3)), 0, axis)
    for expected in OPENCV[method]:
        size = (len(expected), 2) if axis == 0 else (2, len(expected))
        resized = np.moveaxis(degrade.resize(row, size, method), axis, 0)
        np.testing.assert_allclose(resized[:, 1, 2], expected, atol=2e-6)


def test_antialiased_halving_is_a_bicubic_of_twice_the_width():
    pixels = np.random.default_rng(0).random((24, 20, 1), np.float32)
    expected = Image.fromarray(pixels[..., 0]).resize((10, 12), Image.Resampling.BICUBIC)
    halved = degrade.resize(pixels, (12, 10), "antialiased")[..., 0]
    inside = np.s_[2:-2, 2:-2]  # Pillow does not repeat the border
    np.testing.assert_allclose(halved[inside], np.asarray(expected)[inside], atol=1e-6)


def test_the_order_is_random_but_shrinks_before_it_fits():
    generator = np.random.default_rng(0)
    orders = [degrade.draw_order(1, generator) for _ in range(4000)]
    assert all(sorted(o) == ["blur", "fit", "jpeg", "noise", "shrink"] for o in orders)
    assert all(o.index("shrink") < o.index("fit") for o in orders)
    firsts = [o[0] for o in orders]
    for name, share in {"shrink": 0.4, "blur": 0.2, "noise": 0.2, "jpeg": 0.2}.items():
        assert firsts.count(name) / len(orders) == pytest.approx(share, abs=0.03)
    assert degrade.draw_order(2, generator).count("blur") == 2


@pytest.mark.parametrize("size", [5, 6, 25])
def test_a_gaussian_without_width_still_sums_to_one(size):
    kernel = degrade.gaussian(size, 0.0)
    middle = [1.0] if size % 2 else [0.5, 0.5]
    np.testing.assert_allclose(kernel[kernel > 0], middle)
    np.testing.assert_allclose(degrade.gaussian(size, 1e-3), kernel)


def test_a_tilted_gaussian_has_its_covariance():
    angle, variances = 0.6, np.array([4.0, 1.0])
    kernel = degrade.tilted_gaussian(41, angle, variances)
    axes = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    y, x = np.mgrid[-20:21, -20:21]
    moments = [[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]
    np.testing.assert_allclose(moments, axes.T @ np.diag(variances) @ axes, rtol=1e-4)
    assert kernel.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "settings, tilted, round_", [(degrade.LIGHT, 2.0, 0.7), (degrade.FULL, 8.0, 2.8)]
)
def test_blurs_are_as_wide_as_published(settings, tilted, round_):
    """Half have two variances of U(0, `tilted`), half a deviation of U(0, `round_`)."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[-30:31, -30:31]
    impulse = np.zeros((61, 61, 1), np.float32)
    impulse[30, 30] = 1
    variances = []
    for _ in range(400):
        spread = degrade.blur(impulse, 4, generator, settings)[..., 0]
        assert spread.sum() == pytest.approx(1, abs=1e-4)
        centre = (spread * x).sum(), (spread * y).sum()
        variances.append((spread * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2)).sum() / 2)
    assert np.mean(variances) == pytest.approx((tilted / 2 + round_**2 / 3) / 2, rel=0.15)


@pytest.mark.parametrize("scale", [2, 4])
def test_blur_and_decimation_do_not_move_the_image(scale):
    """A ramp is its own blur: the pixel that is kept holds the middle of those it stands for."""
    ramp = np.linspace(0, 1, 96, dtype=np.float32)
    pixels = np.tile(ramp[:, None, None], (1, 96, 3))
    generator = np.random.default_rng(0)
    for turned in (pixels, pixels.transpose(1, 0, 2)):
        small = degrade.shrink(turned, scale, generator, resized=0.0)
        expected = turned.reshape(96 // scale, scale, 96 // scale, scale, 3).mean((1, 3))
        inside = slice(16 // scale, -16 // scale)
        np.testing.assert_allclose(small[inside, inside], expected[inside, inside], atol=1e-5)


def test_shrinking_by_a_resize_reaches_one_to_twice_the_scale():
    generator = np.random.default_rng(0)
    pixels = np.zeros((256, 128, 3), np.float32)
    shapes = np.array([degrade.shrink(pixels, 4, generator, 1.0).shape for _ in range(300)])
    assert shapes[:, 0].min() in range(32, 35)
    assert shapes[:, 0].max() in range(240, 257)
    np.testing.assert_array_equal(shapes[:, 0] // 2, shapes[:, 1])
    assert np.mean(256 / shapes[:, 0]) == pytest.approx(4.5, abs=0.4)  # the ratio is uniform


def test_noise_is_grey_coloured_or_correlated_in_their_shares():
    generator = np.random.default_rng(0)
    shape, counts, deviations = (24, 24, 3), dict(grey=0, correlated=0, colour=0), set()
    for _ in range(400):
        noise = degrade.draw_noise(shape, generator, (1, 2)) * 255
        if noise.shape[-1] == 1:
            counts["grey"] += 1
            deviations.add(round(float(noise.std())))
            continue
        between = np.corrcoef(noise.reshape(-1, 3).T)[np.triu_indices(3, 1)]
        correlated = np.abs(between).max() > 0.15 or np.ptp(noise.std((0, 1))) > 0.15
        counts["correlated" if correlated else "colour"] += 1
        assert noise.std() < 2.2
    assert deviations == {1, 2}
    for kind, share in dict(grey=0.4, correlated=0.2, colour=0.4).items():
        assert counts[kind] / 400 == pytest.approx(share, abs=0.08)


def test_a_constant_stays_nearly_constant_but_for_noise():
    image = np.full((64, 64, 3), (90, 140, 200), np.uint8)
    generator = np.random.default_rng(0)
    spread = {}
    for name, tolerance in (("bsr_light", 3), ("bsr", 10)):
        outs = np.stack([DEGRADATIONS[name](image, 4, generator) for _ in range(60)])
        assert np.abs(outs.mean((1, 2)) - image[0, :1]).max() < tolerance
        spread[name] = np.median(outs.std((1, 2)))
    assert 0.2 < spread["bsr_light"] < 0.8
    assert spread["bsr"] > 2 * spread["bsr_light"]


@pytest.mark.parametrize(
    "degradation, draws, mean, deviation",
    [(degrade.bsr_light, 300, 30.84, 3.05), (degrade.bsr, 100, 25.09, 3.43)],
)
def test_distance_from_bicubic_is_that_of_the_original(degradation, draws, mean, deviation):
    """Its own code on this image, 1500 times (black images left out): PSNR in dB."""
    image, generator = scene(), np.random.default_rng(0)
    reference = degrade.bicubic(image, 4, generator)
    found = [psnr(degradation(image, 4, generator), reference) for _ in range(draws)]
    assert np.mean(found) == pytest.approx(mean, abs=3 * deviation / draws**0.5)
    assert np.std(found) == pytest.approx(deviation, rel=0.25)


def test_the_last_step_is_jpeg():
    """Which halves the resolution of colour, so that single pixels differ in brightness only."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(60, 196, (32, 32, 3), np.uint8)
    image = blocks.repeat(4, 0).repeat(4, 1)

    def detail(out):
        pixels = np.asarray(Image.fromarray(out).convert("YCbCr"), np.float32)
        means = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
        return (pixels - means).std((0, 1))

    light, blue, red = detail(degrade.bicubic(image, 4, generator))
    assert min(blue, red) > 0.6 * light
    details = [detail(degrade.bsr_light(image, 4, generator)) for _ in range(20)]
    light, blue, red = np.median(details, axis=0)
    assert max(blue, red) < 0.35 * light
