# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from the first cell to the last with the tiny model, and are saved with such outputs."""

import ast
import re

import nbformat
import pytest

from examples.notebooks.execute import HERE, execute


NAMES = sorted(file.stem for file in HERE.glob("*.ipynb"))
# What makes training short here; the outputs are saved from all 200 steps
SHORT = {"200, 40": "28, 4", "train_batch_size 8": "train_batch_size 4", "--max_steps 200": "--max_steps 40"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def get_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def get_texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What the cells print, and their results as text."""
    outputs = [output for cell in get_cells(notebook) for output in cell.outputs]
    return [output.text if output.output_type == "stream" else output.data["text/plain"] for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_saved_and_name_no_place_of_a_machine(name):
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = get_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and {output.output_type for output in outputs} <= {"stream", "execute_result", "display_data"}
    places = r"(?<![\w.])/(home|root|tmp|usr|opt|mnt|Users|work\w*)/|site-packages|\.venv"
    assert not re.search(places, nbformat.writes(notebook))


def test_quickstart_gives_what_is_saved(tmp_path):
    texts = get_texts(execute("quickstart", tmp_path))
    assert "['1471']" in texts and texts[-1].splitlines()[-1].endswith("triangle")
    assert texts == get_texts(nbformat.read(HERE / "quickstart.ipynb", as_version=4))


def test_finetune_qlora_learns_and_its_merged_model_answers(tmp_path):
    texts = get_texts(execute("finetune_qlora", tmp_path, SHORT))
    before, after, merged = (ast.literal_eval(text) for text in texts if text.startswith("{"))
    assert before["anls"] < after["anls"] == pytest.approx(merged["anls"], abs=0.1)
    assert not (tmp_path / "receipts" / "merged" / "adapter_config.json").exists()
    assert "table" in texts[-1]  # the merged model's JSON
