# SPDX-License-Identifier: Apache-2.0
"""How the project is packaged: dependency bounds that `make test-oldest` can install, versions, audit, documents."""

import configparser
import importlib.util
import re
from importlib.metadata import version

import pytest
from converted_checkpoints import ROOT
from packaging.requirements import Requirement


SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# What `make test` installs. `dev` and `evaluation` are tools of their own environments, with bounds in the same form
LISTS = {"install": SETUP["options"]["install_requires"], **SETUP["options.extras_require"]}


def requirements(name: str) -> list[str]:
    return [line for line in LISTS[name].splitlines() if line and not line.startswith("modeling-llava-hr[")]


@pytest.mark.parametrize("name", LISTS)
def test_every_dependency_has_one_bound(name):
    """The Makefile turns `name>=version` into `name==version`; another form would escape `make test-oldest`."""
    for requirement in requirements(name):
        # without a lower bound: a version that a dependency should have excluded itself
        assert re.fullmatch(r"[A-Za-z0-9_-]+(>=\d+\.\d+\.\d+|<\d+)", requirement), requirement


def test_no_dependency_is_bounded_twice():
    names = [line.split(">=")[0].lower() for name in LISTS for line in requirements(name) if ">=" in line]
    assert len(names) == len(set(names))


def test_installed_versions_are_within_the_bounds():
    for requirement in (Requirement(line) for name in ("install", "test") for line in requirements(name)):
        installed = version(requirement.name)
        assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}: {installed}"


def test_version_is_semantic_and_in_the_changelog():
    number = SETUP["metadata"]["version"]
    assert re.fullmatch(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?", number)
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    # changes are under "Unreleased" until the release
    assert headings[0] in ("Unreleased", number)


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FINE = {"name": "numpy", "version": "2.1.0", "vulns": []}
FLAWED = {"name": "pillow", "version": "11.3.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["11.3.1"]}]}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("dependencies", "message", "is_clean", "expected"),
    [
        ([FINE], "", True, "1 packages looked up, no known vulnerabilities"),
        ([FINE, UNKNOWN], "", True, "not looked up: torch"),
        ([FINE, FLAWED], "", False, "pillow 11.3.0: PYSEC-1, fixed in 11.3.1"),
        ([FLAWED, UNKNOWN], "", False, "1 packages looked up, 1 known vulnerabilities"),
        ([UNKNOWN], "", None, "NOT AUDITED.*knows none of 1"),
        ([], "Traceback\nConnectionError: no way", None, "NOT AUDITED.*ConnectionError: no way"),
    ],
)
def test_audit_does_not_call_clean_what_it_could_not_look_up(audit, dependencies, message, is_clean, expected):
    text, result = audit.report(dependencies, message)
    assert result is is_clean
    assert re.search(expected, text)
