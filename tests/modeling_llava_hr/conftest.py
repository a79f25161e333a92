# SPDX-License-Identifier: Apache-2.0
"""The tiny model of `tests/support/tiny_configs.py`, for tests that take it as a fixture."""

from types import SimpleNamespace

import pytest
from tiny_configs import IMAGE_TOKEN_ID, TOKENS, make_config, make_inputs, make_model, take_sample


@pytest.fixture
def mini():
    return SimpleNamespace(
        config=make_config,
        model=make_model,
        inputs=make_inputs,
        sample=take_sample,
        image_token_id=IMAGE_TOKEN_ID,
        num_tokens=TOKENS,
    )
