"""Config files, overrides of every type, and what is stored in a workdir."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from latent_diffusion_jax import build
from latent_diffusion_jax.config import load_config, override, stored_config, to_json
from latent_diffusion_jax.errors import UserError

ROOT = Path(__file__).parent.parent
DIFFUSION = str(ROOT / "configs/diffusion/shapes.py")


def value(config, key):
    for name in key.split("."):
        config = config[name]
    return config


OVERRIDES = [
    ("optim.lr", "3e-4", 3e-4),
    ("optim.lr", "1", 1.0),
    ("unet.num_heads", "8", 8),
    ("data.flip", "true", True),
    ("unet.channel_mult", "(1, 2, 3)", (1, 2, 3)),
    ("unet.channel_mult", "1,2", (1, 2)),
    ("train.ema_networks", "()", ()),
    ("train.ema_networks", "('unet', 'conditioning')", ("unet", "conditioning")),
    ("run.first_stage", "runs/my ae=1", "runs/my ae=1"),
    ("latents.scale", "0.18215", 0.18215),  # None in the file
    ("sample.options.eta", "1", 1.0),
    ("seed", "-1", -1),
]


@pytest.fixture(params=["file", "workdir"])
def config(request, tmp_path):
    """A config as its file gives it, and as a workdir keeps it."""
    config = load_config(DIFFUSION)
    if request.param == "file":
        return config
    (tmp_path / "config.json").write_text(to_json(config))
    return stored_config(str(tmp_path))


@pytest.mark.parametrize("key,text,expected", OVERRIDES)
def test_overrides_are_read_as_the_key_s_type(config, key, text, expected):
    changed = value(override(config, [f"--config.{key}={text}"]), key)
    assert changed == expected
    assert type(changed) is type(expected)


def test_overrides_change_nothing_else_and_the_last_one_wins():
    plain = load_config(DIFFUSION)
    changed = load_config(DIFFUSION, ["--config.optim.lr=1", "--config.optim.lr=2"])
    assert changed.optim.lr == 2
    changed.optim.lr = plain.optim.lr
    assert changed == plain
    assert load_config(DIFFUSION) == plain


@pytest.mark.parametrize(
    "text,message",
    [
        ("--config.unett.num_heads=3", "section in config: 'unett'; did you mean 'unet'?.*optim"),
        ("--config.unet.num_head=3", "config.unet: 'num_head'; did you mean 'num_heads'?"),
        ("--config.optm=3", "key in config: 'optm'; did you mean 'optim'?"),
        ("--config.seed.x=3", "config.seed is a value, not a section"),
        ("--config.unet.num_heads=2.5", "config.unet.num_heads=2.5"),
        ("--config.optim.lr=fast", "config.optim.lr=fast"),
        ("--config.data.flip=2", "config.data.flip=2"),
        ("--config.latents.scale=big", "config.latents.scale=big"),
        ("--config.unet=3", "config.unet=3"),
        ("--config.unet.num_heads", "has no value; write --config.key=value"),
    ],
)
def test_bad_overrides_are_one_clear_line(config, text, message):
    with pytest.raises(UserError, match=message) as error:
        override(config, [text])
    assert "\n" not in str(error.value)


def test_missing_files_and_arguments_list_what_there_is(tmp_path):
    with pytest.raises(UserError, match="no config file .*shape.py'; .*diffusion has .*shapes.py"):
        load_config(str(ROOT / "configs/diffusion/shape.py"))
    with pytest.raises(UserError, match="no config file 'nowhere/shapes.py'$"):
        load_config("nowhere/shapes.py")
    with pytest.raises(UserError, match="'tinny'; did you mean 'tiny'. one of pixels"):
        load_config(f"{DIFFUSION}:tinny")
    (tmp_path / "empty.py").touch()
    with pytest.raises(UserError, match="empty.py' defines no get_config"):
        load_config(str(tmp_path / "empty.py"))


def test_files_load_from_any_directory(tmp_path):
    """Their shared pieces too, with nothing but the package on the path."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from latent_diffusion_jax.config import load_config
sys.path.remove({str(ROOT)!r})
print(load_config({DIFFUSION!r}).phase, load_config({DIFFUSION!r} + ":tiny").run.steps)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.stdout.split() == ["diffusion", "4"], run.stderr


def test_a_workdir_s_config_builds_the_same_objective(tmp_path):
    programs = []
    small = ["--config.latents.source=cache", "--config.unet.channel_mult=1"]
    config = load_config(f"{DIFFUSION}:tiny", small)
    (tmp_path / "config.json").write_text(to_json(config))
    stored = stored_config(str(tmp_path))
    assert to_json(stored) == to_json(config)
    for each in (config, stored):
        objective, key = build.objective(each), jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(objective.init, key)
        frozen = {"first_stage": {}, "latent_scale": jax.ShapeDtypeStruct((), "float32")}
        batch = {
            "moments": jax.ShapeDtypeStruct((8, 8, 8, 8), "float32"),
            "label": jax.ShapeDtypeStruct((8,), "int32"),
        }
        programs.append(jax.jit(objective.train_step).lower(state, frozen, batch, key).as_text())
    assert programs[0] == programs[1]


def test_workdirs_without_a_readable_config(tmp_path):
    with pytest.raises(UserError, match="no config.json .*train there first"):
        stored_config(str(tmp_path))
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match="not readable as JSON"):
        stored_config(str(tmp_path))
