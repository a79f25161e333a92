# SPDX-License-Identifier: Apache-2.0
"""Hostile checkpoints and data: nothing in them runs code, reads other files, or allocates all memory."""

import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from converted_checkpoints import REFERENCE, ROOT, change_json, read_original
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlamaConfig

from conversion.assemble import load_high_res_tower, load_language_model, load_vision_tower
from conversion.checkpoints import read_tensors
from conversion.convert_llava_hr_weights_to_hf import convert
from examples.publish import PublishArguments, publish
from modeling_llava_hr import LlavaHrForConditionalGeneration


CHECKPOINT = REFERENCE / "stage2-1024" / "checkpoint"


class RunsCode:
    """A pickle of this would call os.mkdir when it is read."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def model(converted, tmp_path) -> Path:
    """A small model that a test may change."""
    return shutil.copytree(converted["stage2-1024"], tmp_path / "model")


# --- pickles ---


def make_harmful(file: Path, weights: dict, tmp_path: Path) -> bytes:
    torch.save({**weights, "harmless": RunsCode(tmp_path / "was here")}, file)
    return file.read_bytes()


def test_from_pretrained_refuses_a_pickle_that_would_run_code(model, tmp_path):
    (model / "model.safetensors").rename(model / "before")
    before = make_harmful(model / "pytorch_model.bin", load_file(model / "before"), tmp_path)
    with pytest.raises(Exception, match="Weights only load failed"):  # transformers lets torch's own error through
        AutoModelForImageTextToText.from_pretrained(model)
    assert not (tmp_path / "was here").exists()
    assert (model / "pytorch_model.bin").read_bytes() == before


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("load", "config", "file"),
    [
        (load_vision_tower, CLIPVisionConfig(**SIZES), "pytorch_model.bin"),
        (load_language_model, LlamaConfig(**SIZES, vocab_size=64), "pytorch_model.bin"),
        (partial(load_high_res_tower, architecture="convnext_atto"), None, "open_clip_pytorch_model.bin"),
    ],
)
def test_assemble_refuses_a_pickle_that_would_run_code(load, config, file, tmp_path):
    if config is not None:
        config.save_pretrained(tmp_path)
    before = make_harmful(tmp_path / file, {"weight": torch.zeros(2)}, tmp_path)
    with pytest.raises(ValueError, match="pickle that would run code, which is refused.*mkdir"):
        load(str(tmp_path))
    assert not (tmp_path / "was here").exists()
    assert (tmp_path / file).read_bytes() == before


def test_the_converter_refuses_a_pickle_that_would_run_code(write_original, tmp_path):
    tensors = read_original("stage2-1024") | {"harmless": RunsCode(tmp_path / "was here")}
    with pytest.raises(ValueError, match="pickle that would run code, which is refused.*mkdir"):
        convert(str(write_original(tensors=tensors)), str(tmp_path / "out"))
    assert not (tmp_path / "was here").exists() and not (tmp_path / "out").exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"weight": torch.ones(4)}, tmp_path / "stored.bin")
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(tmp_path / "stored.bin") as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for name in stored.namelist():
            out.writestr(name, stored.read(name))
    assert read_tensors(tmp_path / "stored.bin")["weight"].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="packed.bin is a compressed archive"):
        read_tensors(packed)


# --- weights ---


def test_the_converter_names_tensors_with_values_that_are_not_numbers(write_original, tmp_path):
    tensors = read_original("stage2-1024")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["lm_head.weight"][7, 5] = -float("inf")
    with pytest.raises(ValueError, match="not a number in 2 tensors: .*language_model.norm.weight.*damaged") as error:
        convert(str(write_original(tensors=tensors)), str(tmp_path / "out"))
    assert "lm_head.weight (" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_the_converter_refuses_a_dtype_in_which_weights_would_be_infinite(write_original, tmp_path):
    tensors = read_original("stage2-1024")
    tensors["model.norm.weight"][3] = 1e6  # float16 ends at 65504
    checkpoint = str(write_original(tensors=tensors))
    with pytest.raises(ValueError, match=r"1 tensors: .*norm.weight \(float16\).*another --dtype"):
        convert(checkpoint, str(tmp_path / "out"), dtype="float16")
    convert(checkpoint, str(tmp_path / "out"), dtype="bfloat16")


# --- sizes ---


@contextlib.contextmanager
def peak_growth_below(megabytes: int) -> Iterator[None]:
    """Fails if this process's peak memory within the block grows by more. Checks nothing but on Linux."""
    if sys.platform != "linux":
        yield
        return

    def read_peak() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # kB

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = read_peak()
    yield
    growth = (read_peak() - before) / 1024
    assert growth < megabytes, f"the peak of memory rose by {growth:.0f} MB"


