"""The page in a real browser, and `sample --like` of what it made.

Needs what a test environment may lack: pip install gradio playwright, and a Chromium.
"""

import contextlib
import io
import os
import shutil
import socket
import sys
import time

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.demo import denoising
from latent_diffusion_jax.demo.denoising import Denoiser
from latent_diffusion_jax.demo.queue import Queue
from latent_diffusion_jax.demo.settings import read_png
from latent_diffusion_jax.train.sharding import make_mesh
from tests import models
from tests.cli import mistake, run
from tests.demo.test_settings import png


def test_without_gradio_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = mistake(capsys, "demo", "--workdir=nowhere")
    assert "pip install 'latent-diffusion-jax[demo]'" in line


gradio = pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of the model for prompts."""
    return models.write_workdir(tmp_path_factory.mktemp("ldm"), "diffusion/shapes64.py:text,tiny")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Held(Denoiser):
    """One that can be made to take its time."""

    pause = 0.0

    def run(self, settings, given):
        for seen in super().run(settings, given):
            yield seen
            time.sleep(self.pause)


@contextlib.contextmanager
def served(model, tmp_path):
    """The address of a page on a model, and its queue."""
    from latent_diffusion_jax.demo.page import launch

    queue = Queue(Held(model, make_mesh(data=1)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch(queue, port, "a model", tmp_path)
    try:
        yield f"http://127.0.0.1:{port}", queue
    finally:
        page.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page on the tiny model of a task, as often as asked."""
    with contextlib.ExitStack() as stack:
        pages = {}

        def open_page(task):
            if task not in pages:
                model = models.trained(f"diffusion/shapes64.py:{task},tiny")
                pages[task] = stack.enter_context(served(model, tmp_path / task))
            address, queue = pages[task]
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(90_000)
            page.goto(address)
            page.locator("#generate").wait_for()
            stack.callback(page.close)
            return page, queue

        yield open_page


def generate(page):
    page.locator("#generate").click()


def says(page, text):
    page.locator("#status", has_text=text).wait_for()


def downloads(page, tmp_path, number):
    """The PNGs that a visitor saves."""
    links = page.locator("#files a[download]")
    links.nth(number - 1).wait_for()
    paths = []
    for i in range(number):
        with page.expect_download() as saved:
            links.nth(i).click()
        paths.append(tmp_path / f"saved{i}.png")
        saved.value.save_as(paths[-1])
    return paths


@in_chromium
def test_what_the_page_made_sample_makes_again(workdir, visit, tmp_path):
    page, _ = visit("text")
    page.get_by_label("Prompt").fill("a red circle")
    page.locator("#seed input").fill("7")
    page.locator("#number input[type=number]").fill("2")
    generate(page)
    says(page, "done: 4 steps, seed 7")
    assert page.locator("#history img").count() == 2
    paths = downloads(page, tmp_path, 2)
    options = [f"--workdir={workdir}", f"--like={paths[1]}", f"--out={tmp_path}/again"]
    flags = tmp_path / "flags"  # a file, to which none are added: as the page has them here
    flags.write_text("--xla_force_host_platform_device_count=1")
    run("sample", *options, env={**os.environ, "XLA_FLAGS": str(flags)})
    first, there, again = (
        np.asarray(Image.open(path)) for path in (*paths, tmp_path / "again" / "saved1.png")
    )
    np.testing.assert_array_equal(there, again)
    assert abs(first.astype(int) - there).max() > 8
    settings, index, _ = read_png(str(tmp_path / "again" / "saved1.png"))
    assert (settings.seed, settings.texts["prompt"], index) == (7, "a red circle", 1)


@in_chromium
def test_who_waits_can_leave_while_another_runs(visit, monkeypatch):
    monkeypatch.setattr(Held, "pause", 0.3)
    monkeypatch.setattr(denoising, "PIECE", 1e-9)
    (one, queue), (other, _) = visit("unconditional"), visit("unconditional")
    one.locator("#steps input[type=number]").fill("200")
    one.locator("#steps input[type=number]").press("Enter")
    generate(one)
    says(one, "of 200")
    one.locator("#result img").first.wait_for()  # a preview
    generate(other)
    says(other, "waiting for 1 other run")
    other.locator("#cancel").click()
    says(other, "cancelled")
    assert queue._jobs[0].state == "running"
    one.locator("#cancel").click()
    says(one, "cancelled")
    monkeypatch.setattr(Held, "pause", 0.0)
    generate(other)
    says(other, "done")


@in_chromium
def test_bad_uploads_get_a_message(visit, tmp_path):
    page, _ = visit("superres")
    upload = page.locator("#image input[type=file]")
    for name, content, message in (
        ("notes.png", b"no image", "'notes.png' cannot be read as an image"),
        ("huge.png", png(20_000, 20_000, "1"), "'huge.png' is too large an image"),
        ("wide.png", png(8, 9_000_000 // 8, "1"), "'wide.png' is 1125000x8 pixels, more than"),
    ):
        (tmp_path / name).write_bytes(content)
        page.reload()
        upload.set_input_files(tmp_path / name)
        page.locator("#image", has_text=name.partition(".")[0]).wait_for()
        generate(page)
        says(page, message)
    (tmp_path / "good.png").write_bytes(png(16, 16))
    page.reload()
    generate(page)
    says(page, "needs --image")
    upload.set_input_files(tmp_path / "good.png")
    page.locator("#image", has_text="good").wait_for()
    generate(page)
    says(page, "done")


@in_chromium
def test_a_mask_is_painted_or_given(visit, tmp_path):
    page, queue = visit("inpainting")
    (tmp_path / "photo.png").write_bytes(png(64, 64))
    (tmp_path / "mask.png").write_bytes(png(32, 64, "L"))
    page.locator("#image input[type=file]").set_input_files(tmp_path / "photo.png")
    canvas = page.locator("#paint canvas").first
    canvas.wait_for()
    page.wait_for_timeout(3000)  # until the editor has laid the image out
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 30, steps=8)
    page.mouse.up()
    page.wait_for_timeout(1000)
    generate(page)
    says(page, "done")
    settings, *_ = read_png(str(downloads(page, tmp_path, 4)[0]))
    hole = np.asarray(Image.open(io.BytesIO(settings.files["mask"][1])))
    assert hole.shape == (64, 64)
    assert 0.001 < (hole > 127).mean() < 0.5
    page.locator("#mask input[type=file]").set_input_files(tmp_path / "mask.png")
    page.locator("#mask", has_text="mask").wait_for()
    generate(page)
    says(page, "--mask is 64x32 pixels, --image 64x64")


@in_chromium
def test_boxes_are_drawn_and_generated_from(visit):
    page, _ = visit("layout")
    page.locator("#layout svg rect").nth(1).wait_for()
    generate(page)
    says(page, "done")
