"""The page: controls on the left, what comes of them on the right, and everything made so far."""

import asyncio
import dataclasses
import html
import json
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from latent_diffusion_jax.data.transforms import to_uint8
from latent_diffusion_jax.demo.controls import make_controls, paint_control
from latent_diffusion_jax.demo.queue import Job, Queue
from latent_diffusion_jax.demo.settings import MAX_NUMBER, Settings, fingerprint, write_png
from latent_diffusion_jax.diffusion.samplers import SAMPLERS
from latent_diffusion_jax.diffusion.schedule import TIMESTEPS
from latent_diffusion_jax.errors import UserError

LOOK = 0.1  # seconds between two looks at a job
HOST = "127.0.0.1"
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
CSS = ".gallery-item img, .grid-wrap img {image-rendering: pixelated}"


def serve(queue: Queue, port: int, title: str) -> None:
    """Shows the page to this machine until it is interrupted."""
    with tempfile.TemporaryDirectory(prefix="latent_diffusion_jax") as folder:
        page = launch(queue, port, title, Path(folder))
        print(f"http://{HOST}:{port} shows {title}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        finally:
            page.close()


def launch(queue: Queue, port: int, title: str, folder: Path) -> gr.Blocks:
    """Starts to show it; raises OSError where the port is taken."""
    page = make_page(queue, title, folder)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size="64mb",
        allowed_paths=[str(folder)],
        footer_links=[],
        theme=THEME,
        css=CSS,
    )
    return page