ABSURD = [
    (("text_config", "num_hidden_layers"), 10**6),
    (("text_config", "hidden_size"), 10**9),
    (("text_config", "intermediate_size"), 10**12),
    (("text_config", "vocab_size"), 10**12),
    (("text_config", "num_key_value_heads"), 10**9),
    (("text_config", "num_hidden_layers"), 0),
    (("vision_config", "num_hidden_layers"), 10**6),
    (("vision_config", "hidden_size"), -64),
    (("vision_config", "image_size"), 14 * 10**9),
    (("vision_config", "patch_size"), 0),
    (("vision_config", "num_attention_heads"), 0),
    (("vision_config", "hidden_size"), "wide"),
    (("high_res_vision_config", "model_args"), {"depths": [10**6, 1, 1, 1], "dims": [8, 8, 8, 8]}),
    (("high_res_vision_config", "model_args"), {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 10**9]}),
    (("mr_adapter_layers",), [10**9]),
    (("mr_adapter_layers",), list(range(10**5))),
    (("image_token_id",), 10**12),
]


@pytest.mark.parametrize(
    ("path", "value"), ABSURD, ids=lambda value: ".".join(value) if isinstance(value, tuple) else None
)
def test_absurd_sizes_are_an_error_before_memory_is_allocated(path, value, model):
    change_json(model / "config.json", *path, value=value)
    with peak_growth_below(50), pytest.raises(ValueError, match=f"`{path[0]}"):
        AutoModelForImageTextToText.from_pretrained(model)


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 10**6), ("hidden_size", 10**9), ("vocab_size", 10**12)]
)
def test_the_converter_refuses_absurd_sizes(field, value, write_original, tmp_path):
    with pytest.raises(ValueError, match=rf"config.json: `text_config.{field}` must be from 1 to"):
        convert(str(write_original(**{field: value})), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        # a few bytes in the file: the same number repeated
        ("vision_model.embeddings.patch_embedding.weight", (64 * 10**9, 3, 14, 14), "vision_config.hidden_size"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", (10**12, 128), "vision_config.intermediate_size"),
        ("vision_model.encoder.layers.999999999.mlp.fc1.bias", (2,), "vision_config.num_hidden_layers"),
        ("stages.0.blocks.999999999.mlp.fc1.bias", (2,), "depths"),
        ("stages.3.blocks.0.conv_dw.bias", (10**12,), "dims"),
    ],
)
def test_the_converter_refuses_absurd_tensors(name, shape, message, write_original, tmp_path):
    prefix = "fast_vision_tower" if name.startswith("vision_model") else "slow_vision_tower"
    absurd = {f"model.vision_tower.{prefix}.vision_tower.{name}": torch.zeros(1, dtype=torch.bfloat16).expand(shape)}
    checkpoint = write_original(tensors=read_original("stage2-1024") | absurd)
    with peak_growth_below(50), pytest.raises(ValueError, match=message):
        convert(str(checkpoint), str(tmp_path / "out"))


def test_memory_that_is_taken_would_be_noticed():
    kept = bytearray(200 * 2**20)  # what there was before does not count
    del kept
    with pytest.raises(AssertionError, match="rose by"), peak_growth_below(50):
        bytearray(100 * 2**20)


@pytest.mark.parametrize("field", ["num_hidden_layers", "vocab_size"])
def test_assemble_refuses_absurd_sizes(field, tmp_path):
    LlamaConfig(hidden_size=64, num_attention_heads=1).save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", field, value=10**9)
    with pytest.raises(ValueError, match=rf"--language_model: llama.{field}` must be from 1 to"):
        load_language_model(str(tmp_path))
    CLIPVisionConfig().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", "hidden_size", value=12 * 10**9)
    with pytest.raises(ValueError, match="--vision_tower: clip_vision_model.hidden_size` must be from 1 to"):
        load_vision_tower(str(tmp_path))


# --- other places ---


