"""Runs in pieces are `sample`'s images, to the bit; a queue of them that anybody can leave.

On several devices XLA lays the decoder out otherwise: there they are so up to rounding.
"""

import dataclasses
import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax import sampling
from latent_diffusion_jax.demo import denoising
from latent_diffusion_jax.demo.denoising import Denoiser
from latent_diffusion_jax.demo.queue import Queue
from latent_diffusion_jax.demo.settings import read_given
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.sharding import make_mesh
from tests import models
from tests.demo.test_settings import SETTINGS, png

MESH = make_mesh(data=1)


def denoiser(task, mesh=MESH):
    return Denoiser(models.trained(f"diffusion/shapes64.py:{task},tiny"), mesh)


@pytest.fixture(scope="module")
def text():
    return denoiser("text")


PROMPT = dataclasses.replace(SETTINGS, texts={"prompt": "a red circle"})


def runs(model, settings):
    return list(model.run(settings, read_given(settings, model.trained)))


def of_sample(model, settings):
    """The images that `sample` makes."""
    given = read_given(settings, model.trained)
    names = ("sampler", "options", "steps", "timesteps", "scale")
    (images,) = sampling.generate(
        model.trained,
        MESH,
        inputs=given.inputs,
        number=settings.number,
        batch=settings.number,
        seed=settings.seed,
        size=given.size,
        extras=sampling.Extras(strength=settings.strength),
        **{name: getattr(settings, name) for name in names},
    )
    return images


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp_2m_sde", "unipc"])
def test_pieces_give_the_bits_of_the_whole(sampler, text, monkeypatch):
    monkeypatch.setattr(denoising, "PIECE", 1e-9)  # a step each
    options = SETTINGS.options if sampler == "ddim" else {}
    settings = dataclasses.replace(PROMPT, sampler=sampler, options=options)
    seen = runs(text, settings)
    assert [each.step for each in seen] == [*range(8), 7]
    np.testing.assert_array_equal(seen[-1].images, of_sample(text, settings))


def test_eight_devices_make_the_images_of_one(text):
    one, eight = (runs(m, PROMPT)[-1].images for m in (text, denoiser("text", make_mesh())))
    assert one.shape == eight.shape == (3, 64, 64, 3)
    np.testing.assert_allclose(eight, one, atol=2e-4)


@pytest.mark.parametrize("strength", [None, 0.5])
def test_edits_too_and_what_is_known_stays(strength):
    model = denoiser("unconditional")
    hole = np.zeros((64, 64), np.uint8)
    hole[:, 32:] = 255
    photo = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    files = {"image": ("a.png", as_png(photo)), "mask": ("m.png", as_png(hole))}
    settings = dataclasses.replace(SETTINGS, files=files, strength=strength)
    images = runs(model, settings)[-1].images
    # XLA sums otherwise in one program of all steps: 4e-6 where a strength starts half-way
    np.testing.assert_allclose(images, of_sample(model, settings), atol=2e-5)
    assert abs((images[:, :, :32] + 1) * 127.5 - photo[:, :32]).max() < 1e-3


def as_png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def test_one_program_serves_any_steps_seed_and_scale(text):
    for steps, seed, scale in ((3, 0, 2.0), (9, 1, 3.0), (5, 2, 4.0)):
        runs(text, dataclasses.replace(PROMPT, steps=steps, seed=seed, scale=scale))
    programs, _ = text._prepare(PROMPT, read_given(PROMPT, text.trained))
    assert programs.advance._cache_size() == 1


def test_previews_come_nearer_to_the_image(text, monkeypatch):
    monkeypatch.setattr(denoising, "PIECE", 1e-9)
    monkeypatch.setattr(denoising, "SHARE", 1e9)
    *seen, last = runs(text, dataclasses.replace(PROMPT, steps=20))
    shown = [each.images for each in seen if each.images is not None]
    assert len(shown) == 19
    far = [np.abs(images - last.images).mean() for images in shown]
    assert far[-1] < far[0] / 2
    assert far[-1] < 0.1


class Slow:
    """A denoiser whose steps take until they are let go."""

    trained = models.trained("diffusion/shapes64.py:unconditional,tiny")

    def __init__(self):
        self.go, self.worked = threading.Semaphore(0), []

    def check(self, settings, given):
        if settings.sampler == "bad":
            raise UserError("unknown sampler")

    def run(self, settings, given):
        self.worked.append(settings.seed)
        if settings.seed == 13:
            raise MemoryError("all\nof it")
        for step in range(settings.steps + 1):
            yield denoising.Seen(step, settings.steps, np.full((1, 2, 2, 3), step))
            self.go.acquire()


def until(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within ten seconds")


@pytest.fixture
def queue():
    return Queue(Slow())


def ask(queue, seed):
    return queue.submit(dataclasses.replace(SETTINGS, seed=seed))


def test_jobs_are_worked_on_in_turn(queue):
    jobs = [ask(queue, seed) for seed in range(3)]
    until(lambda: jobs[0].state == "running")
    assert [queue.before(job) for job in jobs] == [0, 1, 2]
    for _ in range(3 * 8):
        queue.denoiser.go.release()
    until(lambda: all(job.state == "done" for job in jobs))
    assert queue.denoiser.worked == [0, 1, 2]
    assert jobs[2].images.max() == 7


def test_who_waits_leaves_at_once_while_another_runs(queue):
    running, waiting, last = (ask(queue, seed) for seed in range(3))
    until(lambda: running.state == "running")
    queue.cancel(waiting)  # no step is let go
    assert waiting.state == "cancelled"
    assert queue.before(last) == 1
    assert running.state == "running"
    for _ in range(2 * 8):
        queue.denoiser.go.release()
    until(lambda: last.state == "done")
    assert queue.denoiser.worked == [0, 2]
    assert running.state == "done"


def test_what_runs_ends_between_two_steps(queue):
    running, waiting = ask(queue, 0), ask(queue, 1)
    until(lambda: running.state == "running")
    queue.cancel(running)
    assert running.state == "cancelled"
    queue.denoiser.go.release()  # the one step under way
    until(lambda: waiting.state == "running")
    assert running.images is None
    assert running.state == "cancelled"


def test_a_failure_is_a_line_and_the_next_goes_on(queue, capsys):
    failing, good = ask(queue, 13), ask(queue, 1)
    until(lambda: failing.ended)
    assert (failing.state, failing.error) == ("failed", "MemoryError: all of it")
    until(lambda: good.state == "running")
    with pytest.raises(UserError, match="unknown sampler"):
        queue.submit(dataclasses.replace(SETTINGS, sampler="bad"))


def test_too_many_are_told_so(queue, monkeypatch):
    monkeypatch.setattr("latent_diffusion_jax.demo.queue.MAX_WAITING", 2)
    for seed in range(3):
        ask(queue, seed)
    with pytest.raises(UserError, match="2 runs are waiting already"):
        ask(queue, 3)


def test_mistakes_are_said_before_the_queue(text):
    queue = Queue(text)
    for changes, message in (
        (dict(sampler="dimm"), "did you mean 'ddim'"),
        (dict(options={"eta": 3.0}), "eta 3.0"),
        (dict(steps=2000), "2000 sampling steps"),
        (dict(size=(60, 64)), "60"),
        (dict(files={"image": ("a.png", png(60, 64))}), "60"),
    ):
        with pytest.raises(UserError, match=message):
            queue.submit(dataclasses.replace(PROMPT, **changes))
