"""The notebooks run from top to bottom in small, and what is saved in them is fit to be seen."""

import re

import pytest

from tests.cli import ROOT

nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[dev]'")

NOTEBOOKS = ("quickstart", "evaluate", "import_export", "own_images", "tasks")
FIRST = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4).cells[1].source


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The first three share a model: what one has trained the next finds, or trains."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize(
    "name", ["quickstart", *(pytest.param(n, marks=pytest.mark.slow) for n in NOTEBOOKS[1:])]
)
def test_runs_from_top_to_bottom(name, runs, monkeypatch):
    client = pytest.importorskip("nbclient", reason="pip install -e '.[dev]'")
    monkeypatch.setenv("SMALL", "1")
    monkeypatch.setenv("RUNS", str(runs))
    monkeypatch.setenv("XLA_FLAGS", "")
    book = read(name)
    folder = {"metadata": {"path": str(ROOT / "notebooks")}}
    client.NotebookClient(book, timeout=600, resources=folder).execute()


def test_all_are_tested():
    assert {path.stem for path in ROOT.glob("notebooks/*.ipynb")} == set(NOTEBOOKS)
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert all(f"`{name}.ipynb`" in page for name in NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_saved(name):
    book = read(name)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert cells[0].source == FIRST  # one way to start, in all of them
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "Device(id=0)" in text
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/|Traceback|Warning", text)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 500_000
