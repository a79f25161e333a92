# SPDX-License-Identifier: Apache-2.0
"""The recorded checkpoints of the released code, converted once per session: the fixture `converted`."""

from pathlib import Path

import pytest


REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
STAGES = ("stage1-384", "stage2-1024")


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Folders by stage. Read-only: a test that changes one copies it first."""
    from conversion.convert_llava_hr_weights_to_hf import convert

    folders = {stage: tmp_path_factory.mktemp("converted") / stage for stage in STAGES}
    for stage, folder in folders.items():
        convert(str(REFERENCE / stage / "checkpoint"), str(folder))
    return folders
