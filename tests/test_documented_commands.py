"""Every command in the documentation is one that works.

Blocks of shell are run by bash itself, where the programs only note how they were called. Each call
is then checked by what it would have reached: the parser, the config with its overrides, the
Makefile, the script. `describe` and what a newcomer runs first are run in earnest, in small.
"""

import functools
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_diffusion_jax.__main__ import VERBS
from latent_diffusion_jax.arguments import EXAMPLES, make_parser, split_config
from latent_diffusion_jax.config import load_config
from latent_diffusion_jax.errors import UserError
from tests.cli import ROOT, do

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
CONFIGS = sorted(ROOT.glob("configs/*/*.py"))
LAUNCH = [p.relative_to(ROOT).as_posix() for p in ROOT.glob("launch/**/*.*") if p.suffix != ".txt"]
NOTE = """#!/bin/bash
printf '%s\\0' "$0" "$@" $'\\x1e' >> "$CALLS"
"""
PACKAGE = ["-m", "latent_diffusion_jax"]
SAME = re.compile(r"(python -m latent_diffusion_jax) (\w+) \(the same arguments\)")


def sh_blocks(path):
    """The fenced blocks of shell in a page."""
    return re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def command_lines(text):
    """The lines of indented or plain text that begin with a command, and their continuations."""
    return "\n".join(re.findall(r"^ *python -m (?:.*\\\n)*.*$", text, re.MULTILINE))


def docstring_block(path):
    """The commands in a config's docstring, `(the same arguments)` written out."""
    lines = command_lines(inspect.cleandoc(path.read_text().split('"""')[1]).replace("\\\\", "\\"))
    found = SAME.search(lines)
    if not found:
        return lines
    before = lines[: found.start()]
    first = re.match(r"python -m latent_diffusion_jax \w+", before)
    return before + f"{found[1]} {found[2]}{before[first.end() :]}"


