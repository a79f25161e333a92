# SPDX-License-Identifier: Apache-2.0
"""The recordings of the released code: its checkpoints, converted once per session or written again with changes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "fixtures" / "reference"
TINY_MODEL = ROOT / "examples" / "tiny-llava-hr"
STAGES = ("stage1-384", "stage2-1024")
NUM_IMAGE_TOKENS = {"stage1-384": 576, "stage2-1024": 1024}  # (L / 14)^2
FORMS = ("bin_shards", "bin", "safetensors_shards", "safetensors")


def read_original(stage: str) -> dict[str, torch.Tensor]:
    """All tensors of a recorded checkpoint by their original names."""
    files = sorted((REFERENCE / stage / "checkpoint").glob("pytorch_model-*.bin"))
    return {name: tensor for file in files for name, tensor in torch.load(file, weights_only=True).items()}


def read_cases(stage: str) -> list[dict]:
    """What was recorded of each prompt: `images` are paths, `messages` the turns with images as parts of their own."""
    cases = json.loads((REFERENCE / stage / "cases.json").read_text())["cases"]
    for case in cases:
        case["images"] = [str(REFERENCE / stage / "images" / name) for name in case.get("images", ["case0_0.png"])]
        images, case["messages"] = iter(case["images"]), []
        for question, answer in case.get("turns") or [("<image>\n", case["caption"])]:
            content = [{"type": "image", "image": next(images)} for _ in range(question.count("<image>"))]
            content.append({"type": "text", "text": question.replace("<image>\n", "")})
            case["messages"].append({"role": "user", "content": content})
            if answer is not None:
                case["messages"].append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return cases


def convert_recorded(stage: str, folder: Path, legacy: bool = False) -> Path:
    """Converts a recorded checkpoint with another kind of tokenizer; returns the converted folder."""
    from conversion.convert_llava_hr_weights_to_hf import convert

    pytest.importorskip("sentencepiece", reason="the GPU image may lack it")
    checkpoint = shutil.copytree(REFERENCE / stage / "checkpoint", folder / "checkpoint")
    _update(checkpoint / "tokenizer_config.json", {"legacy": legacy})
    convert(str(checkpoint), str(folder / "converted"))
    return folder / "converted"


@pytest.fixture(scope="session")
def converted_stage1(tmp_path_factory) -> Path:
    """Stage 1 at 384 px, without adapters. Read-only, as the others: a test that changes it copies it first."""
    return convert_recorded("stage1-384", tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="session")
def converted_stage2(tmp_path_factory) -> Path:
    """Stage 2 at 1024 px: the whole model."""
    return convert_recorded("stage2-1024", tmp_path_factory.mktemp("stage2"))


@pytest.fixture(scope="session")
def converted_stage2_legacy(tmp_path_factory) -> Path:
    """Stage 2 with a tokenizer of the kind `legacy`."""
    return convert_recorded("stage2-1024", tmp_path_factory.mktemp("legacy"), legacy=True)


@pytest.fixture(scope="session")
def converted(converted_stage1, converted_stage2) -> dict[str, Path]:
    """Both by the name of the recording."""
    return dict(zip(STAGES, (converted_stage1, converted_stage2), strict=True))


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


def change_json(file: Path, *path: str, value) -> None:
    """Puts a value where `path` leads in a JSON file."""
    content = part = json.loads(file.read_text())
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    file.write_text(json.dumps(content))


def assert_nothing_written(output: Path) -> None:
    """Neither the output nor anything that was meant to become it is there."""
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if output.name in path.name]
