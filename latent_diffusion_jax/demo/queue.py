"""Runs of several people on one device, one at a time, each of which its owner can end at once."""

import threading
import traceback

import numpy as np

from latent_diffusion_jax.demo.denoising import Denoiser, Seen
from latent_diffusion_jax.demo.settings import Settings, read_given
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.inputs import Given

MAX_WAITING = 100


class Job:
    """A run that was asked for.

    `state` is waiting, running, done, cancelled or failed (then `error` says why, in a line);
    `seen` how far it is; `preview` the last one; `images` [N, H, W, 3] in [-1, 1] when it is done.
    """

    def __init__(self, settings: Settings, given: Given):
        self.settings, self.given = settings, given
        self.state = "waiting"
        self.seen = Seen(0, settings.steps, None)
        self.preview: np.ndarray | None = None
        self.images: np.ndarray | None = None
        self.error = ""

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("done", "cancelled", "failed")


class Queue:
    """A thread that works on jobs in the order in which they came."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self._jobs: list[Job] = []  # the first is being worked on
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, settings: Settings) -> Job:
        """Adds a job.

        Raises:
          UserError: what is asked for cannot be, or too many are waiting.
        """
        given = read_given(settings, self.denoiser.trained)
        self.denoiser.check(settings, given)
        job = Job(settings, given)
        with self._changed:
            if len(self._jobs) > MAX_WAITING:
                raise UserError(f"{MAX_WAITING} runs are waiting already: try again later")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def before(self, job: Job) -> int:
        """How many are worked on before it."""
        with self._changed:
            return self._jobs.index(job) if job in self._jobs else 0

    def cancel(self, job: Job) -> None:
        """Ends a job: at once where it waits, between two steps where it runs."""
        with self._changed:
            if not job.ended:
                job.state = "cancelled"
            if job in self._jobs[1:]:
                self._jobs.remove(job)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job = self._jobs[0]
            self._run(job)
            with self._changed:
                self._jobs.remove(job)

    def _run(self, job: Job) -> None:
        try:
            for seen in self.denoiser.run(job.settings, job.given):
                with self._changed:
                    if job.ended:  # cancelled
                        return
                    job.state, job.seen = "running", seen
                    job.preview = job.preview if seen.images is None else seen.images
            with self._changed:
                if not job.ended:
                    job.images, job.state = job.preview, "done"
        except Exception as error:  # such as the device's memory: the next job may be smaller
            traceback.print_exc()
            line = " ".join(str(error).split())[:300]
            with self._changed:
                job.error, job.state = f"{type(error).__name__}: {line}", "failed"