def calls(block, folder):
    """What bash calls when it runs the block: lists of words."""
    programs = folder / "programs"
    for name in ("python", "pip", "make", "sbatch", *LAUNCH):
        stub = (folder if "/" in name else programs) / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(NOTE)
        stub.chmod(0o755)
    noted = folder / "calls"
    done = subprocess.run(
        [shutil.which("bash"), "-euc", block],
        cwd=folder,
        env={"PATH": str(programs), "CALLS": str(noted)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = noted.read_text().split("\0")[:-1]
    parted = [list(g) for end, g in itertools.groupby(words, lambda w: w == "\x1e") if not end]
    return [[program.removeprefix(f"{programs}/"), *rest] for program, *rest in parted]


# What checks one call


def check(call, made):
    """Fails unless the program of a call would take it; `made`: workdirs and their configs."""
    program, *words = call
    if program == "python":
        _check_python(words, made)
    elif program == "make":
        subprocess.run(["make", "-n", "-C", ROOT, *words], check=True, capture_output=True)
    elif program == "pip":
        assert words[0] == "install"
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = set(re.findall(r"\w+", " ".join(re.findall(r"\[(.*)\]", words[-1]))))
        assert named <= extras["optional-dependencies"].keys()
    elif program == "sbatch":
        check([word for word in words if not word.startswith("--")], made)
    elif program in LAUNCH:
        at = words.index("python") if "python" in words else len(words)
        check_options(words[:at], (ROOT / program).read_text())
        if words[at:]:
            check(words[at:], made)
    else:
        raise AssertionError(f"a command that no test knows: {call}")


def check_options(words, text):
    """The options among `words` occur in the text of a script, those of argparse with quotes."""
    for name in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert name == "--" or re.search(rf"{name}\b", text), name


def _check_python(words, made):
    if words[:2] == PACKAGE:
        _check_verb(words[2:], made)
    elif words[0] == "-m":
        module = ROOT / f"{words[1].replace('.', '/')}.py"
        check_options(words[2:], module.read_text())
    else:  # of an exported folder
        assert Path(words[0]).name == "sample.py"
        check_options(words[1:], (ROOT / "latent_diffusion_jax" / "standalone.py").read_text())


def _check_verb(words, made):
    rest, spec, overrides = split_config([re.sub("=N$", "=2", word) for word in words])
    args = make_parser(VERBS).parse_args(rest)
    workdir, origin = getattr(args, "workdir", None), getattr(args, "origin", None)
    specs = [spec] if spec else of_checkpoint(origin) if origin else made.get(workdir, [])
    assert specs or not overrides, f"of which config are {overrides}?"
    failures = [failure for s in specs if (failure := _fails(s, overrides))]
    assert not specs or len(failures) < len(specs), failures
    if workdir and specs:
        made[workdir] = specs


def _fails(spec, overrides):
    try:
        load_config(spec, overrides)
    except UserError as error:
        return str(error)
    return None


@functools.cache
def of_checkpoint(path):
    """The configs of a published checkpoint's name; all of them where the name says nothing."""
    published = {
        str(file): load_config(str(file)).get("published", {}).get("checkpoint") for file in CONFIGS
    }
    named = [file for file, name in published.items() if Path(name or "").stem == Path(path).stem]
    return named or [file for file, name in published.items() if name]


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_shell(page, tmp_path):
    made = {}
    for i, block in enumerate(sh_blocks(page)):
        # variables of an earlier block hold in a later one
        found = calls("\n".join(sh_blocks(page)[: i + 1]), tmp_path / str(i))
        assert found, block
        for call in found:
            check(call, made)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_docstrings_of_configs(file, tmp_path):
    found = calls(docstring_block(file), tmp_path)
    for call in found:
        check(call, {})
    trained = [call for call in found if call[3] == "train"]
    assert trained, "no command that trains it"


@pytest.mark.parametrize("verb", EXAMPLES)
def test_examples_of_the_help(verb, tmp_path):
    found = calls(command_lines(EXAMPLES[verb]), tmp_path)
    assert {call[3] for call in found if call[1:3] == PACKAGE} == {verb}
    for call in found:
        check(call, {})


def test_what_make_runs(tmp_path):
    said = subprocess.check_output(["make", "-n", "demo"], cwd=ROOT, text=True)
    lines = re.findall(r"^launch/(?:.*\\\n)*.*$", said, re.MULTILINE)
    found = calls("\n".join(lines).replace(".venv/bin/python", "python"), tmp_path)
    assert [call[4] for call in found] == ["train", "encode", "train", "reconstruct", "sample"]
    made = {}
    for call in found:
        check(call, made)


# Commands inside sentences are parts of commands: their names must exist


@functools.cache
def known_options():
    """Of each verb, and of the scripts together (under "")."""
    help_of = make_parser(VERBS)._subparsers._group_actions[0].choices
    scripts = [ROOT / name for name in LAUNCH] + [*ROOT.glob("benchmarks/*.py")]
    scripts += [ROOT / "tests" / name for name in ("soak.py", "solvers.py", "parity.py")]
    text = "\n".join(script.read_text() for script in scripts)
    found = {verb: set(parser._option_string_actions) for verb, parser in help_of.items()}
    return {**found, "": set(re.findall(r"--[a-z_]+", text))}


@functools.cache
def known_keys():
    """Dotted keys of all configs."""
    return {key for file in CONFIGS for key in _keys(load_config(str(file)).to_dict())}


def _keys(section):
    for name, value in section.items():
        yield name
        if isinstance(value, dict):
            yield from (f"{name}.{key}" for key in _keys(value))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_sentences(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    anywhere = set.union(*known_options().values())
    for span in re.findall(r"`([^`]+)`", text):
        said = re.search(r"(?:^|latent_diffusion_jax )([a-z]+) --", span)
        verb = said[1] if said and said[1] in VERBS else None
        options = re.findall(r"(?<![\w-])--([a-z_]+)(\.[\w.]+)?", span)
        for name, key in options:
            if name == "config" and key:
                assert key[1:].rstrip(".") in known_keys(), span
            elif not span.startswith(("--xla", "pytest", "git ", "mkdocs", "jupyter")):
                assert f"--{name}" in (known_options()[verb] if verb else anywhere), span
        for target in re.findall(r"^make ([a-z]+)", span):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), span
        for place in re.findall(r"\blaunch/[\w./]+", span):
            assert (ROOT / place).exists(), span


NOTICED = (AssertionError, SystemExit, UserError, subprocess.CalledProcessError)


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m latent_diffusion_jax trian --config=configs/diffusion/shapes.py --workdir=r",
        "python -m latent_diffusion_jax train --config=configs/diffusion/shape.py --workdir=r",
        "python -m latent_diffusion_jax train --config=configs/diffusion/shapes.py:big --workdir=r",
        "python -m latent_diffusion_jax describe --config=configs/diffusion/shapes.py"
        " --config.optim.rl=1",
        "python -m latent_diffusion_jax sample --workdir=r --nubmer=4",
        "python -m latent_diffusion_jax sample --workdir=r --config.dtype=bfloat16",  # of which?
        "python -m latent_diffusion_jax sample --workdir=$nowhere",
        "python -m tests.soak --kill_all",
        "python shapes/sample.py --size=4",
        "launch/lokal.sh python -m latent_diffusion_jax bench",
        "launch/multiprocess.sh 2 --gpus=4 python -m latent_diffusion_jax bench",
        "make dmeo",
        "pip install -e '.[gup]'",
        "rm -rf runs",
    ],
)
def test_what_is_wrong_is_noticed(wrong, tmp_path):
    with pytest.raises(NOTICED):
        [check(call, {}) for call in calls(wrong, tmp_path)]


