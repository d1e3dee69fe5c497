import io
import json

import jax.numpy as jnp
import numpy as np
from PIL import Image

from latent_diffusion_jax.train.metrics import (
    Progress,
    Writer,
    average,
    grid,
    plot_curves,
    read_jsonl,
)


def test_average_over_batches():
    found = average([{"mse": jnp.float32(1), "kl": jnp.float32(4)}, {"mse": 2.0, "kl": 0.0}])
    assert found == {"mse": 1.5, "kl": 2.0}


def test_grid_maps_values_and_lays_out_rows():
    images = np.stack([np.full((4, 6, 1), v, np.float32) for v in (-1, 0, 1, 7, -0.5)])
    picture = grid(images, columns=3)
    assert picture.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    assert picture.dtype == np.uint8
    tops, lefts = (2, 2, 2, 8, 8), (2, 10, 18, 2, 10)
    for top, left, value in zip(tops, lefts, (0, 128, 255, 255, 64)):
        assert (picture[top : top + 4, left : left + 6] == value).all()
    assert (picture[8:12, 18:24] == 255).all()  # no sixth image


def test_grid_leaves_bytes_alone():
    images = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)
    np.testing.assert_array_equal(grid(images, columns=8)[2:5, 7:10], images[1])


def test_curves_never_double(tmp_path):
    writer = Writer(str(tmp_path))
    writer.start(0)
    for step in (2, 4, 6):
        writer.scalars(step, {"loss": 1 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # cut short by a kill
    writer = Writer(str(tmp_path))
    writer.start(4)
    writer.scalars(6, {"loss": 0.5})
    writer.close()
    assert read_jsonl(str(tmp_path / "metrics.jsonl")) == [
        {"step": 2, "loss": 1 / 2},
        {"step": 4, "loss": 1 / 4},
        {"step": 6, "loss": 0.5},
    ]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_images_are_written_as_grids(tmp_path):
    writer = Writer(str(tmp_path))
    writer.start(0)
    writer.images(12, {"samples": np.zeros((3, 8, 8, 3), np.float32)}, columns=2)
    writer.close()
    with Image.open(tmp_path / "images" / "samples_00000012.png") as image:
        assert image.size == (22, 22)
        assert image.getpixel((5, 5)) == (128, 128, 128)


def test_curves_are_plotted(tmp_path):
    lines = [{"step": s, "loss": 1 / s} for s in range(1, 9)] + [{"step": 8, "psnr": -1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    plot_curves(str(tmp_path / "metrics.jsonl"), str(tmp_path / "c.png"), ["loss", "psnr", "kl"])
    with Image.open(tmp_path / "c.png") as image:
        assert image.width > 2 * image.height
        assert np.asarray(image).std() > 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(10, start=4, stream=stream)
    progress.update(5)
    progress.line(10, "loss 0.1")
    progress.close()
    assert stream.getvalue() == "step 10/10 loss 0.1 00:00 left\n"


def test_a_bar_on_a_terminal():
    stream = Terminal()
    progress = Progress(10, start=4, unit="image", stream=stream)
    progress.line(7, "loss 0.1")
    progress.update(10)
    progress.close()
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert "10/10" in last
    assert "image" in last
    assert "loss 0.1" in last
