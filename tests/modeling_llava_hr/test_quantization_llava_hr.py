# SPDX-License-Identifier: Apache-2.0
"""
Loading with the quantizers of transformers, on whatever device is there: language model alone, near the full model,
reloadable. docs/quantization.md has a row for each name of `CONFIGS`.
"""

import pytest
import torch
from tiny_configs import make_inputs, make_model
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, QuantoConfig, TorchAoConfig


REASON = "quantization needs the extra [quantization]"


def bitsandbytes(**kwargs):
    pytest.importorskip("bitsandbytes", reason=REASON)
    return BitsAndBytesConfig(**kwargs)


def torchao(name, **kwargs):
    return TorchAoConfig(getattr(pytest.importorskip("torchao.quantization", reason=REASON), name)(**kwargs))


def quanto(weights):
    pytest.importorskip("optimum.quanto", reason=REASON)
    return QuantoConfig(weights=weights)


CONFIGS = {
    "bitsandbytes-4bit": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes-4bit-double": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes-8bit": lambda: bitsandbytes(load_in_8bit=True),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao-float8": lambda: torchao("Float8WeightOnlyConfig"),
    "quanto-int8": lambda: quanto("int8"),
    "quanto-int4": lambda: quanto("int4"),
    "quanto-float8": lambda: quanto("float8"),
}
# Of random weights with 64 columns, which are the worst case
RELATIVE_ERROR = {"4bit": 0.4, "int4": 0.4, "float8": 0.1, "8bit": 0.05, "int8": 0.05}
SAVED = [name for name in CONFIGS if not name.startswith("quanto")]  # which transformers does not save


@pytest.fixture
def folder(tmp_path):
    make_model().save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def load(folder, name, as_dict=False):
    config = CONFIGS[name]()
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config.to_dict() if as_dict else config
    )


def quantized_modules(model):
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name for name, weight in weights.items() if weight is not None and type(weight) is not nn.Parameter}


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_language_models_layers_are_quantized(folder, name, as_dict):
    model = load(folder, name, as_dict)
    language_model = {
        f"model.language_model.{name}"
        for name, _ in model.model.language_model.named_modules()
        if name.endswith("_proj")
    }
    assert quantized_modules(model) == language_model and len(language_model) == 2 * 7


def test_the_users_own_list_adds_to_the_vision_side(folder):
    config = bitsandbytes(load_in_8bit=True, llm_int8_skip_modules=["model.language_model.layers.0", "lm_head"])
    model = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)
    names = quantized_modules(model)
    assert names and all(name.startswith("model.language_model.layers.1.") for name in names)


@pytest.mark.parametrize("name", CONFIGS)
def test_generates_and_stays_near_the_full_model(folder, name):
    full, model, inputs = make_model(), load(folder, name), make_inputs(1, 0, 2)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits[kept].float().cpu()
        expected = full(**{name: value.cpu() for name, value in inputs.items()}).logits[kept.cpu()]
    error = (logits - expected).norm() / expected.norm()
    assert error < RELATIVE_ERROR[name.removesuffix("-double").split("-")[1]]
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.parametrize("name", SAVED)
def test_saved_checkpoints_reload_to_the_same_logits(tmp_path, folder, name):
    model = load(folder, name)
    model.save_pretrained(tmp_path / "quantized")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized")
    assert quantized_modules(reloaded) == quantized_modules(model)
    state, again = model.state_dict(), reloaded.state_dict()
    plain = [key for key in state if type(state[key]) is torch.Tensor]  # torchao's tensors cannot be compared
    assert state.keys() == again.keys() and plain and all(torch.equal(state[key], again[key]) for key in plain)
    # Text alone: the towers stay in floating point and round differently with the alignment of loaded weights in
    # memory, which the rounding of activations to 8 bits would make large
    inputs = {name: value.to(model.device) for name, value in make_inputs(0, 0).items()}
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_a_repacked_4bit_model_is_not_saved(tmp_path, folder):
    model = load(folder, "bitsandbytes-4bit")
    with torch.no_grad():
        model(**{name: value.to(model.device) for name, value in make_inputs(0).items()})
    states = [model.get_submodule(name).weight.quant_state for name in quantized_modules(model)]
    if not any(getattr(state, "packing_format_for_cpu", False) for state in states):
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")
    with pytest.raises(ValueError, match="`save_pretrained` before the first forward"):
        model.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="`dequantize` before the first forward"):
        model.dequantize()
    assert not (tmp_path / "wrong").exists()
