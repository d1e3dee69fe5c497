"""The noise schedule as diffusers' `DDIMScheduler`."""

from collections.abc import Mapping
from typing import Any

from latent_diffusion_jax.convert.diffusers.config import Config, check, number
from latent_diffusion_jax.errors import UserError, choose

# What we call linear is linear in sqrt(beta), and what diffusers calls linear we call sqrt_linear:
# either name is as published.
SCHEDULES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
COSINE_S = 8e-3  # diffusers' constant
OFF = dict(rescale_betas_zero_snr=False, thresholding=False, trained_betas=None)


def to_config(diffusion: Mapping[str, Any], timesteps: str) -> Config:
    """scheduler_config.json of a section `diffusion`, and of how `sample` chooses timesteps.

    Raises:
      UserError: diffusers has no such schedule.
    """
    schedule = diffusion["schedule"]
    name = choose("schedule that diffusers has:", schedule["name"], SCHEDULES)
    config: Config = dict(
        _class_name="DDIMScheduler",
        beta_schedule=name,
        clip_sample=False,
        num_train_timesteps=schedule.get("timesteps", 1000),
        prediction_type=choose("prediction", diffusion["prediction"], PREDICTIONS),
        set_alpha_to_one=timesteps == "trailing",
        steps_offset=1,
        timestep_spacing="trailing" if timesteps == "trailing" else "leading",
    )
    if "linear_start" in schedule:
        config["beta_start"] = schedule["linear_start"]
        config["beta_end"] = schedule["linear_end"]
    elif schedule.get("cosine_s", COSINE_S) != COSINE_S:
        raise UserError(
            f"diffusers has no cosine schedule with a diffusion.schedule.cosine_s other than"
            f" {COSINE_S}"
        )
    return config


def from_config(config: Mapping[str, Any], place: str) -> tuple[Config, str]:
    """The section `diffusion` of a scheduler_config.json, and how it chooses timesteps.

    Any scheduler of the same noise will do: its class is a choice of sampler.

    Raises:
      UserError: noise of another kind.
    """
    ours = {theirs: name for name, theirs in SCHEDULES.items()}
    if "beta_schedule" not in config:
        raise UserError(f"{place!r} has no beta_schedule: it is not of a model with betas")
    check(config, OFF, place)
    schedule: Config = dict(
        name=_named(config["beta_schedule"], ours, place),
        timesteps=number({"num_train_timesteps": 1000, **config}, "num_train_timesteps", place),
    )
    if schedule["name"] != "cosine":
        for name, ours_name in (("beta_start", "linear_start"), ("beta_end", "linear_end")):
            if not isinstance(config.get(name), float):
                raise UserError(f"{place!r}: {name} is {config.get(name)!r}, not a number")
            schedule[ours_name] = config[name]
    predictions = {theirs: name for name, theirs in PREDICTIONS.items()}
    prediction = _named(config.get("prediction_type", "epsilon"), predictions, place)
    trailing = config.get("timestep_spacing") == "trailing"
    return dict(schedule=schedule, prediction=prediction), "trailing" if trailing else "uniform"


def _named(value: Any, names: Mapping[str, str], place: str) -> str:
    if not isinstance(value, str) or value not in names:
        raise UserError(f"{place!r}: {value!r} is none of {', '.join(names)}")
    return names[value]