# In earnest


@pytest.mark.slow
def test_every_describe(tmp_path, capsys):
    blocks = [command_lines(EXAMPLES["describe"])]
    blocks += ["\n".join(sh_blocks(page)) for page in PAGES if "describe" in page.read_text()]
    for i, block in enumerate(filter(None, blocks)):
        for call in calls(block, tmp_path / str(i)):
            if "describe" in call:
                do(*call[call.index("describe") :])
                assert "parameters" in capsys.readouterr().out


ONE_DEVICE = "--config.mesh.data=1"
COUNT = re.compile(r"^--number=\d+$")


def small(call):
    """The words behind `python`, of the smallest variants, of a few images, on one device."""
    words = call[call.index("python") + 1 :]
    if words[:2] != PACKAGE:
        return words
    config = re.compile(r"^(--config=)(configs/[\w/]+\.py):?")
    given = (COUNT.sub("--number=4", re.sub("=N$", "=2", word)) for word in words)
    return [config.sub(rf"\1{ROOT}/\2:tiny,", word).removesuffix(",") for word in given] + [
        ONE_DEVICE
    ]


def rehearse(block, folder):
    """Runs what a block calls, in the current folder."""
    for call in calls(block, folder):
        if "python" not in call:  # pip
            continue
        words = small(call)
        if words[:2] == PACKAGE:
            do(*words[2:])
        else:
            subprocess.run([sys.executable, *words], check=True)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder to run in, with images of two classes in DIR."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 70, 90, 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        path = tmp_path / "DIR" / ["cat", "dog"][i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block_with(page, text):
    """The one block of shell of a page that has the text."""
    (block,) = [block for block in sh_blocks(ROOT / page) if text in block]
    return block


@pytest.mark.slow
def test_own_images_as_the_readme_says(elsewhere):
    rehearse(block_with("README.md", "runs/mine"), elsewhere / "calls")
    asked = json.loads((elsewhere / "runs/mine/ldm/samples/samples.json").read_text())
    assert asked["class"] == "cat,dog"
    assert asked["scale"] == 2


@pytest.mark.slow
def test_a_task_as_its_page_says(elsewhere):
    rehearse(block_with("docs/tasks.md", "task="), elsewhere / "calls")
    found = json.loads((elsewhere / "runs/shapes64/text/evaluation.json").read_text())
    assert found["protocol"]["number"] == 4


@pytest.mark.slow
def test_demo_and_export(elsewhere):
    said = subprocess.check_output(["make", "-n", "demo"], cwd=ROOT, text=True)
    lines = "\n".join(re.findall(r"^launch/(?:.*\\\n)*.*$", said, re.MULTILINE))
    rehearse(lines.replace(".venv/bin/python", "python"), elsewhere / "make")
    assert (elsewhere / "runs/shapes/ldm/samples/grid.png").exists()
    rehearse(block_with("docs/export.md", "export"), elsewhere / "export")
    assert len(list((elsewhere / "pictures").glob("*.png"))) == 4
