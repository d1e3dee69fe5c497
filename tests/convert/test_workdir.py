"""Published checkpoints in and out: every tensor bit for bit, and the mistakes on the way."""

import jax
import numpy as np
import pytest

from latent_diffusion_jax import build, pipeline
from latent_diffusion_jax.__main__ import main
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.convert import compvis, openclip
from latent_diffusion_jax.convert.files import open_tensors, write_tensors
from latent_diffusion_jax.convert.workdir import export, import_workdir, load_trained, open_source
from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.phases import prepare_frozen
from latent_diffusion_jax.train.sharding import make_mesh
from tests.cli import do
from tests.published import weights

LDM = "configs/diffusion/shapes.py:tiny"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh()


def published(spec, *, salt="", **changes):
    """The tensors of a file of the config's kind, weights by the formula, averages of their own."""
    config = load_config(spec)
    if config.phase == "diffusion":
        config.latents.scale = 0.5
    shapes = compvis.shapes(config)
    trees = (
        {name: weights(tree, salt=salt + name) for name, tree in part.items()} for part in shapes
    )
    params, ema, frozen = trees
    ema = {name: jax.tree.map(lambda x: x + 1, tree) for name, tree in ema.items()}
    made = compvis.named(compvis.Weights(params, ema, frozen), config)
    return {**{key: make() for key, make in made.items()}, **changes}


def read(path):
    return {key: tensor.read() for key, tensor in open_tensors(path).items()}


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert ours[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize(
    "spec",
    [
        "configs/first_stage/shapes.py:tiny",
        "configs/first_stage/vq_f4.py:tiny",
        LDM,
        "configs/diffusion/text256.py:tiny",
        "configs/diffusion/semantic256.py:tiny",
        "configs/diffusion/sd2.py:tiny",
    ],
)
def test_round_trip_is_bit_exact(spec, mesh, tmp_path):
    """In the file's order and types, with tensors that no network here has."""
    tensors = published(
        spec,
        **{"loss.perceptual": np.float32([1, 2]), "loss.num_batches_tracked": np.array(7)},
    )
    half = (k for k in tensors if k.startswith(("first_stage_model.", "decoder.")))
    tensors |= {key: tensors[key].astype(np.float16) for key in half}
    tensors = dict(sorted(tensors.items(), key=lambda item: hash(item[0])))
    write_tensors(tmp_path / "in.ckpt", tensors)
    work = str(tmp_path / "work")
    import_workdir(open_source(str(tmp_path / "in.ckpt"), spec, []), work, mesh)
    export(work, str(tmp_path / "out.safetensors"), mesh)
    assert_same(read(tmp_path / "out.safetensors"), tensors)


def test_a_first_stage_that_is_there_twice(mesh, tmp_path):
    """As in the published inpainting model, whose conditioner is its first stage."""
    spec = "configs/diffusion/inpainting_big.py:tiny"
    tensors = published(spec)
    tensors |= {
        key.replace("first_stage_model", "cond_stage_model"): value
        for key, value in tensors.items()
        if key.startswith("first_stage_model")
    }
    write_tensors(tmp_path / "in.ckpt", tensors)
    work = str(tmp_path / "work")
    import_workdir(open_source(str(tmp_path / "in.ckpt"), spec, []), work, mesh)
    assert not open_tensors(tmp_path / "work/original/extra.safetensors").keys() - {
        *compvis.BUFFERS,
        "model_ema.decay",
        "model_ema.num_updates",
    }
    export(work, str(tmp_path / "out.ckpt"), mesh)
    assert_same(read(tmp_path / "out.ckpt"), tensors)


@pytest.fixture(scope="module")
def ldm(tmp_path_factory):
    path = tmp_path_factory.mktemp("ldm") / "model.safetensors"
    tensors = published(LDM)
    write_tensors(path, tensors)
    return str(path), tensors


def leaf(trained):
    return np.asarray(trained.params["unet"]["time_embed.0"]["bias"])


def test_averages_by_default_and_raw_on_request(ldm, mesh):
    path, tensors = ldm
    source = open_source(path, LDM, [])
    raw = tensors["model.diffusion_model.time_embed.0.bias"]
    np.testing.assert_array_equal(leaf(load_trained(source, mesh)), raw + 1)
    np.testing.assert_array_equal(leaf(load_trained(source, mesh, raw=True)), raw)


def test_a_file_without_averages_is_sampled_as_it_is(ldm, mesh, tmp_path):
    _, tensors = ldm
    bare = {key: value for key, value in tensors.items() if not key.startswith("model_ema.")}
    write_tensors(tmp_path / "bare.ckpt", bare)
    trained = load_trained(open_source(str(tmp_path / "bare.ckpt"), LDM, []), mesh)
    np.testing.assert_array_equal(leaf(trained), bare["model.diffusion_model.time_embed.0.bias"])


def test_what_is_not_read_is_named(ldm, mesh, tmp_path, capsys):
    tensors = {**ldm[1], "loss.x": np.ones(2, np.float32)}
    write_tensors(tmp_path / "known.ckpt", tensors)
    load_trained(open_source(str(tmp_path / "known.ckpt"), LDM, []), mesh)
    assert "not read" not in capsys.readouterr().out
    write_tensors(tmp_path / "more.ckpt", {**tensors, "control.hint": np.ones((2, 3), np.float32)})
    load_trained(open_source(str(tmp_path / "more.ckpt"), LDM, []), mesh)
    assert "not read: 1 tensors, such as 'control.hint' [2, 3]" in capsys.readouterr().out


def test_the_files_own_scale_is_taken(ldm, mesh):
    source = open_source(ldm[0], LDM, [])
    assert source.config.latents.scale == 0.5
    assert float(load_trained(source, mesh).frozen["latent_scale"]) == 0.5


def test_imported_and_loaded_are_the_same(ldm, mesh, tmp_path):
    work = str(tmp_path / "work")
    source = open_source(ldm[0], LDM, [])
    import_workdir(source, work, mesh)
    ours, direct = pipeline.load(work, mesh), load_trained(source, mesh)
    jax.tree.map(
        np.testing.assert_array_equal,
        (ours.params, dict(ours.frozen)),
        (direct.params, dict(direct.frozen)),
    )
    with pytest.raises(UserError, match="holds checkpoints already"):
        import_workdir(source, work, mesh)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "lacks 1 of .*out.2.bias'"),
        (
            lambda t: t.update({"first_stage_model.encoder.conv_in.bias": np.zeros(3, np.float32)}),
            r"'first_stage_model.encoder.conv_in.bias' is \[3\] in the checkpoint",
        ),
        (
            lambda t: t.update({"cond_stage_model.embedding.weight": np.zeros((13, 128), int)}),
            "is int64 in the checkpoint, not floating point",
        ),
        (lambda t: t.update(betas=t["betas"] * 1.1), "1000 betas from 0.00165 to .*linear_start"),
        (
            lambda t: t.pop(next(k for k in t if k.startswith("model_ema.diff"))),
            "lacks 1 of .*'model_ema.diffusion",
        ),
        (lambda t: t.pop("scale_factor"), "no scale_factor: give --config.latents.scale"),
    ],
)
def test_what_does_not_fit_is_named(ldm, mesh, tmp_path, change, message):
    tensors = dict(ldm[1])
    change(tensors)
    path = tmp_path / "bad.safetensors"
    write_tensors(path, tensors)
    with pytest.raises(UserError, match=message) as error:
        load_trained(open_source(str(path), LDM, []), mesh)
    assert "\n" not in str(error.value)


