"""Samplers against diffusers' schedulers, on a model in closed form and the same noise."""

import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.diffusion.samplers import make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import make_schedule, make_timesteps
from tests.diffusion.test_samplers import published_eps

torch = pytest.importorskip("torch", reason="needs the parity extra")
diffusers = pytest.importorskip("diffusers", reason="needs the parity extra")

STEPS = 12
BETAS = dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
SOLVER = dict(**BETAS, timestep_spacing="trailing", final_sigmas_type="zero")
SCHEDULERS = {
    "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**SOLVER),
    "dpmpp_2m_sde": lambda: diffusers.DPMSolverMultistepScheduler(
        **SOLVER, algorithm_type="sde-dpmsolver++"
    ),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**SOLVER, solver_type="bh2"),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(
        **BETAS, timestep_spacing="trailing"
    ),
}
IN_SIGMAS = ("heun", "euler", "euler_ancestral")  # these work on z / alpha


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trajectory(name, monkeypatch):
    random = np.random.default_rng(0)
    z_T = random.standard_normal((2, 4, 4, 3), dtype=np.float32)
    noise = random.standard_normal((STEPS, 2, 4, 4, 3), dtype=np.float32)
    eps = published_eps(np.float32([0.3, -1.0]))
    schedule = make_schedule(name="linear", linear_start=0.0015, linear_end=0.0195)
    timesteps = make_timesteps("trailing", STEPS, schedule)
    ours = sample(
        make_sampler(name, schedule),
        eps,
        jnp.asarray(z_T),
        timesteps=timesteps,
        noise=lambda i: jnp.asarray(noise)[i],
    )

    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    visited = np.unique(scheduler.timesteps.numpy())[::-1]
    np.testing.assert_array_equal(visited, timesteps[0])
    z = torch.from_numpy(z_T)
    if name in IN_SIGMAS:  # at the start too: theirs is sqrt(1 + s^2), which forgets the alpha
        z = z / float(schedule.alpha[timesteps[0][0]])
    draws = iter(torch.from_numpy(noise))
    options = {}
    if name == "euler_ancestral":
        module = diffusers.schedulers.scheduling_euler_ancestral_discrete
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: next(draws))
    for t in scheduler.timesteps:
        if name == "dpmpp_2m_sde":
            options["variance_noise"] = next(draws)
        scaled = scheduler.scale_model_input(z, t).numpy()
        output = torch.from_numpy(np.array(eps(scaled, float(t))))
        z = scheduler.step(output, t, z, **options).prev_sample
    np.testing.assert_allclose(ours, z.numpy(), rtol=0, atol=2e-5 * np.abs(z.numpy()).max())
