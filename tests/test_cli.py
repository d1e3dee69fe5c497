"""Every verb through the command line: what it makes, and one clear line for every mistake."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.__main__ import main
from latent_diffusion_jax.data.shapes import CLASS_NAMES
from latent_diffusion_jax.train.metrics import read_jsonl
from tests.cli import (
    DIFFUSION,
    FIRST_STAGE,
    FIRST_STAGE_KEYS,
    ROOT,
    SMALL,
    SMALL_UNET,
    arrays,
    compilations,
    do,
    mistake,
    run,
    without,
)

VERBS = (
    *("train", "encode", "sample", "evaluate", "reconstruct", "convert", "export", "describe"),
    *("demo", "bench"),
)
PIXELS = """
from configs.diffusion import shapes


def get_config(arg=""):
    config = shapes.get_config("pixels")
    with config.unlocked():
        config.conditioning = dict(kind="none")
    return config
"""


@pytest.fixture(autouse=True, scope="module")
def sigterm():
    """`train` changes what the signal does, for the rest of its process."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ae(runs):
    do("train", FIRST_STAGE, f"--workdir={runs}/ae", *SMALL)
    return runs / "ae"


@pytest.fixture(scope="module")
def diffusion(ae):
    """The arguments of phase 2, on cached latents."""
    return [DIFFUSION, *SMALL, *SMALL_UNET, f"--config.run.first_stage={ae}"]


@pytest.fixture(scope="module")
def ldm(runs, diffusion):
    do("encode", *diffusion, f"--workdir={runs}/ldm")
    with compilations() as names:
        do("train", *diffusion, f"--workdir={runs}/ldm")
    (runs / "compiled.txt").write_text(" ".join(names))
    return runs / "ldm"


@pytest.fixture(scope="module")
def pixels(runs):
    """An unconditional model without a first stage, from a config of one's own."""
    (runs / "pixels.py").write_text(PIXELS)
    small = [*without(SMALL, FIRST_STAGE_KEYS), *SMALL_UNET, "--config.data.image_size=16"]
    do("train", f"--config={runs}/pixels.py", f"--workdir={runs}/pixels", *small)
    return runs / "pixels"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of any size and mode."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 4), np.uint8)
    for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "CMYK"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.fromarray(noise).convert("RGB").convert(mode).save(folder / f"{mode}.{suffix}")
    Image.fromarray(noise[:9, :300]).save(folder / "small.png")
    Image.fromarray(noise[:1, :1]).save(folder / "pixel.png")
    return folder


def read(folder):
    """The samples of a folder, int [N, H, W, 3]."""
    files = sorted(folder.glob("[0-9]*.png"))
    return np.stack([np.asarray(Image.open(file), np.int32) for file in files])


