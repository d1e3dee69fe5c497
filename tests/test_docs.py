"""The site builds without a warning: pages, links, anchors."""

import os
import subprocess
import sys

import pytest

from tests.cli import ROOT

pytest.importorskip("material", reason="mkdocs-material: pip install -e '.[docs]'")


def build(config, site):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"-f{config}", f"-d{site}"],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_builds_without_warnings(tmp_path):
    done = build(ROOT / "mkdocs.yml", tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in ROOT.glob("docs/*.md")} - {"index"}
    assert pages <= {path.parent.name for path in tmp_path.glob("*/index.html")}
    assert "mkdocs" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[there](nowhere.md)", "nowhere.md"),
        ("[there](tasks.md#nowhere)", "#nowhere"),
        ("![picture](nowhere.png)", "nowhere.png"),
    ],
)
def test_a_broken_link_is_an_error(tmp_path, line, said):
    settings = (ROOT / "mkdocs.yml").read_text().partition("nav:\n")[0]
    (tmp_path / "mkdocs.yml").write_text(settings.replace("material", "mkdocs"))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "tasks.md").write_text("# Tasks\n")
    (docs / "index.md").write_text(f"# Here\n\n{line}\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert said in done.stderr
