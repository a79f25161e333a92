# SPDX-License-Identifier: Apache-2.0
"""A recorded checkpoint of stage 1, converted, as miniature; generated data; training in this process."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from packaging.version import Version
from small_training import OPTIONS, VIEWS, chat, get_losses, make_data

from conversion.convert_llava_hr_weights_to_hf import convert


# TRL learns the answers in chats about images alone with transformers 5.18 and later
if Version(transformers.__version__) < Version("5.18"):
    collect_ignore = ["test_data.py", "test_train.py", "test_trainer.py"]

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"


def train(stage: str, model: Path, data: Path, output_dir: Path, *options: str):
    """Runs a stage in this process; `options`, in the command line's form, win over those for tests."""
    from training.train import main, make_parser

    paths = ("--model_name_or_path", str(model), "--data_path", str(data), "--output_dir", str(output_dir))
    return main(*make_parser().parse_args_and_config(["--stage", stage, *paths, *OPTIONS, *options]))


@pytest.fixture(scope="session")
def miniature(tmp_path_factory) -> Path:
    """An untrained model without adapters; random weights, the recorded tokenizer."""
    folder = tmp_path_factory.mktemp("miniature")
    checkpoint = shutil.copytree(REFERENCE / "stage1-384" / "checkpoint", folder / "checkpoint")
    convert(str(checkpoint), str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "generated")


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """Tables that training writes beside its data sets; nothing is left in the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets_cache"))
    yield datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="session")
def mini() -> SimpleNamespace:
    """The functions of this file: test modules here are not importable from each other."""
    return SimpleNamespace(
        train=train,
        chat=chat,
        losses=get_losses,
        options=OPTIONS,
        views=VIEWS,
        reference=REFERENCE,
        make_data=make_data,
    )
