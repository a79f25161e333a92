# SPDX-License-Identifier: Apache-2.0
"""Generated data, and a place for the tables that training makes of it."""

from pathlib import Path

import pytest
from small_training import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "generated")


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """Tables that training writes beside its data sets; nothing is left in the user's cache."""
    folder = str(tmp_path_factory.mktemp("datasets_cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", folder)  # of commands
        yield
