# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from tiny_configs import make_config
from transformers import BloomConfig, CLIPVisionConfig, GPT2Config, LlamaConfig, SiglipVisionConfig, TimmWrapperConfig

from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, get_num_image_tokens


def test_defaults_are_the_released_7b():
    config = LlavaHrConfig()
    assert config.mr_adapter_layers == [6, 12, 18]
    assert config.vision_config.image_size == 336 and config.vision_config.num_hidden_layers == 24
    assert config.vision_config.hidden_act == "quick_gelu"
    assert config.high_res_vision_config.architecture == "convnext_large_mlp"
    assert config.text_config.num_hidden_layers == 32
    assert (config.mr_adapter_gate, config.mr_adapter_gate_act, config.fusion) == ("scalar", "tanh", "sum")


def test_round_trip(tmp_path):
    config = make_config(mr_adapter_gate="channel", fusion="concat", mr_adapter_layers=[0, 3])
    config.save_pretrained(tmp_path)
    again = LlavaHrConfig.from_pretrained(tmp_path)
    assert again.to_dict()["mr_adapter_layers"] == [0, 3]
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert set(again.auto_map) == {"AutoConfig"}  # the model's code is not there


def test_dicts_become_configs_and_siglip_works():
    config = LlavaHrConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16},
        high_res_vision_config={"architecture": "resnet18", "do_pooling": False},
        text_config={"model_type": "qwen2", "vocab_size": 200},
        image_token_id=5,
        mr_adapter_layers=[3, 6, 9],
    )
    assert isinstance(config.vision_config, SiglipVisionConfig)
    assert isinstance(config.high_res_vision_config, TimmWrapperConfig)
    assert config.text_config.model_type == "qwen2"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"mr_adapter_layers": [4]}, "from 0 to 3"),
        ({"mr_adapter_layers": [-1]}, "from 0 to 3"),
        ({"mr_adapter_layers": [2, 1]}, r"Use \[1, 2\]"),
        ({"mr_adapter_layers": [1, 1]}, r"Use \[1\]"),
        ({"mr_adapter_gate": "vector"}, "scalar, channel"),
        ({"mr_adapter_gate_act": "relu"}, "tanh, sigmoid, hard_sigmoid"),
        ({"mr_adapter_low_res_mapping": "linear"}, "conv, mlp"),
        ({"mr_adapter_high_res_mapping": 3}, "conv, mlp"),
        ({"fusion": "product"}, "sum, concat"),
        ({"image_token_id": 128}, "inside the vocabulary"),
        ({"projector_hidden_act": "nope"}, "activation of transformers"),
        ({"vision_config": CLIPVisionConfig(num_hidden_layers=4, image_size=60, patch_size=14)}, "multiple of"),
        ({"vision_config": LlamaConfig()}, "clip_vision_model or siglip_vision_model"),
        ({"vision_config": {"model_type": "no_such_model"}}, "does not know"),
        ({"high_res_vision_config": CLIPVisionConfig()}, "TimmWrapperConfig"),
    ],
)
def test_contradictions_are_value_errors_that_say_what_to_change(values, expected):
    with pytest.raises(ValueError, match=expected) as error:
        make_config(**values)
    assert next(iter(values)) in str(error.value)


# Independent count: sizes of the published parts, in parameters.
# - Vicuna v1.5: Llama 2 with 32000 tokens, 6738.4 M and 13015.9 M (lmsys/vicuna-7b-v1.5, -13b-v1.5)
# - CLIP ViT-L/14-336 (openai/clip-vit-large-patch14-336): 303.5 M, less class embedding, its position, post-layernorm
# - CLIP-ConvNeXt trunks without head: stem and stages by the formula of the ConvNeXt paper
def convnext(dims, depths):
    total = 3 * 4 * 4 * dims[0] + dims[0] + 2 * dims[0]  # stem: convolution, norm
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        if stage:
            total += 2 * dims[stage - 1] + dims[stage - 1] * dim * 4 + dim  # norm, 2 x 2 convolution
        total += depth * (49 * dim + dim + 2 * dim + 8 * dim * dim + 4 * dim + dim + dim)  # 7x7, norm, MLP, scale
    return total


