# SPDX-License-Identifier: Apache-2.0
"""The model that the examples are tried with."""

from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The trained tiny model that is shipped with the examples."""
    return ROOT / "examples" / "tiny-llava-hr"
