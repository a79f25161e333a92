# SPDX-License-Identifier: Apache-2.0
"""4-bit and 8-bit loading with bitsandbytes, on whatever device is there."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig


bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit and 8-bit loading need the extra [quantization]")

CONFIGS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4bit-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}


@pytest.fixture
def folder(tmp_path, mini):
    mini.model().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def load(folder, bits, as_dict=False):
    config = CONFIGS[bits] if as_dict else BitsAndBytesConfig(**CONFIGS[bits])
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)


def quantized_modules(model):
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("bits", CONFIGS)
def test_only_the_language_models_layers_are_quantized(folder, bits, as_dict):
    model = load(folder, bits, as_dict)
    language_model = {
        f"model.language_model.{name}"
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert quantized_modules(model) == language_model and len(language_model) == 2 * 7


def test_the_users_own_list_adds_to_the_vision_side(folder):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model.language_model.layers.0", "lm_head"])
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    names = quantized_modules(model)
    assert names and all(name.startswith("model.language_model.layers.1.") for name in names)


@pytest.mark.parametrize("bits", CONFIGS)
def test_generates_and_stays_near_the_full_model(folder, mini, bits):
    full, model, inputs = mini.model(), load(folder, bits), mini.inputs(1, 0, 2)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits[kept].float().cpu()
        expected = full(**{name: value.cpu() for name, value in inputs.items()}).logits[kept.cpu()]
    error = (logits - expected).norm() / expected.norm()
    assert error < (0.05 if bits == "8bit" else 0.4)  # random weights of 64 columns are the worst case for NF4
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("bits", CONFIGS)
def test_saved_checkpoints_reload_to_the_same_logits(tmp_path, folder, mini, bits):
    model = load(folder, bits)
    model.save_pretrained(tmp_path / "quantized")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized")
    assert quantized_modules(reloaded) == quantized_modules(model)
    state, again = model.state_dict(), reloaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    # Text alone: the towers stay in floating point and round differently with the alignment of loaded weights in
    # memory, which the rounding of activations to 8 bits would make large
    inputs = {name: value.to(model.device) for name, value in mini.inputs(0, 0).items()}
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_a_repacked_4bit_model_is_not_saved(tmp_path, folder, mini):
    model = load(folder, "4bit")
    with torch.no_grad():
        model(**{name: value.to(model.device) for name, value in mini.inputs(0).items()})
    states = [
        module.weight.quant_state for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
    ]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")
    with pytest.raises(ValueError, match="before the first forward"):
        model.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
