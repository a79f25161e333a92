# SPDX-License-Identifier: Apache-2.0
"""What the steps before would have made: a small FinePrint, and a language model after a few steps."""

from pathlib import Path

import pytest

from training.tiny.fineprint import FinePrintArguments, generate
from training.tiny.language_model import PretrainLanguageModelArguments, pretrain


@pytest.fixture(scope="session")
def fineprint(tmp_path_factory) -> Path:
    """Six test images of 256 pixels."""
    folder = tmp_path_factory.mktemp("fineprint") / "data"
    generate(FinePrintArguments(output=str(folder), num_train=0, num_validation=0, num_test=6, size=256, workers=1))
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory) -> tuple[Path, dict]:
    """A folder with model and tokenizer, and what training says of it."""
    folder = tmp_path_factory.mktemp("language-model")
    arguments = PretrainLanguageModelArguments(output=str(folder), steps=30, batch_size=4, size=128)
    return folder, pretrain(arguments)