# Help


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_the_options_of_one_verb_with_examples(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    options = set(re.findall(r"^  (--[a-z_]+)", text, re.MULTILINE))
    own = {
        "train": set(),
        "encode": set(),
        "sample": {"--number", "--batch", "--class", "--scale", "--sampler", "--steps"}
        | {"--timesteps", "--eta", "--seed", "--out", "--from", "--weights", "--size"}
        | {"--prompt", "--layout", "--segmentation", "--image", "--mask", "--embeddings"}
        | {"--interval", "--threshold", "--strength", "--guide", "--guide_scale"}
        | {"--interpolate", "--window", "--tile", "--ema_length", "--like"},
        "demo": {"--from", "--weights", "--port"},
        "evaluate": {"--number", "--batch", "--seed", "--out", "--from", "--weights"}
        | {"--sampler", "--steps", "--timesteps", "--eta", "--scale", "--ema_length"}
        | {"--images", "--reference", "--inception", "--preparation", "--save_statistics"}
        | {"--neighbours", "--lpips", "--clip", "--compare", "--json"},
        "reconstruct": {"--number", "--batch", "--input", "--out", "--from", "--weights"},
        "convert": {"--from", "--to", "--weights", "--dtype"},
        "export": {"--from", "--to", "--weights", "--platforms", "--size", "--window"}
        | {"--ema_length"}
        | {"--sampler", "--steps", "--timesteps", "--eta", "--scale", "--interval", "--threshold"},
        "describe": {"--json", "--arrays", "--devices", "--kind", "--compile"},
        "bench": {"--size", "--what", "--batch", "--dtype", "--turns", "--peers", "--json"},
    }
    shared = {"--config"} if verb in ("describe", "bench") else {"--config", "--workdir"}
    if verb not in ("demo", "describe", "convert", "export", "bench"):
        shared |= {"--coordinator", "--processes", "--process", "--wait", "--stall", "--lost"}
    assert options == own[verb] | shared
    assert f"python -m latent_diffusion_jax {verb} --" in text.partition("example")[2]
    assert max(map(len, text.splitlines())) <= 100


def test_examples_of_the_help_are_real_commands(capsys):
    from latent_diffusion_jax.__main__ import VERBS as RUN
    from latent_diffusion_jax.arguments import EXAMPLES, make_parser, split_config
    from latent_diffusion_jax.config import load_config

    for text in EXAMPLES.values():
        commands = re.findall(r"latent_diffusion_jax (.*)", text.replace("\\\n", " "))
        assert commands
        for command in commands:
            words = re.sub(r'"(.*?)"', lambda m: m[1].replace(" ", "_"), command).split()
            rest, spec, overrides = split_config(words)
            make_parser(RUN).parse_args(rest)
            if spec:
                load_config(str(ROOT / spec), overrides)


@pytest.mark.parametrize(
    "command, message",
    [
        ([], "required: VERB"),
        (["trian"], "'trian' (choose from"),
        (["train", "--steps=3", "--workdir=x"], "unrecognized arguments: --steps=3"),
        (["train", FIRST_STAGE], "required: --workdir"),
        (["train", FIRST_STAGE, "--workdir="], "'' is not a path"),
        (["sample", "--workdir=x", "--steps=0"], "'0' is not a whole number from 1 on"),
        (["sample", "--workdir=x", "--number=two"], "'two' is not a whole number from 1 on"),
        (["sample", "--workdir=x", "--seed=-1"], "'-1' is not a whole number from 0"),
        (["sample", "--workdir=x", "--seed=1.5"], "'1.5' is not a whole number from 0"),
        (["sample", "--workdir=x", "--seed=4294967296"], "'4294967296' is not a whole number"),
        (["sample", "--workdir=x", "--scale=nan"], "'nan' is not a finite number"),
        (["reconstruct", "--workdir=x", "--out=x.jpg"], "'x.jpg' is not a .png file"),
    ],
)
def test_what_the_parser_refuses(command, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_training_compiles_each_program_once(runs, ldm):
    """Of four steps, three evaluations and three rows of pictures."""
    names = (runs / "compiled.txt").read_text().split()
    for program in ("initial", "train_step", "eval_step", "generate"):
        assert names.count(program) == 1, program


# Mistakes

TRAINING = [
    ("optm.lr=1", "section in config: 'optm'; did you mean 'optim'? one of data, discriminator"),
    ("optim.l=1", "key in config.optim: 'l'; did you mean 'lr'? one of b1, b2"),
    ("optim.lr=fast", "config.optim.lr=fast"),
    ("optim.name=sgd", "unknown optimizer 'sgd'; one of adafactor, adam, adamw"),
    ("optim.schedule.name=cosine", "unknown learning-rate schedule 'cosine'"),
    ("phase=third", "unknown phase 'third'; one of diffusion, first_stage"),
    ("dtype=float16", "unknown dtype 'float16'.* one of bfloat16, float32"),
    ("first_stage.kind=kll", "unknown first stage 'kll'; did you mean 'kl'? one of identity"),
    ("data.source.name=shape", "unknown data source 'shape'; did you mean 'shapes'? one of"),
    ("data.crop=middle", "unknown crop 'middle'; one of center, random"),
    ("data.image_size=33", "image size 33 .* f = 4; nearest sizes: 32 or 36"),
    ("seed=-1", "seed -1 must be 0 to 2"),
    ("mesh.data=3", "8 devices do not divide into a mesh of data=3 x fsdp=1"),
    ("train.batch_size=12", "train.batch_size 12 does not divide by 8 devices"),
    ("train.batch_size=0", "train.batch_size 0 must be at least 1"),
    ("train.accumulate=3", "train.batch_size 8 .* 8 devices x train.accumulate 3"),
    ("train.accumulate=0", "train.accumulate 0 must be at least 1"),
    ("train.ema_networks=('unet',)", "ema_networks 'unet'; one of autoencoder"),
    ("train.ema_lengths=(0.1,)", "ema_lengths need networks to average: set ema_networks"),
    ("train.ema_lengths=(0.5,)", "a length of averages of 0.5; choose from above 0 to 0.289"),
    ("run.steps=0", "run.steps 0 must be at least 1"),
    ("run.keep=0", "keep=0: at least one checkpoint must stay"),
]


def literal(text):
    """A pattern in which only `.*` is special."""
    return ".*".join(re.escape(part) for part in text.split(".*"))


@pytest.mark.parametrize("change, message", TRAINING)
def test_mistakes_in_phase_1(change, message, tmp_path, capsys):
    line = mistake(
        capsys, "train", f"{FIRST_STAGE}:tiny", f"--workdir={tmp_path}/x", f"--config.{change}"
    )
    assert re.search(literal(message), line)


DIFFUSING = [
    ("run.first_stage=", "phase 2 needs a trained first stage: --config.run.first_stage="),
    ("run.first_stage=nowhere", "config.run.first_stage: no config.json in 'nowhere'"),
    ("first_stage.embed_dim=3", "first_stage is not what was trained: embed_dim: 3 here, 4 in"),
    ("data.image_size=34", "latents of 17x17 .* 2 levels of unet.channel_mult.*multiple of 4"),
    ("conditioning.kind=lable", "unknown conditioning 'lable'; did you mean 'label'? one of"),
    ("conditioning.num_classes=7", "the data has 12 classes, conditioning.num_classes is 7"),
    ("diffusion.prediction=epsilon", "unknown prediction 'epsilon'; did you mean 'eps'? one of"),
    ("diffusion.schedule.name=linar", "unknown schedule 'linar'; did you mean 'linear'?"),
    ("latents.source=disk", "unknown latents.source 'disk'; one of cache, online"),
    ("latents.scale=0.0", "latents.scale 0.0 must be above 0"),
    ("sample.sampler=dimm", "unknown sampler 'dimm'; did you mean 'ddim'? one of ddim, ddpm"),
    ("sample.timesteps=unifrm", "unknown timesteps 'unifrm'; did you mean 'uniform'?"),
    ("sample.steps=2000", "2000 sampling steps; choose from 1 to 1000"),
    ("sample.options.eta=3.0", "eta 3.0 of the sampler 'ddim'; choose from 0 to 1"),
]


@pytest.mark.parametrize("change, message", DIFFUSING)
def test_mistakes_in_phase_2(change, message, ae, tmp_path, capsys):
    small = [
        *SMALL,
        *without(SMALL_UNET, "--config.unet.channel_mult"),
        "--config.unet.channel_mult=(1,2)",
    ]
    line = mistake(
        capsys,
        "train",
        DIFFUSION,
        *small,
        f"--config.run.first_stage={ae}",
        "--config.latents.source=online",
        f"--config.{change}",
        f"--workdir={tmp_path}/x",
    )
    assert re.search(literal(message), line)


def test_files_and_workdirs_that_are_missing(ae, tmp_path, capsys):
    def of(*command):
        return mistake(capsys, *command)

    here = f"--workdir={tmp_path}/x"
    missing = f"--config={ROOT}/configs/first_stage/shape.py"
    assert "no config file" in (line := of("train", missing, here))
    assert "shapes.py" in line
    assert "give --config=FILE" in of("train", here)
    assert "--config.seed has no value" in of("train", FIRST_STAGE, here, "--config.seed")
    assert "'tinny'; did you mean 'tiny'?" in of("train", f"{FIRST_STAGE}:tinny", here)
    assert f"no config.json in '{tmp_path}/x'" in of("sample", here)
    assert f"no config.json in '{tmp_path}/x'" in of("reconstruct", here)
    line = of("encode", FIRST_STAGE, *SMALL, here)
    assert line.endswith("encode takes a config of phase 'diffusion', not 'first_stage'")
    line = of("sample", f"--workdir={ae}")
    assert line.endswith(f"'{ae}' holds phase 'first_stage'; this takes 'diffusion'")
    assert not (tmp_path / "x").exists()  # nothing was made on the way
    shutil.copytree(ae, tmp_path / "untrained", ignore=shutil.ignore_patterns("[0-9]*"))
    line = of("reconstruct", f"--workdir={tmp_path}/untrained")
    assert f"no checkpoint in '{tmp_path}/untrained' yet" in line


def test_a_first_stage_that_will_not_do(ae, diffusion, tmp_path, capsys):
    def of(origin):
        return mistake(
            capsys,
            *("train", *diffusion, "--config.latents.source=online", f"--workdir={tmp_path}/x"),
            f"--config.run.first_stage={origin}",
        )

    shutil.copytree(ae, tmp_path / "untrained", ignore=shutil.ignore_patterns("[0-9]*"))
    line = of(tmp_path / "untrained")
    assert f"config.run.first_stage: no checkpoint in '{tmp_path}/untrained' yet" in line


def test_paths_that_cannot_be_written(ae, ldm, tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in (
        ["train", f"{FIRST_STAGE}:tiny", f"--workdir={tmp_path}/file"],
        ["train", f"{FIRST_STAGE}:tiny", f"--workdir={tmp_path}/file/x"],
        ["sample", f"--workdir={ldm}", f"--out={tmp_path}/file"],
        ["reconstruct", f"--workdir={ae}", f"--out={tmp_path}/file/x.png"],
    ):
        assert f"{tmp_path}/file" in mistake(capsys, *command)


def test_mistakes_in_sampling(ldm, pixels, capsys):
    def of(*options, workdir=ldm):
        return mistake(capsys, "sample", f"--workdir={workdir}", *options)

    assert "unknown sampler 'dimm'; did you mean 'ddim'? one of ddim, ddpm" in of("--sampler=dimm")
    assert "2000 sampling steps; choose from 1 to 1000" in of("--steps=2000")
    assert "eta 3.0 of the sampler 'ddim'; choose from 0 to 1" in of("--eta=3")
    assert "sampler 'ddpm'" in (line := of("--sampler=ddpm", "--eta=1"))
    assert "'eta'" in line
    line = of("--class=red circl")
    assert "unknown class 'red circl'; did you mean 'red circle'? one of blue circle" in line
    assert "class 12 is not one of 0..11" in of("--class=0,12")
    assert "--class=1: this model has no such condition; it takes --guide, --image, --mask" in of(
        "--class=1", workdir=pixels
    )


def test_mistakes_in_reconstruction(ae, tmp_path, capsys):
    def of(folder):
        return mistake(capsys, "reconstruct", f"--workdir={ae}", f"--input={folder}")

    assert f"no folder '{tmp_path}/none' of images" in of(tmp_path / "none")
    assert f"no images in '{tmp_path}'" in of(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert f"1 of 1 images cannot be read: '{tmp_path}/broken.png'" in of(tmp_path)


def test_latents_that_are_missing_or_of_something_else(ae, ldm, diffusion, tmp_path, capsys):
    line = mistake(capsys, "train", *diffusion, f"--workdir={tmp_path}/x")
    assert f"no cached latents in '{tmp_path}/x/latents/train': run `encode`" in line
    shutil.copytree(ldm / "latents", tmp_path / "x/latents")
    seed = "--config.data.source.seed=1"
    line = mistake(capsys, "train", *diffusion, f"--workdir={tmp_path}/x", seed)
    assert "data.source.seed: 1 here, 0 in the cache: run `encode`" in line


def test_another_config_is_refused_with_the_difference(ae, ldm, diffusion, capsys):
    here = f"--workdir={ldm}"
    expected = "holds another config; optim.lr: 0.5 here, 0.001 in the workdir"
    assert expected in mistake(capsys, "train", *diffusion, here, "--config.optim.lr=0.5")
    assert expected in mistake(capsys, "sample", *diffusion, here, "--config.optim.lr=0.5")
    expected = "holds another config; unet.model_channels: 16 here, 8 in the workdir"
    assert expected in mistake(capsys, "sample", here, "--config.unet.model_channels=16")
    assert "another config" in mistake(capsys, "train", FIRST_STAGE, *SMALL, here)
    before = read_jsonl(str(ldm / "metrics.jsonl"))
    do("train", *diffusion, here, "--config.run.log_every=7", "--config.run.keep=5")
    assert read_jsonl(str(ldm / "metrics.jsonl")) == before


def test_divergence_is_one_line_and_no_checkpoint_has_it(tmp_path, capsys):
    options = [*SMALL, "--config.run.checkpoint_every=1", "--config.run.image_every=0"]
    options += ["--config.run.steps=40", "--config.run.eval_every=0", "--config.mesh.data=1"]
    options += ["--config.run.max_skipped=3"]
    wild = ["--config.optim.lr=1e20", "--config.optim.schedule.warm_up_steps=4"]
    line = mistake(capsys, "train", FIRST_STAGE, *options, *wild, f"--workdir={tmp_path}")
    found = re.search(
        r"step (\d+) is not finite .* nor were the 2 .* checkpoint: step (\d+)$", line
    )
    assert found, line
    bad, good = map(int, found.groups())
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert good == saved[-1] == bad - 1
    for step in saved:
        assert all(np.isfinite(x).all() for x in arrays(tmp_path, step))


# What runs leave


def check_run(workdir, first, loss, validation, pictures):
    """The files of a finished run of 4 steps."""
    lines = read_jsonl(str(workdir / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    training = {*loss, "loss", "lr", "skipped", "images_per_second", "flops_per_second"}
    networks = ("autoencoder",) if first else ("unet", "conditioning")
    training |= {f"seconds_{kind}" for kind in ("data", "compute", "other")}
    training |= {f"grad_norm_{name}" for name in networks}
    for line in lines:
        kind = validation if any(key.startswith("validation") for key in line) else training
        assert line.keys() == {"step", *kind}
        assert all(np.isfinite(value).all() for value in line.values())
    boards = list((workdir / "tensorboard").iterdir())
    assert len(boards) >= 1
    assert all(board.stat().st_size > 500 for board in boards[:1])
    names = {f"{pictures}_{step:08d}.png" for step in (2, 4)}
    assert {path.name for path in (workdir / "images").iterdir()} == names
    assert Image.open(workdir / "images" / min(names)).size[0] > 8 * 32
    assert Image.open(workdir / "curves.png").size[0] > 1000
    stored = json.loads((workdir / "config.json").read_text())
    assert stored["phase"] == ("first_stage" if first else "diffusion")


def test_what_phase_1_leaves(ae):
    loss = {"l1", "rec", "nll", "kl", "z_mean", "z_std"}
    validation = {f"validation_{name}" for name in (*loss, "loss", "psnr", "ssim")}
    check_run(ae, True, loss, validation, "reconstructions")


def test_a_trace_of_some_steps(tmp_path, capsys):
    command = ["train", FIRST_STAGE, *SMALL, f"--workdir={tmp_path}/run"]
    do(*command, "--config.run.profile=2,3")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    for steps in ("3,2", "0,2", "1"):
        line = mistake(capsys, *command, f"--config.run.profile={steps}")
        assert "must be FIRST, LAST, from 1 on, or 0, 0" in line


def test_what_phase_2_leaves(ldm):
    loss = {f"loss_t{i}" for i in range(4)}
    validation = {f"validation_{name}" for name in (*loss, "loss")}
    check_run(ldm, False, loss, validation, "samples")


def test_encoding_is_done_once_and_damage_is_repaired(ldm, diffusion, capsys):
    latents = ldm / "latents"
    index = json.loads((latents / "train" / "index.json").read_text())
    scale = json.loads((ldm / "latent_scale.json").read_text())["latent_scale"]
    assert index["latent_scale"] == scale
    assert index["shards"][0]["moments"]["shape"] == [32, 16, 16, 8]
    assert (index["num_classes"], tuple(index["class_names"])) == (12, CLASS_NAMES)
    moments = np.load(latents / "train" / "00000" / "moments.npy")
    z = moments[..., :4] + np.exp(moments[..., 4:] / 2) * np.random.default_rng(0).normal(
        size=moments[..., :4].shape
    )
    assert abs(z.std() * scale - 1) < 0.05

    damaged = latents / "train" / "00000" / "label.npy"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    do("encode", *diffusion, f"--workdir={ldm}")
    said = capsys.readouterr().out
    assert f"validation: encoded before; to do it again, remove {latents}/validation" in said
    assert "train image 32/32 encoded" in said
    assert damaged.read_bytes() == whole
    assert sorted(p.name for p in latents.iterdir()) == ["train", "validation"]


def test_latents_of_other_weights_are_not_used(ae, ldm, diffusion, tmp_path, capsys):
    """As of a first stage that was trained on, and copied again."""
    shutil.copytree(ldm, tmp_path / "x", ignore=shutil.ignore_patterns("checkpoints", "first_*"))
    shutil.copytree(ae, tmp_path / "ae")
    shutil.rmtree(tmp_path / "ae/checkpoints/4")  # those of step 2 are left
    here = [*diffusion, f"--workdir={tmp_path}/x", f"--config.run.first_stage={tmp_path}/ae"]
    line = mistake(capsys, "train", *here)
    assert re.search(r"weights: \d+ here, \d+ in the cache: run `encode`", line)
    scales = [json.loads((tmp_path / "x/latent_scale.json").read_text())["latent_scale"]]
    do("encode", *here)
    scales.append(json.loads((tmp_path / "x/latent_scale.json").read_text())["latent_scale"])
    assert scales[0] != scales[1]
    assert "encoded before" not in capsys.readouterr().out


def test_vector_quantised_first_stage(runs, capsys):
    small = [*SMALL, "--config.first_stage.codebook_size=16", "--config.mesh.data=1"]
    small += ["--config.run.eval_every=0", "--config.run.image_every=0"]  # but at the end
    do("train", f"{FIRST_STAGE}:vq", *small, f"--workdir={runs}/vq")
    losses = {"codebook", "commitment", "perplexity"}
    assert losses & read_jsonl(f"{runs}/vq/metrics.jsonl")[0].keys()
    here = f"--workdir={runs}/vq_ldm"
    origin = [f"--config.run.first_stage={runs}/vq", "--config.latents.source=online"]
    do("train", f"{DIFFUSION}:vq", *small, *SMALL_UNET, *origin, here)
    assert (runs / "vq_ldm/images/samples_00000004.png").exists()


# Images


@pytest.fixture(scope="module")
def samples(ldm):
    """11 images on 8 devices at once."""
    do("sample", f"--workdir={ldm}", "--number=11")
    return read(ldm / "samples")


def sampled(ldm, out, *options):
    do("sample", f"--workdir={ldm}", f"--out={out}", *options)
    return read(out)


def test_samples_and_what_they_are(ldm, samples):
    assert samples.shape == (11, 32, 32, 3)
    about = json.loads((ldm / "samples/samples.json").read_text())
    asked = {"step": 4, "seed": 0, "sampler": "ddim", "options": {"eta": 1.0}, "steps": 3}
    assert {**about, **asked, "scale": 2.0, "timesteps": "uniform"} == about
    assert [image["file_name"] for image in about["images"]] == [f"{i:06d}.png" for i in range(11)]
    assert [image["label"] for image in about["images"]] == list(range(11))
    assert [image["class"] for image in about["images"]] == list(CLASS_NAMES[:11])
    grid = np.asarray(Image.open(ldm / "samples/grid.png"))
    assert grid.shape == (36, 11 * 34 + 2, 3)  # a column per class
    np.testing.assert_array_equal(grid[2:34, 4 * 34 + 2 : 5 * 34], samples[4])


def test_an_image_is_the_same_in_any_batch_on_any_devices(ldm, samples, tmp_path):
    options = [f"--workdir={ldm}", f"--out={tmp_path}/one", "--number=7", "--batch=3"]
    said = run("sample", *options, devices=1)
    assert abs(read(tmp_path / "one") - samples[:7]).max() <= 1
    lines = said.splitlines()
    assert [line.split()[1] for line in lines[:3]] == ["3/7", "6/7", "7/7"]
    assert lines[3:] == [f"7 images in {tmp_path}/one, side by side in {tmp_path}/one/grid.png"]
    assert "\r" not in said  # plain lines where there is no terminal


def test_samples_depend_on_the_seed_and_the_options(ldm, diffusion, samples, tmp_path, monkeypatch):
    again = sampled(ldm, tmp_path / "config", *diffusion, "--number=11")
    np.testing.assert_array_equal(again, samples)

    monkeypatch.setattr("latent_diffusion_jax.pipeline.GRID", 4)
    seeded = sampled(ldm, tmp_path / "seed", "--number=11", "--seed=1")
    assert all(abs(seeded - samples).max((1, 2, 3)) > 8)
    assert Image.open(tmp_path / "seed/grid.png").size == (4 * 34 + 2, 36)

    plain = sampled(ldm, tmp_path / "eta", "--number=11", "--eta=0")
    assert all(abs(plain - samples).max((1, 2, 3)) > 8)
    ddpm = sampled(ldm, tmp_path / "ddpm", "--number=11", "--sampler=ddpm", "--steps=3")
    assert abs(ddpm - samples).max() <= 1  # eta 1 is the same process, with the same noise


def test_labels_by_name_and_number(ldm, samples, tmp_path):
    options = ["--number=5", "--class=red circle, 5", "--scale=1", "--timesteps=trailing"]
    assert len(sampled(ldm, tmp_path, *options)) == 5
    about = json.loads((tmp_path / "samples.json").read_text())
    assert [image["label"] for image in about["images"]] == [0, 5, 0, 5, 0]
    assert about["images"][1]["class"] == CLASS_NAMES[5]
    assert (about["scale"], about["timesteps"]) == (1.0, "trailing")


def test_sampling_without_condition_or_first_stage(pixels):
    do("sample", f"--workdir={pixels}", "--number=3")
    assert read(pixels / "samples").shape == (3, 16, 16, 3)
    about = json.loads((pixels / "samples/samples.json").read_text())
    assert about["images"][2] == {"file_name": "000002.png"}


def reconstructed(capsys, *options):
    capsys.readouterr()
    do("reconstruct", *options)
    said = capsys.readouterr().out
    numbers = r"PSNR (\S+) dB, SSIM (\S+), L1 (\S+) \(images in \[-1, 1\]\)"
    return re.fullmatch(rf"(.*): {numbers}\n", said).groups()


def test_reconstructions_of_the_validation_split(ae, ldm, pixels, capsys):
    path, *numbers = reconstructed(capsys, f"--workdir={ae}", "--number=12")
    assert Image.open(path).size == (8 * 34 + 2, 4 * 34 + 2)
    last = read_jsonl(str(ae / "metrics.jsonl"))[-1]  # of 8 of the images
    assert abs(float(numbers[0]) - last["validation_psnr"]) < 3
    found = reconstructed(capsys, f"--workdir={ldm}", "--number=12", "--batch=5")
    assert found == (f"{ldm}/reconstructions.png", *numbers)  # it has its first stage with it
    assert reconstructed(capsys, f"--workdir={pixels}")[1:] == ("inf", "1.0000", "0.0000")


def test_reconstructions_of_a_folder(ae, photos, tmp_path, capsys):
    out = tmp_path / "new" / "photos.png"
    options = [f"--workdir={ae}", f"--input={photos}", f"--out={out}"]
    assert reconstructed(capsys, *options)[0] == str(out)
    assert Image.open(out).size == (8 * 34 + 2, 4 * 34 + 2)  # 9 images: 8 and 1


# Facts


def test_description(capsys):
    do("describe", FIRST_STAGE, *SMALL, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["latent"], facts["f"], facts["devices"]) == ([16, 16, 4], 2, 8)
    do("describe", FIRST_STAGE, *SMALL, "--devices=4", "--kind=v5e")
    text = capsys.readouterr().out
    assert "latent      16 x 16 x 4 (f = 2)" in text
    assert "4 devices: data 4 x fsdp 1" in text
    assert re.search(
        r"fits v5e +yes \(0% of 16 GB\)\nstep on v5e at best, ms \(\w+ bounds it", text
    )
    do("describe", FIRST_STAGE, *SMALL, "--arrays")
    assert "autoencoder/decoder/conv_in/kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--devices=3"], "train.batch_size 8 does not divide by 3 devices x .* 1; 6 and 9 would"),
        (["--devices=6", "--config.mesh.fsdp=4"], "6 devices do not divide into a mesh"),
        (["--kind=v5"], "unknown kind of chip 'v5'; did you mean 'v5p'"),
        (["--compile"], "--compile needs --devices=N"),
    ],
)
def test_mistakes_in_planning(options, message, capsys):
    line = mistake(capsys, "describe", f"{FIRST_STAGE}:tiny", *options)
    assert re.search(literal(message), line)
