import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from latent_diffusion_jax.errors import UserError
from latent_diffusion_jax.train.checkpoint import Checkpointer, check_config, write_config
from latent_diffusion_jax.train.sharding import abstract_state, init_sharded, make_mesh
from latent_diffusion_jax.train.state import TrainState
from tests.train.toy import assert_same_bits

META = {"latent_scale": 0.1 + 0.2, "data": {"index": 7}}


def init(key, rows=256):
    weight = jax.random.normal(key, (rows, 264))
    return TrainState(
        step=jnp.int32(0),
        params={"unet": {"weight": weight, "bias": weight[0, :3].astype(jnp.bfloat16)}},
        opt_state=({"mu": weight * 2}, jnp.int32(3)),
        ema={"unet": {"weight": weight / 3, "bias": jnp.zeros((3,))}},
    )


def state(seed, mesh=None):
    return init_sharded(init, jax.random.key(seed), mesh or make_mesh(data=1))


def abstract(mesh=None, init=init):
    return abstract_state(init, jax.random.key(0), mesh or make_mesh(data=1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 4 and 8; not to be changed."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(str(workdir))
    for step in (4, 8):
        checkpointer.save(step, state(step), {**META, "step": step})
    checkpointer.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "work")


def restore(workdir, method="restore_latest", target=None, **options):
    checkpointer = Checkpointer(str(workdir), **options)
    try:
        return getattr(checkpointer, method)(target or abstract())
    finally:
        checkpointer.close()


def test_what_is_restored_is_what_was_saved(saved):
    step, found, meta = restore(saved, read_only=True)
    assert step == 8
    assert meta == {**META, "step": 8}
    assert_same_bits(found, state(8))


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}])
def test_restored_on_another_mesh(saved, axes):
    target = abstract(make_mesh(**axes))
    _, found, _ = restore(saved, target=target, read_only=True)
    assert_same_bits(found, state(8))
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, target)


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None
    with pytest.raises(UserError, match="no checkpoints in"):
        restore(tmp_path / "absent", read_only=True)


def test_the_last_are_kept(workdir):
    checkpointer = Checkpointer(str(workdir), keep=2)
    for step in (9, 10):
        checkpointer.save(step, state(step), META)
    assert checkpointer.last_good_step == 10
    checkpointer.save(10, state(99), META)  # there already: not written again
    checkpointer.close()
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "9"]
    assert_same_bits(restore(workdir)[1], state(10))


def test_sampling_reads_no_optimizer_state(workdir):
    shutil.rmtree(workdir / "checkpoints" / "8" / "optimizer")
    step, found, meta = restore(workdir, "restore_params", read_only=True)
    expected = state(8)
    assert (step, found.opt_state, meta["step"]) == (8, (), 8)
    assert_same_bits((found.params, found.ema), (expected.params, expected.ema))


def test_networks_without_average_or_optimizer(tmp_path):
    bare = state(1).replace(opt_state=(), ema={})
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(0, bare, {})
    checkpointer.close()
    found = restore(tmp_path, "restore_params", target=abstract().replace(ema={}))
    assert_same_bits(found[1].params, bare.params)


def flip(path):
    data = bytearray(path.read_bytes())
    data[int(len(data) * 0.6)] ^= 0x10
    path.write_bytes(bytes(data))


