"""Writes docs/samplers.png and prints the table of docs/samplers.md: `python -m tests.solvers`.

Data: two Gaussians on a line, whose best eps is known; the truth is the probability flow in 1,000
steps of Heun's method. For samplers with noise: the mean absolute deviation between the quantiles
of what they draw and those of the data.
"""

import jax
import jax.numpy as jnp
import numpy as np

from latent_diffusion_jax.diffusion.samplers import make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import at, make_schedule, make_timesteps

SCHEDULE = make_schedule(name="linear", linear_start=0.0015, linear_end=0.0195)
MEANS, STD = np.float32([-1.0, 0.6]), 0.15
CALLS = {"heun": 2}  # of the model in a step, where it is not one
STEPS = (5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160)
DETERMINISTIC = ("ddim", "plms", "heun", "dpmpp_2m", "unipc")
STOCHASTIC = ("ddpm", "dpmpp_2m_sde")


def eps(z_t, t):
    """E[eps | z_t] for the mixture, equally weighted."""
    alpha, sigma = at(SCHEDULE, t, z_t.ndim)
    variance = (alpha * STD) ** 2 + sigma**2
    distance = z_t[..., None] - alpha * MEANS.reshape((1,) * z_t.ndim + (-1,))
    weight = jax.nn.softmax(-(distance**2) / (2 * variance), axis=-1)
    return sigma / variance * jnp.sum(weight * distance, axis=-1)


def run(name, z, steps, timesteps):
    keys = jax.random.split(jax.random.key(1), steps)
    times = make_timesteps(timesteps, steps, SCHEDULE)
    sampler = make_sampler(name, SCHEDULE)
    go = jax.jit(
        lambda z: sample(
            sampler, eps, z, timesteps=times, noise=lambda i: jax.random.normal(keys[i], z.shape)
        )
    )
    return np.asarray(go(z)).ravel()


def errors(timesteps):
    """sampler -> [error for each of STEPS]."""
    quantiles = (np.arange(4_000) + 0.5) / 4_000
    z = jax.scipy.stats.norm.ppf(jnp.asarray(quantiles)).reshape(1, -1, 1, 1)
    truth = run("heun", z, 1000, "trailing")
    found = {}
    for name in DETERMINISTIC:
        found[name] = [np.abs(run(name, z, n, timesteps) - truth).mean() for n in STEPS]
    data = np.quantile(
        np.random.default_rng(0).normal(np.repeat(MEANS, 200_000), STD).astype(np.float32),
        quantiles,
    )
    z = jax.random.normal(jax.random.key(0), (1, 200_000, 1, 1))
    for name in STOCHASTIC:
        drawn = (np.quantile(run(name, z, n, timesteps), quantiles) for n in STEPS)
        found[name] = [np.abs(x - data).mean() for x in drawn]
    return found


def needed(row, calls, bound):
    """The fewest calls of the model whose error is below the bound."""
    below = [n * calls for n, error in zip(STEPS, row, strict=True) if error < bound]
    return str(below[0]) if below else f"> {STEPS[-1] * calls}"


def main():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    print(
        "| sampler | "
        + " | ".join(f"{t}, {b}" for t in ("trailing", "karras") for b in (0.03, 0.01))
    )
    rows = {}
    for axes, timesteps in zip(figure.subplots(1, 2, sharey=True), ("trailing", "karras")):
        for name, row in errors(timesteps).items():
            calls = CALLS.get(name, 1)
            axes.loglog(
                np.multiply(STEPS, calls), row, "--" if name in STOCHASTIC else "-", label=name
            )
            rows.setdefault(name, []).extend(needed(row, calls, bound) for bound in (0.03, 0.01))
        axes.set(title=f"timesteps {timesteps}", xlabel="calls of the model")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean absolute error")
    figure.axes[0].legend(fontsize=8)
    figure.savefig("docs/samplers.png", dpi=90)
    for name, row in rows.items():
        print(f"| `{name}` | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
