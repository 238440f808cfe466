"""The notebook of the examples: it runs, it is small, and its outputs are kept."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest

from tests.optional import optional

nbclient, nbformat = optional("nbclient"), optional("nbformat")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "explain.ipynb"


def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def run(found: Any, folder: Path) -> Any:
    """The notebook after every cell has run; in the folder, with the examples on the path as beside them."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(NOTEBOOK.parent)])}
    client = nbclient.NotebookClient(found, timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute(env=environment)


def shortened(found: Any) -> Any:
    """The notebook with two fifths of its training, after which it shows the same."""
    for cell in found.cells:
        cell.source = cell.source.replace("100 * 32", "40 * 32")
    assert found != notebook()
    return found


def outputs(found: Any) -> list[Any]:
    return [output for cell in found.cells for output in cell.get("outputs", [])]


def kinds(cell: Any) -> list[list[str]]:
    """What each output of a cell can be shown as."""
    return [sorted(output.get("data", ["text"])) for output in cell.get("outputs", [])]


def text_of(found: Any) -> str:
    return "".join(output["text"] for output in outputs(found) if output.output_type == "stream")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_every_cell_runs_and_shows_what_it_showed(tmp_path: Path) -> None:
    kept, found = notebook(), run(shortened(notebook()), tmp_path)
    for before, after in zip(kept.cells, found.cells, strict=True):
        assert kinds(before) == kinds(after), before.source
    for each in (kept, found):
        assert "The model changed where it looks" in text_of(each)
        assert "square" in text_of(each)
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cell_that_fails_is_seen(tmp_path: Path) -> None:
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import shapes\n1 / 0")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        run(broken, tmp_path)


def test_its_outputs_are_kept_and_small() -> None:
    found = notebook()
    assert NOTEBOOK.stat().st_size < 1_000_000
    pictures = [output.data["image/jpeg"] for output in outputs(found) if "image/jpeg" in output.get("data", {})]
    assert len(pictures) == 6
    assert all(len(base64.b64decode(picture)) < 300_000 for picture in pictures)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs(found))
    assert [cell.execution_count for cell in found.cells if cell.cell_type == "code"] == list(range(1, 11))
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not [place for place in ("/home/", "/tmp/", "/root/", "/work/", "site-packages") if place in text]


def test_its_cells_are_short() -> None:
    lines = {cell.source: len(cell.source.splitlines()) for cell in notebook().cells}
    assert max(lines.values()) <= 22
