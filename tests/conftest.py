# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: no network, one thread, the same random numbers."""

import os
import sys
from pathlib import Path

import pytest


# Before the first import of a library that reads them. Two pytest workers with more threads each would wait for each
# other on two cores.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Modules for several folders; those listed have fixtures
sys.path.append(str(Path(__file__).parent / "support"))
pytest_plugins = ["loopback_hub", "forked_commands", "converted_checkpoints"]


@pytest.fixture(autouse=True)
def fixed_seed():
    """Seeds Python, NumPy and torch before each test, so that a failure can be repeated."""
    from transformers import set_seed

    set_seed(0)
