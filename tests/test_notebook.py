"""The notebook in the documentation runs without errors."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs/notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """With fewer tokens than it names."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "train_tokens=20000" in first.source
    fewer = '"train.train_tokens=4096", "data.validation_tokens=2048"'
    first.source = first.source.replace('"train.train_tokens=20000"', fewer)
    first.source = first.source.replace("every_tokens=5000", "every_tokens=2048")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, resources=resources).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    shown = [output.data for output in outputs[0] if "data" in output]
    assert any("application/vnd.plotly.v1+json" in data for data in shown)
    progress = "".join(output.get("text", "") + str(output.get("data", "")) for output in outputs[0])
    assert progress.count("gap closed") >= 2  # while the runs train
    texts = "".join(output.get("text", "") for output in outputs[3])
    assert texts.count("def read(path):") == 4
    assert len(list((tmp_path / "outputs/notebook").glob("*/summary.json"))) == 2
