# SPDX-License-Identifier: Apache-2.0
"""Makes transformers' own test suites importable as `transformers_tests`."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest


# This folder: `fetch_hub_objects_for_ci`, which the suites import
sys.path.append(str(Path(__file__).parent))

from fetch_transformers_tests import release_root  # noqa: E402


RELEASE = release_root(version("transformers"))

if not RELEASE.exists():
    raise pytest.UsageError(
        f"{RELEASE} is missing, which holds the test suites of the installed transformers. Run `make suites`, or "
        "`python tests/common/fetch_transformers_tests.py` in the environment that runs the tests."
    )
sys.path.append(str(RELEASE))
