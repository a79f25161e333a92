# SPDX-License-Identifier: Apache-2.0
"""The documentation: links lead somewhere, commands and classes that it names exist, the image can be drawn."""

import importlib.util
import re

import pytest
from converted_checkpoints import ROOT

from modeling_llava_hr import image_processing_llava_hr, modeling_llava_hr, modeling_llava_hr_vision


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
INDEX = (ROOT / "docs" / "README.md").read_text()


def test_the_index_names_every_document():
    assert {file.name for file in (ROOT / "docs").glob("*.md") if f"]({file.name})" not in INDEX} == {"README.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE) if heading else []
        anchors = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]
        assert not heading or heading in anchors, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_and_recipes_exist(document):
    text = document.read_text()
    for module in re.findall(r"-m ((?:examples|training|conversion|modeling_llava_hr|benchmarks)\.[a-z]\w+)", text):
        assert importlib.util.find_spec(module), module
    for recipe in re.findall(r"training/(?:configs|accelerate)/\w+\.yaml", text):
        assert (ROOT / recipe).exists(), recipe


def test_classes_of_the_architecture_exist():
    names = set(re.findall(r"\bLlavaHr\w+", (ROOT / "docs" / "architecture.md").read_text()))
    known = {
        *vars(modeling_llava_hr),
        *vars(modeling_llava_hr_vision),
        *vars(image_processing_llava_hr),
        "LlavaHrImageProcessorPil",
    }
    assert len(names) > 10 and names <= known
