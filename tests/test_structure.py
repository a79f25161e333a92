# SPDX-License-Identifier: Apache-2.0
"""The structure of the code: no file is too long, private modules stay in their package, imports have no cycle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_llava_hr", "conversion", "training", "examples", "benchmarks")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def get_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def get_imports(file: Path) -> set[str]:
    """Modules of this project that a file imports at its top level."""
    names, package = set(), file.relative_to(ROOT).parent.parts
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], node.module] if node.level else [node.module]
            module = ".".join(filter(None, base))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names & {get_name(other) for other in FILES} - {get_name(file)}


@pytest.mark.parametrize("file", FILES, ids=get_name)
def test_files(file):
    assert len(file.read_text().splitlines()) <= 650
    for name in get_imports(file):
        private = any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        assert not private or name.split(".")[0] == get_name(file).split(".")[0], name


def test_imports_have_no_cycle():
    # a package's `__init__` imports its modules, which may import each other
    graph = {get_name(file): get_imports(file) - set(PACKAGES) for file in FILES if file.name != "__init__.py"}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError otherwise
