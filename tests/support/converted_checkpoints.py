# SPDX-License-Identifier: Apache-2.0
"""The recorded checkpoints of the released code: converted once per session, or written again with changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
STAGES = ("stage1-384", "stage2-1024")
FORMS = ("bin_shards", "bin", "safetensors_shards", "safetensors")


def read_original(stage: str) -> dict[str, torch.Tensor]:
    """All tensors of a recorded checkpoint by their original names."""
    files = sorted((REFERENCE / stage / "checkpoint").glob("pytorch_model-*.bin"))
    return {name: tensor for file in files for name, tensor in torch.load(file, weights_only=True).items()}


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> dict[str, Path]:
    """Folders by stage. Read-only: a test that changes one copies it first."""
    from conversion.convert_llava_hr_weights_to_hf import convert

    folders = {stage: tmp_path_factory.mktemp("converted") / stage for stage in STAGES}
    for stage, folder in folders.items():
        convert(str(REFERENCE / stage / "checkpoint"), str(folder))
    return folders


@pytest.fixture
def write_original(tmp_path) -> Callable:
    """
    Writes a recorded checkpoint again, changed: `write_original(stage, form, tensors, **config)`. Values of `config`
    replace those of config.json, `None` removes one; `legacy` is the tokenizer's.
    """

    def write(stage="stage2-1024", form="bin", tensors=None, legacy=False, **config) -> Path:
        folder = tmp_path / "original"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            REFERENCE / stage / "checkpoint",
            folder,
            ignore=shutil.ignore_patterns("pytorch_model*", "mm_projector.bin"),
        )
        _update(folder / "config.json", config)
        _update(folder / "tokenizer_config.json", {"legacy": legacy})
        tensors = read_original(stage) if tensors is None else tensors
        is_bin = form.startswith("bin")
        name, suffix, save = ("pytorch_model", "bin", torch.save) if is_bin else ("model", "safetensors", save_file)
        if not form.endswith("_shards"):
            save(tensors, folder / f"{name}.{suffix}")
            return folder
        names, weight_map = list(tensors), {}
        for shard in range(3):
            file = f"{name}-{shard + 1:05d}-of-00003.{suffix}"
            save({key: tensors[key] for key in names[shard::3]}, folder / file)
            weight_map |= dict.fromkeys(names[shard::3], file)
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return write


def _update(file: Path, changes: dict) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def assert_nothing_written(output: Path) -> None:
    """Neither the output nor anything that was meant to become it is there."""
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if output.name in path.name]
