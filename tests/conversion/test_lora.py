# SPDX-License-Identifier: Apache-2.0
"""LoRA checkpoints of the released code, made from the recorded checkpoint by random low-rank updates."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from converted_checkpoints import REFERENCE, read_original
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig

from conversion.convert_llava_hr_weights_to_hf import convert


CHECKPOINT = REFERENCE / "stage2-1024" / "checkpoint"
RANK, ALPHA = 4, 16
TARGETS = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
LANGUAGE_MODEL = r"model\.(layers|embed_tokens|norm)\..*|lm_head\.weight"
TOKENIZER = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """The recorded checkpoint's tensors, in float32."""
    return {name: tensor.float() for name, tensor in read_original("stage2-1024").items()}


@pytest.fixture
def language_model(original, tmp_path) -> Path:
    """What LoRA was trained from: a folder as transformers writes it."""
    folder = tmp_path / "vicuna"
    config = json.loads((CHECKPOINT / "config.json").read_text())
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    LlamaConfig(**{name: config[name] for name in names}).save_pretrained(folder)
    weights = {name: tensor for name, tensor in original.items() if re.fullmatch(LANGUAGE_MODEL, name)}
    torch.save(weights, folder / "pytorch_model.bin")
    for name in TOKENIZER:
        shutil.copy(CHECKPOINT / name, folder)
    return folder


@pytest.fixture
def lora(original, tmp_path) -> Path:
    """As the released code saves it: configuration, adapter, and what else was trained; no tokenizer."""
    folder = tmp_path / "lora"
    folder.mkdir()
    shutil.copy(CHECKPOINT / "config.json", folder)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    adapter = {}
    for name in (name for name in original if re.fullmatch(TARGETS, name)):
        (out_features, in_features), module = original[name].shape, name.removesuffix(".weight")
        adapter[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, in_features)
        adapter[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out_features, RANK)
    torch.save(adapter, folder / "adapter_model.bin")
    rest = {name: tensor for name, tensor in original.items() if not re.fullmatch(LANGUAGE_MODEL, name)}
    torch.save({f"base_model.model.{name}": t for name, t in rest.items()}, folder / "non_lora_trainables.bin")
    return folder


def change(file: Path, **changes) -> None:
    """Changes a JSON object, or tensors by name; `None` removes one."""
    is_json = file.suffix == ".json"
    content = json.loads(file.read_text()) if is_json else torch.load(file, weights_only=True)
    content = {name: value for name, value in {**content, **changes}.items() if value is not None}
    file.write_text(json.dumps(content)) if is_json else torch.save(content, file)


def get_expected(original: dict[str, torch.Tensor], lora: Path, scale: float) -> dict[str, torch.Tensor]:
    """The language model's merged layers in float64 by this package's names: W + scale * B A, element by element."""
    adapter = torch.load(lora / "adapter_model.bin", weights_only=True)
    expected = {}
    for name, weight in original.items():
        if re.fullmatch(TARGETS, name):
            a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
            update = torch.einsum("ri,or->oi", a.double(), b.double())
            expected[name.replace("model.", "model.language_model.", 1)] = weight.double() + scale * update
    return expected


@pytest.mark.parametrize(("options", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True}, ALPHA / RANK**0.5)])
def test_updates_are_merged_and_everything_else_is_copied(
    options, scale, original, lora, language_model, converted, tmp_path, capsys
):
    change(lora / "adapter_config.json", **options)
    convert(str(lora), str(tmp_path / "out"), base=str(language_model))
    result = load_file(tmp_path / "out" / "model.safetensors")
    plain = load_file(converted["stage2-1024"] / "model.safetensors")
    expected = get_expected(original, lora, scale)
    assert result.keys() == plain.keys() and len(expected) == 7 * 2  # seven matrices in each of two layers
    for name, tensor in result.items():
        if name in expected:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)
        else:  # a new row of the embeddings is a mean, which is rounded in the dtype
            torch.testing.assert_close(tensor, plain[name].float(), rtol=2**-8, atol=1e-6)
    assert "merged 14 LoRA updates" in capsys.readouterr().out
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "processor_config.json", "generation_config.json"):
        ours, theirs = (json.loads((f / name).read_text()) for f in (tmp_path / "out", converted["stage2-1024"]))
        assert ours | {"dtype": None} == theirs | {"dtype": None}