def test_what_is_trained_here_goes_out_whole(mesh, tmp_path):
    """A workdir that came from no file gives all keys of a published one, and they load."""
    spec = LDM
    tensors = published(spec)
    write_tensors(tmp_path / "in.ckpt", tensors)
    work = tmp_path / "work"
    import_workdir(open_source(str(tmp_path / "in.ckpt"), spec, []), str(work), mesh)
    (work / "original" / "layout.json").unlink()  # as if it had been trained here
    export(str(work), str(tmp_path / "out.safetensors"), mesh, dtype="float16")
    ours = read(tmp_path / "out.safetensors")
    assert ours.keys() == tensors.keys()
    for key, value in tensors.items():
        if key == "model_ema.num_updates":
            continue
        wanted = value.astype(np.float16) if value.dtype == np.float32 else value
        np.testing.assert_array_equal(ours[key], wanted, err_msg=key)


def test_the_text_encoder_of_stable_diffusion_2_goes_out_as_it_came(mesh, tmp_path):
    """Under OpenCLIP's names, with the last block, which nothing reads."""
    spec = "configs/diffusion/sd2.py:tiny"
    tensors = published(spec)
    made = openclip.hf_to_openclip({key: lambda v=v: v for key, v in tensors.items()})
    tensors = {key: make() for key, make in made.items()}
    first = {k: v for k, v in tensors.items() if ".resblocks.0." in k}
    depth = 1 + max(int(k.split(".resblocks.")[1].split(".")[0]) for k in tensors if "resbl" in k)
    last = {k.replace(".resblocks.0.", f".resblocks.{depth}."): v + 1 for k, v in first.items()}
    tensors |= last | {"cond_stage_model.model.logit_scale": np.float32(4.6)}
    write_tensors(tmp_path / "in.safetensors", tensors)
    work = str(tmp_path / "work")
    import_workdir(open_source(str(tmp_path / "in.safetensors"), spec, []), work, mesh)
    export(work, str(tmp_path / "out.safetensors"), mesh)
    assert_same(read(tmp_path / "out.safetensors"), tensors)


