"""The notebook runs from its first cell to its last, and its committed outputs are of this code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def shown(cell):
    """Return what a reader sees of a cell's outputs: kinds of data, and the header of each table.

    Texts and numbers differ between processors; progress and warnings are left out.
    """
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "text/html" in data or "image/png" in data:
            header, _, _ = data.get("text/html", "").partition("</thead>")
            found.append((sorted(data), re.findall(r"<th>(.*?)</th>", header)))
        elif output.get("name") == "stdout" and found[-1:] != ["printed"]:
            found.append("printed")
    return found


@pytest.mark.real_models
def test_the_notebook_runs_and_shows_what_its_outputs_say(tmp_path, all_threads, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # processes that fight for the cores are many times slower
    committed, notebook = (nbformat.read(NOTEBOOK, 4) for _ in range(2))
    for cell in notebook.cells:
        cell.source = cell.source.replace("results/quickstart", str(tmp_path / "out"))
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    for before, now in zip(committed.cells, notebook.cells, strict=True):
        assert shown(before) == shown(now), before.source
    text = "\n".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "\npersonas: " in text  # the last line of the verdicts
    assert (tmp_path / "out" / "report.html").is_file()
