"""Execute notebooks/*.py (jupytext scripts) and write them as .ipynb with their outputs.

Pillow gives Jupyter every picture twice; only the PNG is kept.
"""

from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def main() -> None:
    """Execute every notebook, one after another."""
    for script in sorted(NOTEBOOKS.glob("*.py")):
        notebook = jupytext.read(script)
        resources = {"metadata": {"path": str(NOTEBOOKS)}}
        NotebookClient(notebook, timeout=1800, resources=resources).execute()
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output["data"].pop("image/jpeg", None)
            cell.get("metadata", {}).pop("execution", None)  # times of day
        nbformat.write(notebook, script.with_suffix(".ipynb"))
        print(f"wrote {script.with_suffix('.ipynb').relative_to(NOTEBOOKS.parent)}")


if __name__ == "__main__":
    main()
