"""The notebook runs from its first cell to its last, and its outputs are what a reader is to see."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.real_models
def test_the_notebook_runs(tmp_path, all_threads, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # processes that fight for the cores are many times slower
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("results/quickstart", str(tmp_path / "out"))
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}).get("text/plain", output.get("text", "")) for output in outputs]
    text = "\n".join(shown)
    assert "PersonaVector(576 dimensions" in text
    assert "tensor(" not in text
    assert "generating:" in text
    assert "\npersonas: " in text  # the last line of the verdicts
    assert (tmp_path / "out" / "report.html").is_file()
    assert len([output for output in shown if "perplexity_ratio" in output]) == 1
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