def test_through_a_diffusers_folder(ldm, mesh, tmp_path):
    """Its model is no published one: the folder itself says what to build."""
    work, folder, again = (str(tmp_path / name) for name in ("work", "folder", "again"))
    import_workdir(open_source(ldm[0], LDM, []), work, mesh)
    export(work, folder, mesh)
    import_workdir(open_source(folder, None, []), again, mesh)
    before, after = (pipeline.load(place, mesh) for place in (work, again))
    assert after.config.data.image_size == before.config.data.image_size
    assert build.unet(after.config) == build.unet(before.config)
    jax.tree.map(
        np.testing.assert_array_equal,
        (before.params, dict(before.frozen)),
        (after.params, dict(after.frozen)),
    )


def test_frozen_weights_for_another_training(mesh, tmp_path):
    """Phase 2 takes its first stage and its text encoder from a converted workdir."""
    spec = "configs/diffusion/sd2.py:tiny"
    write_tensors(tmp_path / "in.ckpt", published(spec))
    work = str(tmp_path / "work")
    import_workdir(open_source(str(tmp_path / "in.ckpt"), spec, []), work, mesh)
    config = load_config(spec, [f"--config.run.first_stage={work}"])
    with pytest.raises(UserError, match="needs a trained conditioning: --config.run.conditioning="):
        prepare_frozen(config, str(tmp_path / "other"), mesh)
    config.run.conditioning = work
    frozen = prepare_frozen(config, str(tmp_path / "other"), mesh)
    there = pipeline.load(work, mesh).frozen
    for name in ("first_stage", "conditioning"):
        jax.tree.map(np.testing.assert_array_equal, frozen[name], there[name])


def test_the_command_line(ldm, tmp_path, capsys):
    """Brought in, sampled (also as the file it is), trained on and written out."""
    path, tensors = ldm
    work, out = tmp_path / "work", tmp_path / "tuned.ckpt"
    config = f"--config={LDM}"
    sampling = ["--number=2", "--batch=2", "--class=3,7"]
    do("convert", f"--from={path}", config, f"--workdir={work}")
    do("sample", f"--workdir={work}", *sampling, f"--out={tmp_path}/a")
    do("sample", f"--from={path}", config, *sampling, f"--out={tmp_path}/b")
    for name in ("000000.png", "000001.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert main(["convert", f"--from={path}", config, f"--workdir={work}"]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err

    # on other data, with another rate: only the networks are given
    do("train", f"--workdir={work}", "--config.data.source.seed=3", "--config.run.steps=2")
    do("train", f"--workdir={work}", "--config.run.steps=3")
    do("convert", f"--workdir={work}", f"--to={out}")
    tuned = read(out)
    assert list(tuned) == list(tensors)
    key = "model.diffusion_model.time_embed.0.bias"
    assert 0 < np.abs(tuned[key] - tensors[key]).max() < 0.1
    np.testing.assert_array_equal(tuned["betas"], tensors["betas"])


@pytest.mark.parametrize(
    "words,message",
    [
        (["convert", "--workdir=w"], "give one of --from=CHECKPOINT"),
        (["sample"], "give one of --workdir=DIR and --from=CHECKPOINT"),
        (["sample", "--from=nowhere.ckpt"], "'nowhere.ckpt' cannot be read"),
        (["convert", "--from=README.md", "--workdir=w"], "'README.md': is neither safetensors nor"),
        (["convert", "--from=tests", "--workdir=w"], "'tests'"),
        (["convert", "--workdir=nowhere", "--to=x.ckpt"], "no config.json in 'nowhere'"),
    ],
)
def test_mistakes_are_one_clear_line(words, message, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_target_of_another_kind_is_refused(ldm, mesh, tmp_path):
    work = str(tmp_path / "work")
    import_workdir(open_source(ldm[0], LDM, []), work, mesh)
    with pytest.raises(UserError, match=r"'.*out.npz': its suffix must be one of"):
        export(work, str(tmp_path / "out.npz"), mesh)
    with pytest.raises(UserError, match="unknown dtype 'float17'; did you mean"):
        export(work, str(tmp_path / "out.ckpt"), mesh, dtype="float17")