@pytest.mark.parametrize(
    "values",
    [
        {"architecture": "hf-hub:somebody/something"},
        {"architecture": "local-dir:/tmp"},
        {"model_args": {"checkpoint_path": "/tmp/weights.pth"}},
        {"model_args": {"pretrained": True}},
        {"model_args": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1/weights.pth"}}},
    ],
)
def test_a_configuration_makes_timm_load_nothing(values, model):
    for name, value in values.items():
        change_json(model / "config.json", "high_res_vision_config", name, value=value)
    with pytest.raises(ValueError, match=r"high_res_vision_config\.(architecture|model_args)"):
        LlavaHrForConditionalGeneration.from_pretrained(model)


@pytest.mark.parametrize("name", ["../secret.png", "images/../../secret.png", "images/.."])
def test_names_of_images_stay_in_their_folder(name, tmp_path):
    training_data = pytest.importorskip("training.data", reason="training needs the extra [training]")
    is_inside = pytest.importorskip("training.rows", reason="training needs the extra [training]").is_inside
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (folder / "rows.json").write_text(json.dumps([{"id": "a", "image": name, "conversations": turns}]))
    with pytest.raises(ValueError, match=r"image .* lies outside of|is missing|is broken"):
        training_data.load_data(training_data.DataConfig(str(folder / "rows.json")))
    assert is_inside(folder, str(tmp_path / "secret.png"))  # says openly where it leads
    assert is_inside(folder, "images/a..b.png") and is_inside(folder, "images/../a.png")


def test_links_are_read_and_replaced_but_nothing_behind_them_is_touched(tmp_path):
    # as in the Hub's cache: each file is a link to a blob
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    linked = shutil.copytree(checkpoint, tmp_path / "linked", copy_function=os.symlink)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("kept")
    (tmp_path / ".out.incomplete").symlink_to(precious)
    with pytest.raises(ValueError, match="could not be written"):
        convert(str(linked), str(tmp_path / "out"))
    (tmp_path / "out").symlink_to(precious)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert(str(linked), str(tmp_path / "out"))
    assert [file.name for file in precious.iterdir()] == ["kept"]

    (tmp_path / ".out.incomplete").unlink()
    (tmp_path / "out").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")  # an empty folder on another disk, say
    convert(str(linked), str(tmp_path / "out"))
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file() and (tmp_path / "out").is_symlink()
    assert sorted(file.name for file in checkpoint.iterdir()) == sorted(file.name for file in CHECKPOINT.iterdir())


def test_what_links_lead_to_is_not_published(model, tmp_path):
    (tmp_path / "secret").write_text('{"password": "1234"}')
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="generation_config.json is a link to something outside of the folder"):
        publish(PublishArguments(model=str(model), repo="someone/small", dry_run=True))
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").symlink_to(model / "config.json")
    publish(PublishArguments(model=str(model), repo="someone/small", dry_run=True))


# --- remote code ---


def test_no_code_of_ours_trusts_remote_code():
    """Where a call says `trust_remote_code`, that comes from the user: an option, or a variable of the Space."""
    told = set()
    for folder in ("modeling_llava_hr", "conversion", "training", "examples", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            values = re.findall(r"""trust_remote_code["'\]]*\s*[=:]\s*([\w.]+)""", file.read_text(encoding="utf-8"))
            told |= {(file.relative_to(ROOT).as_posix(), value) for value in values}
    assert told == {
        ("training/train.py", "training_args.trust_remote_code"),  # TRL's option, off by default
        ("examples/space/engine.py", "TRUST_REMOTE_CODE"),
    }


def test_code_beside_the_weights_does_not_run_unless_the_user_says_so(model, tmp_path, monkeypatch):
    marker = tmp_path / "was here"
    (model / "harmful.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    for name, path, classes in (
        ("config.json", (), ("AutoConfig", "AutoModel", "AutoModelForImageTextToText")),
        ("config.json", ("text_config",), ("AutoConfig", "AutoModel", "AutoModelForCausalLM")),
        ("config.json", ("vision_config",), ("AutoConfig", "AutoModel")),
        ("processor_config.json", (), ("AutoProcessor",)),
        ("processor_config.json", ("image_processor",), ("AutoImageProcessor",)),
        ("tokenizer_config.json", (), ("AutoTokenizer",)),
    ):
        change_json(model / name, *path, "auto_map", value=dict.fromkeys(classes, "harmful.Harmful"))
    model_class = AutoModelForImageTextToText.from_pretrained(model)
    assert type(model_class) is LlavaHrForConditionalGeneration
    AutoProcessor.from_pretrained(model)
    publish(PublishArguments(model=str(model), repo="someone/small", dry_run=True))
    convert(str(CHECKPOINT), str(tmp_path / "out"))
    assert not marker.exists()

    # an unknown type: transformers asks, and nobody answers yes
    change_json(model / "config.json", "model_type", value="harmful")
    for load in (AutoConfig.from_pretrained, AutoModelForImageTextToText.from_pretrained, load_vision_tower):
        monkeypatch.setattr(sys, "stdin", None)
        with pytest.raises(ValueError, match="harmful|trust_remote_code|custom code"):
            load(str(model))
    assert not marker.exists()