def llava_hr(language_model, text_hidden, dims, depths, d=1024):
    clip = 303_507_456 - d - d - 2 * d
    c = dims[-1]
    adapter = (49 * d + d + d * d + d) + (c * c + c + c * d + d) + (2 * d * d // 2 + d // 2) + (d // 2 + 1)
    fusion = d * d + d + c * d + d
    projector = d * text_hidden + text_hidden + text_hidden**2 + text_hidden
    image_token_rows = 2 * 64 * text_hidden
    return language_model + image_token_rows + clip + convnext(dims, depths) + 3 * adapter + fusion + projector


X_13B = {
    "high_res_vision_config": TimmWrapperConfig(architecture="convnext_xxlarge", do_pooling=False),
    "text_config": LlamaConfig(
        vocab_size=32064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
}


@pytest.mark.parametrize(
    ("options", "expected", "millions"),  # of favor123/llava-hr-*, each with its image token and without heads
    [
        ({}, llava_hr(6_738_415_616, 4096, (192, 384, 768, 1536), (3, 3, 27, 3)), 7281),  # 7b-sft-1024
        (X_13B, llava_hr(13_015_864_320, 5120, (384, 768, 1536, 3072), (3, 4, 30, 3)), 14243),  # 13b-x-sft-1024
    ],
)
def test_parameters_of_the_released_models(options, expected, millions):
    with torch.device("meta"):
        model = LlavaHrForConditionalGeneration(LlavaHrConfig(**options))
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert round(expected / 1e6) == millions


@pytest.mark.parametrize(("size", "tokens"), [(336, 576), (448, 1024), (672, 2304)])
def test_num_image_tokens_of_the_paper(size, tokens):
    assert get_num_image_tokens(size, 14) == tokens


@pytest.mark.parametrize(
    ("num_layers", "layers"), [(24, [6, 12, 18]), (12, [3, 6, 9]), (27, [6, 13, 20]), (2, [0, 1])]
)
def test_adapters_stand_at_the_quarters_of_any_vit(num_layers, layers):
    assert LlavaHrConfig(vision_config=CLIPVisionConfig(num_hidden_layers=num_layers)).mr_adapter_layers == layers


def stretch(kind: str, factor: float, original: int, length: int) -> LlamaConfig:
    rope = {
        "rope_type": kind,
        "rope_theta": 1e4,
        "factor": factor,
        "original_max_position_embeddings": original,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    if kind in ("linear", "dynamic"):
        rope = {name: rope[name] for name in ("rope_type", "rope_theta", "factor")}
    return LlamaConfig(vocab_size=32064, max_position_embeddings=length, rope_parameters=rope)


@pytest.mark.parametrize(
    ("text_config", "length"),
    [
        (None, 4096),
        (BloomConfig(vocab_size=32064), None),
        (GPT2Config(n_positions=1024), 1024),
        (stretch("linear", 2.0, 4096, 4096), 8192),
        (stretch("dynamic", 2.0, 4096, 4096), 8192),
        # Qwen2.5's model cards have it so, DeepSeek writes down the stretched length
        (stretch("yarn", 4.0, 32768, 32768), 131072),
        (stretch("yarn", 4.0, 32768, 131072), 131072),
        (stretch("llama3", 8.0, 8192, 131072), 131072),
    ],
)
def test_context_length_counts_what_rope_stretches(text_config, length):
    assert LlavaHrConfig(text_config=text_config).context_length == length


@pytest.mark.parametrize("size", [0, -14, 340])
def test_num_image_tokens_refuses_sizes_off_the_grid(size):
    with pytest.raises(ValueError, match=f"got {size}"):
        get_num_image_tokens(size, 14)
