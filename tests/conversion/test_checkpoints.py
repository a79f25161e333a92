# SPDX-License-Identifier: Apache-2.0
"""Files of checkpoints that are damaged, missing or of another kind; for hostile ones see tests/reliability."""

import json

import pytest
import torch
from converted_checkpoints import FORMS, assert_nothing_written

from conversion.convert_llava_hr_weights_to_hf import convert


@pytest.mark.parametrize("form", FORMS)
def test_damaged_weights(form, write_original, tmp_path):
    folder = write_original(form=form)
    file = max(folder.glob("*.bin" if form.startswith("bin") else "*.safetensors"))
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{file.name} cannot be read as plain tensors: it is damaged"):
        convert(str(folder), str(tmp_path / "out"))
    assert_nothing_written(tmp_path / "out")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": {"lm_head.weight": torch.zeros(2)}}])
def test_pickle_of_something_else(content, write_original, tmp_path):
    folder = write_original(tensors=content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold dense tensors by name"):
        convert(str(folder), str(tmp_path / "out"))


@pytest.mark.parametrize("shard", ["../outside.bin", "/etc/passwd", "..", "a/b.bin", "C:\\x.bin"])
def test_index_that_names_files_elsewhere(shard, write_original, tmp_path):
    folder = write_original(form="bin_shards")
    index = folder / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must name files in its own folder"):
        convert(str(folder), str(tmp_path / "out"))


def test_missing_files(write_original, tmp_path):
    folder = write_original(form="bin_shards")
    min(folder.glob("*.bin")).unlink()
    with pytest.raises(ValueError, match=r"pytorch_model-00001-of-00003\.bin"):
        convert(str(folder), str(tmp_path / "out"))
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        folder = write_original()
        (folder / name).unlink()
        with pytest.raises(ValueError, match=name):
            convert(str(folder), str(tmp_path / "out"))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="has none of"):
        convert(str(folder), str(tmp_path / "out"))
    assert_nothing_written(tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_damaged_index(text, write_original, tmp_path):
    folder = write_original(form="bin_shards")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin\.index\.json"):
        convert(str(folder), str(tmp_path / "out"))