def test_frozen_towers_come_from_a_base_in_this_packages_format(original, lora, converted, tmp_path):
    base = shutil.copytree(converted["stage2-1024"], tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    spoiled = {n: t * 0 if "projector" in n or "fusion" in n else t for n, t in weights.items()}
    save_file(spoiled, base / "model.safetensors", metadata={"format": "pt"})
    trainables = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    frozen = (name for name in trainables if "mm_projector" not in name and "align_stages.0" not in name)
    change(lora / "non_lora_trainables.bin", **dict.fromkeys(frozen))
    convert(str(lora), str(tmp_path / "out"), base=str(base))
    result, expected = load_file(tmp_path / "out" / "model.safetensors"), get_expected(original, lora, ALPHA / RANK)
    for name, tensor in result.items():
        torch.testing.assert_close(tensor.double(), expected.get(name, weights[name]).double(), rtol=1e-5, atol=1e-5)
    assert len(AutoProcessor.from_pretrained(tmp_path / "out").tokenizer) == 1001


def test_other_names_of_the_same_tensors(lora, language_model, tmp_path):
    """Newer versions of PEFT write safetensors; the state dict of a model in training has the adapter's name."""
    convert(str(lora), str(tmp_path / "expected"), base=str(language_model))
    adapter = torch.load(lora / "adapter_model.bin", weights_only=True)
    renamed = {re.sub(r"\.weight$", ".default.weight", name): tensor for name, tensor in adapter.items()}
    save_file(renamed, lora / "adapter_model.safetensors")
    (lora / "adapter_model.bin").unlink()
    trainables = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    torch.save(
        {n.removeprefix("base_model.model."): t for n, t in trainables.items()}, lora / "non_lora_trainables.bin"
    )
    convert(str(lora), str(tmp_path / "out"), base=str(language_model))
    files = [tmp_path / name / "model.safetensors" for name in ("out", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("adapter_config.json", {"r": None}, "must have the numbers `r` and `lora_alpha`"),
        ("adapter_config.json", {"use_dora": True}, "use_dora = True; only False can be merged"),
        ("adapter_config.json", {"bias": "all"}, "bias = 'all'; only 'none' can be merged"),
        ("adapter_config.json", {"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ("adapter_config.json", {"r": 8}, r"lora_A.weight: shape \[4, 64\], expected \[8, 64\]"),
        ("adapter_model.bin", {Q.format("A"): None}, "q_proj.weight: one half of its LoRA update is missing"),
        ("adapter_model.bin", {"base_model.model.lm_head.bias": torch.ones(2)}, "lm_head.bias: unexpected"),
        ("adapter_model.bin", {Q.format("B"): torch.ones(2, 4)}, r"lora_B.weight: shape \[2, 4\], expected \[64, 4\]"),
        ("adapter_model.bin", {Q.format("B"): torch.full((64, 4), torch.inf)}, "not a number in 1 tensors: .*q_proj"),
        ("non_lora_trainables.bin", {"base_model.model.extra": torch.ones(2)}, "base_model.model.extra: unexpected"),
        ("non_lora_trainables.bin", {"base_model.model.model.mm_projector.0.bias": None}, "linear_1.bias: missing"),
    ],
)
def test_checkpoints_that_do_not_fit(file, changes, message, lora, language_model, tmp_path):
    change(lora / file, **changes)
    with pytest.raises(ValueError, match=message):
        convert(str(lora), str(tmp_path / "out"), base=str(language_model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", ["adapter_model.bin", "non_lora_trainables.bin"])
def test_missing_files(file, lora, language_model, tmp_path):
    (lora / file).unlink()
    with pytest.raises(ValueError, match=file):
        convert(str(lora), str(tmp_path / "out"), base=str(language_model))


def test_what_the_base_must_be(lora, language_model, tmp_path):
    with pytest.raises(ValueError, match="is a LoRA checkpoint: name the language model"):
        convert(str(lora), str(tmp_path / "out"))
    trainables = torch.load(lora / "non_lora_trainables.bin", weights_only=True)
    change(lora / "non_lora_trainables.bin", **{name: None for name in trainables if "slow_vision_tower" in name})
    with pytest.raises(ValueError, match="vision towers are neither in non_lora_trainables.bin nor in --base"):
        convert(str(lora), str(tmp_path / "out"), base=str(language_model))
    (language_model / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="--base: .* has none of"):
        convert(str(lora), str(tmp_path / "out"), base=str(language_model))
