"""Every notebook runs from top to bottom, with tiny settings, and matches its script."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == [
        "01_text_to_image",
        "02_int8_attention",
        "03_sparse_linear_attention",
        "04_hybrid_stitch",
        "05_residual_context_diffusion",
        "06_pretraining",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_script_have_the_same_cells(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    assert cells == [cell.source for cell in jupytext.read(path.with_suffix(".py")).cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAXGEN_TINY_NOTEBOOKS", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(ROOT)}}).execute()
