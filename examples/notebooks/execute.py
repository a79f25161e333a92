# SPDX-License-Identifier: Apache-2.0
"""
Runs the notebooks with the included tiny model and saves their outputs; `make notebooks` is

    python -m examples.notebooks.execute
"""

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


HERE = Path(__file__).parent


def execute(name: str, folder: Path, replace: dict[str, str] | None = None) -> nbformat.NotebookNode:
    """
    Runs every cell of a notebook in a new kernel. Where a Markdown cell shows settings for the tiny model, they take
    the place of the code cell above it.

    Args:
        name (`str`): The notebook, without suffix.
        folder (`Path`): Where the kernel runs. It gets links to the folders of the checkout.
        replace (`dict[str, str]`, *optional*): Parts of the settings to replace.

    Returns:
        `NotebookNode`: The notebook with its own settings and the outputs of this run: results, images and prints,
        but no progress bars and warnings.

    Raises:
        CellExecutionError: If a cell does.
    """
    for package in ("docs", "examples", "modeling_llava_hr", "training"):
        (folder / package).symlink_to(HERE.parents[1] / package)
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    sources = [cell.source for cell in notebook.cells]
    for cell, following in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code" and (settings := re.search(r"```python\n(.*)\n```", following.source, re.DOTALL)):
            cell.source = settings[1]
            for old, new in (replace or {}).items():
                if old not in cell.source:
                    raise ValueError(f"`replace` has {old!r}, which is not in the settings of {name}.ipynb.")
                cell.source = cell.source.replace(old, new)
    patience = {"timeout": 1800, "startup_timeout": 300, "iopub_timeout": 60}  # seconds, on a busy machine
    NotebookClient(notebook, kernel_name="python3", record_timing=False, **patience).execute(cwd=str(folder))
    for cell, source in zip(notebook.cells, sources, strict=True):
        cell.source = source
        if cell.cell_type == "code":
            outputs, cell.outputs = cell.outputs, []
            for output in outputs:
                if "image/jpeg" in output.get("data", {}):  # Pillow shows an image in both formats
                    del output.data["image/png"]
                if output.get("name") == "stdout" and cell.outputs and cell.outputs[-1].get("name") == "stdout":
                    cell.outputs[-1].text += output.text  # prints arrive in pieces, with warnings between them
                elif output.get("name") != "stderr":
                    cell.outputs.append(output)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    for file in sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(file.stem, Path(folder)), file)
