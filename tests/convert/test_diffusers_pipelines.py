"""diffusers' own pipelines on exported folders, against this package's sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from latent_diffusion_jax.conditioning.cond import Cond
from latent_diffusion_jax.convert import diffusers
from latent_diffusion_jax.convert.diffusers import scheduler
from latent_diffusion_jax.diffusion.guidance import guide
from latent_diffusion_jax.diffusion.prediction import PREDICTIONS, make_denoise
from latent_diffusion_jax.diffusion.samplers import make_sampler, sample
from latent_diffusion_jax.diffusion.schedule import make_schedule, make_timesteps
from tests.convert.models import MODELS, apply, make_model

torch = pytest.importorskip("torch", reason="parity with diffusers needs torch")
library = pytest.importorskip("diffusers", reason="parity with diffusers needs diffusers")
transformers = pytest.importorskip("transformers", reason="so do its text encoders")

STEPS = 4
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def bert_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle"]
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def clip_tokenizer(folder):
    vocab = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {w: i for i, w in enumerate(vocab)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=9)
    tokenizer.save_pretrained(folder)
    return tokenizer


def exported(name, tmp_path, tokenizer=None):
    """The model, and its folder as diffusers loads it by itself."""
    config, pipeline = MODELS[name]
    model = make_model(config)
    assert diffusers.export(tmp_path / "a", model.tensors, config, tokenizer=tokenizer) == pipeline
    pipe = library.DiffusionPipeline.from_pretrained(tmp_path / "a")
    assert type(pipe).__name__ == pipeline
    pipe.set_progress_bar_config(disable=True)
    return model, pipe


def sampled(model, z, scale=1.0, concat=None, context=None):
    """An image in [0, 1] by this package: DDIM, eta 0; context is of both conditions if guided."""
    config = model.config
    schedule = make_schedule(**config["diffusion"]["schedule"])

    def network(z_t, t):
        cond = Cond(concat=concat, context=context)
        return model.networks["unet"].apply({"params": model.params["unet"]}, z_t, t, cond)

    denoise = make_denoise(network, schedule, config["diffusion"]["prediction"])
    denoise = denoise if scale == 1 else guide(denoise, scale)
    times = make_timesteps(config["sample"]["timesteps"], STEPS, schedule)
    run = jax.jit(
        lambda z: sample(
            make_sampler("ddim", schedule, eta=0.0),
            denoise,
            z,
            timesteps=times,
            noise=lambda i: jnp.zeros(z.shape),
        )
    )
    z = np.asarray(run(z)) / config["latents"]["scale"]
    if config["first_stage"]["kind"] == "vq":
        params = {"params": model.params["first_stage"]}
        z = model.networks["first_stage"].apply(params, z, method="quantized").entries
    image = apply(model, "first_stage", z, method="decode")
    return np.clip(image / 2 + 0.5, 0, 1)


def noise(*shape):
    """What a pipeline draws from a generator of seed 0, NHWC."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return np.moveaxis(drawn.numpy(), 1, -1)


def close(ours, theirs):
    error = np.abs(ours - np.asarray(theirs)).max()
    print(f"{error:.1e}")
    assert error < 3e-5


def test_unconditional(tmp_path):
    model, pipe = exported("unconditional_kl", tmp_path)
    images = pipe(
        2, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np"
    ).images
    close(sampled(model, noise(2, 4, 8, 8)), images)


def test_super_resolution(tmp_path):
    model, pipe = exported("super_resolution", tmp_path)
    low = np.random.default_rng(0).uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)
    images = pipe(
        torch.from_numpy(np.moveaxis(low, -1, 1).copy()),
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    close(sampled(model, noise(1, 3, 8, 12), concat=low), images)


def test_text(tmp_path):
    tokenizer = bert_tokenizer(tmp_path / "tokenizer")
    model, pipe = exported("text", tmp_path, tmp_path / "tokenizer")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    images = pipe(
        ["a red circle"],
        height=64,  # the pipeline divides by 8, whatever the first stage does
        width=64,
        latents=torch.from_numpy(latents),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
    ).images
    words = tokenizer(["", "a red circle"], padding="max_length", max_length=77)["input_ids"]
    context = apply(model, "text", np.int32(words))
    close(sampled(model, np.moveaxis(latents, 1, -1), 3.0, context=context), images)


@pytest.mark.parametrize("name", ["stable_diffusion_1", "stable_diffusion_2"])
def test_stable_diffusion(name, tmp_path):
    tokenizer = clip_tokenizer(tmp_path / "tokenizer")
    model, pipe = exported(name, tmp_path, tmp_path / "tokenizer")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    images = pipe(
        "a red",
        latents=torch.from_numpy(latents),
        height=16,
        width=16,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
    ).images
    words = tokenizer(["", "a red"], padding="max_length", max_length=9)["input_ids"]
    context = apply(model, "text", np.int32(words))
    close(sampled(model, np.moveaxis(latents, 1, -1), 3.0, context=context), images)


def test_inpainting_runs_with_a_tokenizer_given_later(tmp_path):
    config, pipeline = MODELS["stable_diffusion_inpainting"]
    diffusers.export(tmp_path / "a", make_model(config).tensors, config)
    tokenizer = clip_tokenizer(tmp_path / "tokenizer")
    pipe = library.DiffusionPipeline.from_pretrained(tmp_path / "a", tokenizer=tokenizer)
    assert type(pipe).__name__ == pipeline
    images = pipe(
        "a red",
        image=torch.zeros(1, 3, 16, 16),
        mask_image=torch.ones(1, 1, 16, 16),
        height=16,
        width=16,
        num_inference_steps=2,
        output_type="np",
    ).images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


@pytest.mark.parametrize("schedule", ["linear", "sqrt_linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("timesteps", ["uniform", "trailing"])
def test_same_noise_and_same_steps(schedule, prediction, timesteps, tmp_path):
    section = dict(name=schedule, timesteps=1000)
    if schedule != "cosine":
        section |= dict(linear_start=0.001, linear_end=0.02)
    diffusion = dict(schedule=section, prediction=prediction)
    config = scheduler.to_config(diffusion, timesteps)
    assert scheduler.from_config(config, "x") == (diffusion, timesteps)
    theirs = library.DDIMScheduler.from_config(config)
    ours = make_schedule(**section)
    alpha = theirs.alphas_cumprod.numpy()
    np.testing.assert_allclose(np.square(ours.alpha), alpha, rtol=2e-4, atol=1e-7)
    theirs.set_timesteps(STEPS)
    t, _ = make_timesteps(timesteps, STEPS, ours)
    np.testing.assert_array_equal(theirs.timesteps.numpy(), t)
    z = np.random.default_rng(0).standard_normal((1, 4, 4, 2), dtype=np.float32)
    x = torch.from_numpy(z)
    for step in theirs.timesteps:
        x = theirs.step(torch.tanh(x) * 0.5, step, x).prev_sample
    result = sample(
        make_sampler("ddim", ours, eta=0.0),
        make_denoise(lambda z, t: jnp.tanh(z) * 0.5, ours, prediction),
        jnp.asarray(z),
        timesteps=make_timesteps(timesteps, STEPS, ours),
        noise=lambda i: jnp.zeros(z.shape),
    )
    np.testing.assert_allclose(result, x.numpy(), rtol=2e-4, atol=2e-4)