def make_page(queue: Queue, title: str, folder: Path) -> gr.Blocks:
    """Builds it; `folder` takes the images, a folder for each visit."""
    trained = queue.denoiser.trained
    model = fingerprint(trained)
    jobs: dict[str, Job] = {}  # of a visit, the one that it waits for

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 86400)) as page:
        gr.Markdown(f"## {html.escape(title)}")
        with gr.Row():
            with gr.Column(scale=2):
                controls, edits = make_controls(trained)
                strength = []
                if edits:
                    with gr.Accordion("Change or fill an image", open=False):
                        controls.append(paint_control(trained, None))
                        about = "Strength of the change (0: the default)"
                        strength = [gr.Slider(0, 1, 0, label=about)]
                common = _common(trained.config)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
            with gr.Column(scale=3):
                status = gr.HTML(elem_id="status")
                result = gr.Gallery(
                    label="Images",
                    format="png",
                    columns=4,
                    height=380,
                    object_fit="contain",
                    elem_id="result",
                )
                files = gr.File(
                    label="Download: PNGs that hold their settings (and what was uploaded)",
                    file_count="multiple",
                    interactive=False,
                    elem_id="files",
                )
                history = gr.Gallery(
                    label="Made so far", format="png", columns=8, height=220, elem_id="history"
                )
                how = gr.Code(
                    label="How: for `sample --like=FILE.png`", language="json", elem_id="about"
                )
        made = gr.State([])

        def read(values: tuple) -> Settings:
            rest, given = list(values), dict[str, Any]()
            for control in controls:
                own = [rest.pop(0) for _ in control.components]
                given |= control.read(*own)
            chosen = float(rest.pop(0)) if strength else 0
            return _settings(given, chosen or None, *rest)

        async def generate(request: gr.Request, before, *values):
            try:
                settings = read(values)
                job = await asyncio.to_thread(queue.submit, settings)
            except UserError as error:
                gr.Warning(html.escape(str(error)))
                yield {status: _message(str(error))}
                return
            visit = str(request.session_hash)
            jobs[visit] = job
            try:
                seen = None
                while not job.ended:
                    now = (job.state, job.seen, queue.before(job))
                    if now != seen:
                        seen = now
                        shown = {} if job.preview is None else {result: _pictures(job.preview)}
                        yield {status: _progress(job, now[-1]), **shown}
                    await asyncio.sleep(LOOK)
            finally:  # also where the visitor has left
                queue.cancel(job)
            if job.images is None:
                yield {status: _message(job.error or "cancelled")}
                return
            paths = _write(folder / visit, len(before), job.images, settings, model)
            before = paths + before
            yield {
                status: _message(f"done: {settings.steps} steps, seed {settings.seed}"),
                result: paths,
                files: paths,
                history: before,
                made: before,
                how: _about(settings),
            }

        async def cancel(request: gr.Request):
            if request.session_hash in jobs:
                queue.cancel(jobs[str(request.session_hash)])

        def leave(request: gr.Request):
            if request.session_hash in jobs:
                queue.cancel(jobs.pop(str(request.session_hash)))
            shutil.rmtree(folder / str(request.session_hash), ignore_errors=True)

        components = [each for control in controls for each in control.components]
        start.click(
            generate,
            [made, *components, *strength, *common],
            [status, result, files, history, made, how],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(cancel, queue=False, api_visibility="private")
        page.unload(leave)
    return page


def _common(config) -> list[Any]:
    """What every model takes, in the order of `_settings`."""
    default = config.sample
    side = config.data.image_size
    with gr.Row():
        number = gr.Slider(1, MAX_NUMBER, 4, step=1, label="Images", elem_id="number")
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed")
    with gr.Row():
        steps = gr.Slider(1, 250, default.steps, step=1, label="Steps", elem_id="steps")
        scale = gr.Slider(0, 20, default.scale, step=0.1, label="Guidance (1: none)")
    with gr.Accordion("Sampler and size", open=False):
        sampler = gr.Dropdown(list(SAMPLERS), value=default.sampler, label="Sampler")
        timesteps = gr.Dropdown(list(TIMESTEPS), value=default.timesteps, label="Timesteps")
        eta = gr.Slider(0, 1, default.options.get("eta", 0.0), label="Eta (of ddim)")
        with gr.Row():
            height = gr.Number(side, label="Height (images given say it)", precision=0)
            width = gr.Number(side, label="Width", precision=0)
    return [number, seed, steps, scale, sampler, timesteps, eta, height, width]


def _settings(
    given, strength, number, seed, steps, scale, sampler, timesteps, eta, height, width
) -> Settings:
    if seed is None or not 0 <= seed < 2**32:
        raise UserError(f"seed {seed} is not a whole number from 0 to 2**32 - 1")
    if min(height or 0, width or 0) < 1:
        raise UserError(f"size {height}x{width}: height and width must be at least 1")
    files = {option: value for option, value in given.items() if isinstance(value, tuple)}
    return Settings(
        seed=int(seed),
        number=int(number),
        sampler=sampler,
        options={"eta": float(eta)} if sampler == "ddim" else {},
        steps=int(steps),
        timesteps=timesteps,
        scale=float(scale),
        size=None if set(files) & {"image", "segmentation"} else (int(height), int(width)),
        strength=strength,
        texts={option: value for option, value in given.items() if option not in files},
        files=files,
    )


def _pictures(images: np.ndarray) -> list[np.ndarray]:
    return list(to_uint8(images))


def _progress(job: Job, before: int) -> str:
    if job.state == "waiting":
        return _message(f"waiting for {before} other {'run' if before == 1 else 'runs'}")
    step, steps, _ = job.seen
    bar = f'<progress value="{step}" max="{steps}" style="width:100%"></progress>'
    more = "" if step else " (the first run of its kind is compiled)"
    return f"{bar}<p>step {step} of {steps}{more}</p>"


def _message(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _about(settings: Settings) -> str:
    """The settings, with names for files."""
    told = dataclasses.asdict(settings)
    told["files"] = {option: name for option, (name, _) in settings.files.items()}
    return json.dumps({name: value for name, value in told.items() if value not in (None, {})})


def _write(
    folder: Path, before: int, images: np.ndarray, settings: Settings, model: str
) -> list[str]:
    """PNGs of a run's images, numbered after those of the visit that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, image in enumerate(images):
        path = folder / f"{before + i:04d}_seed{settings.seed}_{i}.png"
        path.write_bytes(write_png(image, i, settings, model))
        paths.append(str(path))
    return paths