def flip_first(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 0x01
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FAULTS = {
    "flip": flip,
    "flip_first": flip_first,
    "truncate": truncate,
    "delete": lambda p: p.unlink(),
}


# TensorStore's threads may still call back into a read that has failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_to_any_file_is_never_silently_wrong(saved, tmp_path, fault, capfd):
    step_8 = saved / "checkpoints" / "8"
    files = [p.relative_to(saved) for p in sorted(step_8.rglob("*")) if p.is_file()]
    expected = {step: state(step) for step in (4, 8)}
    used = []
    for i, file in enumerate(files):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        FAULTS[fault](workdir / file)
        step, found, meta = restore(workdir)
        used.append(step)
        said = capfd.readouterr().out
        assert meta["step"] == step
        assert_same_bits(found, expected[step])
        if step == 4:
            assert said.startswith("checkpoint step 8 is broken (")
            assert said.count("\n") == 1
            assert (workdir / "corrupt" / "8").is_dir()
            moved = [p.relative_to(workdir / "corrupt" / "8").name
                     for p in (workdir / "corrupt" / "8").rglob("*") if p.is_file()]  # fmt: skip
            assert len(moved) == len(files) - (fault == "delete")
        shutil.rmtree(workdir)
    assert 4 in used


def test_flipped_bits_of_stored_values_are_noticed(workdir, capfd):
    # Orbax restores these as they are: nothing but our checksum stands in the way.
    import orbax.checkpoint as ocp

    old = workdir / "checkpoints" / "8"
    items = {"params": state(8).params, "ema": state(8).ema}
    items["params"]["unet"]["weight"] = items["params"]["unet"]["weight"].at[5, 7].multiply(-1)
    shutil.rmtree(old / "weights")
    with ocp.StandardCheckpointer() as writer:
        writer.save(old / "weights", items)
    step, found, _ = restore(workdir)
    assert step == 4
    assert_same_bits(found, state(4))
    assert "weights['params']['unet']['weight'] does not match" in capfd.readouterr().out


def test_every_step_broken(workdir):
    for step in ("4", "8"):
        flip(workdir / "checkpoints" / step / "meta" / "metadata")
    with pytest.raises(UserError, match="every step is broken"):
        restore(workdir)
    assert sorted(p.name for p in (workdir / "corrupt").iterdir()) == ["4", "8"]


def test_a_second_broken_step_does_not_replace_the_first(workdir):
    (workdir / "corrupt" / "8").mkdir(parents=True)
    flip(workdir / "checkpoints" / "8" / "meta" / "metadata")
    restore(workdir)
    assert sorted(p.name for p in (workdir / "corrupt").iterdir()) == ["8", "8.1"]


def test_read_only_changes_nothing(workdir, capfd):
    flip(workdir / "checkpoints" / "8" / "meta" / "metadata")
    unfinished = workdir / "checkpoints" / "12.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    assert restore(workdir, "restore_params", read_only=True)[0] == 4
    assert "step 8 is broken" in capfd.readouterr().out
    assert (workdir / "checkpoints" / "8").exists()
    assert unfinished.exists()
    assert not (workdir / "corrupt").exists()


def test_another_model_is_refused_and_not_called_broken(workdir):
    def wider(key):
        return init(key, rows=300)

    with pytest.raises(UserError, match=r"weight.*float32\[256, 264\] there, float32\[300, 264\]"):
        restore(workdir, target=abstract(init=wider))
    without = abstract()
    with pytest.raises(UserError, match=r"ema.*absent here"):
        restore(workdir, target=without.replace(ema={}))
    assert not (workdir / "corrupt").exists()


def test_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write.*file") as error:
        Checkpointer(str(tmp_path / "file"))
    assert "\n" not in str(error.value)


CONFIG = {"optim": {"lr": 1e-3, "schedule": {"name": "constant"}}, "run": {"steps": 10}}


def test_another_config_is_refused_with_the_difference(tmp_path):
    write_config(str(tmp_path / "new"), json.dumps(CONFIG))
    other = {"optim": {"lr": 1e-4, "schedule": {"name": "constant"}, "b1": 0.9}, "run": {}}
    for function in (check_config, write_config):
        with pytest.raises(UserError) as error:
            function(str(tmp_path / "new"), json.dumps(other))
        assert "optim.lr: 0.0001 here, 0.001 in the workdir" in str(error.value)
        assert "optim.b1: 0.9 here, absent in the workdir" in str(error.value)
        assert "run" not in str(error.value).replace(str(tmp_path), "")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == CONFIG


def test_section_run_and_recomputation_may_change(tmp_path):
    longer = {**CONFIG, "run": {"steps": 20, "keep": 1}, "unet": {"remat": "1:full"}}
    write_config(str(tmp_path), json.dumps({**CONFIG, "unet": {"remat": "none"}}))
    write_config(str(tmp_path), json.dumps(longer))
    assert json.loads((tmp_path / "config.json").read_text()) == longer


def test_unreadable_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"optim": ')
    with pytest.raises(UserError, match="config.json is not readable"):
        check_config(str(tmp_path), json.dumps(CONFIG))
