# SPDX-License-Identifier: Apache-2.0
"""The model's parts against independent formulas, and what transformers' common suites do not look at."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from PIL import Image
from tiny_configs import TEXT_SIZES, TOKENS, VIT_SIZES, make_config, make_inputs, make_model
from transformers import AutoModel, PreTrainedModel, Qwen2Config, SiglipVisionConfig, TimmWrapperConfig
from transformers.utils import is_flash_attn_2_available

import modeling_llava_hr.modeling_llava_hr_vision as modeling
from modeling_llava_hr import LlavaHrForConditionalGeneration, LlavaHrVisionModel
from modeling_llava_hr.modeling_llava_hr_vision import LlavaHrMixtureOfResolutionAdapter


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def linear(module, x):
    return torch.einsum("...i,oi->...o", x, module.weight) + module.bias


def mapping(module, x):
    """`(h, w, channels)` of one image; independent of the module's layout tricks."""
    if hasattr(module, "depthwise"):
        padded = F.pad(x, (0, 0, 3, 3, 3, 3))
        h, w, _ = x.shape
        x = module.depthwise.bias + sum(
            padded[i : i + h, j : j + w] * module.depthwise.weight[:, 0, i, j] for i in range(7) for j in range(7)
        )
        return linear(module.pointwise, gelu(x))
    return linear(module.fc2, gelu(linear(module.fc1, x)))


def bilinear_aligned(x, grid):
    """`(h, w, channels)` -> `(grid, grid, channels)`, corner on corner, as two small matrices."""

    def weights(size):
        matrix = torch.zeros(grid, size)
        for row in range(grid):
            position = row * (size - 1) / (grid - 1)
            left = min(int(position), size - 2)
            matrix[row, left], matrix[row, left + 1] = left + 1 - position, position - left
        return matrix

    return torch.einsum("ph,qw,hwc->pqc", weights(x.shape[0]), weights(x.shape[1]), x)


def pooled(x, grid):
    factor = x.shape[0] // grid
    return x.unflatten(0, (grid, factor)).unflatten(2, (grid, factor)).mean(dim=(1, 3))


@pytest.mark.parametrize("side", [2, 4, 8])
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"mr_adapter_gate": "channel"},
        {"mr_adapter_gate_act": "sigmoid", "fusion": "concat"},
        {"mr_adapter_gate_act": "hard_sigmoid", "mr_adapter_low_res_mapping": "mlp"},
        {"mr_adapter_high_res_mapping": "conv", "mr_adapter_gate": "channel", "fusion": "concat"},
    ],
)
def test_adapter_is_equations_3_and_4(side, choices):
    torch.manual_seed(0)
    grid, width, channels = 4, 64, 48
    adapter = LlavaHrMixtureOfResolutionAdapter(make_config(**choices), channels)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens, features = torch.randn(2, grid * grid, width), torch.randn(2, channels, side, side)
    with torch.no_grad():
        output, gates = adapter(tokens, features, grid)
        for index in range(2):
            low = tokens[index].unflatten(0, (grid, grid))
            mapped = mapping(adapter.low_res_mapping, low)
            high = mapping(adapter.high_res_mapping, features[index].permute(1, 2, 0))
            high = high if side == grid else (bilinear_aligned if side < grid else pooled)(high, grid)
            channel = choices.get("mr_adapter_gate") == "channel"
            means = torch.cat([(mapped if channel else low + mapped).mean((0, 1)), high.mean((0, 1))])
            z = linear(adapter.gate.fc2, gelu(linear(adapter.gate.fc1, means)))
            act = choices.get("mr_adapter_gate_act", "tanh")
            gate = {"tanh": torch.tanh(z), "sigmoid": 1 / (1 + torch.exp(-z))}.get(act, ((z + 3) / 6).clamp(0, 1))
            expected = low + mapped + gate * high
            if "fusion" in choices:
                expected = linear(adapter.fusion, torch.cat([low + mapped, gate * high], dim=-1))
            # float32 sums in another order
            torch.testing.assert_close(gates[index], gate, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(output[index], expected.flatten(0, 1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("choices", [{}, {"fusion": "concat"}, {"mr_adapter_gate": "channel", "fusion": "concat"}])
@pytest.mark.parametrize("source", ["construction", "checkpoint"])
def test_inserted_adapters_change_nothing_at_first(tmp_path, source, choices):
    """transformers' suites do not notice if the zero initialisation is skipped."""
    stage1 = make_model(mr_adapter_layers=[])
    if source == "construction":
        with_adapters = LlavaHrForConditionalGeneration(make_config(**choices)).eval()
        with_adapters.load_state_dict(stage1.state_dict(), strict=False)
    else:
        stage1.save_pretrained(tmp_path)
        with_adapters = LlavaHrForConditionalGeneration.from_pretrained(tmp_path, config=make_config(**choices))
    adapter = with_adapters.model.vision_tower.mr_adapters[0]
    assert adapter.low_res_mapping.pointwise.weight.abs().max() == 0
    assert adapter.high_res_mapping.fc2.weight.abs().max() == 0
    bound = math.sqrt(6 / (48 + 48))  # Xavier-uniform: sqrt(6 / (fan_in + fan_out))
    assert 0.9 * bound < adapter.high_res_mapping.fc1.weight.abs().max() <= bound
    assert adapter.high_res_mapping.fc1.bias.abs().max() == 0
    inputs = make_inputs(1)
    with torch.no_grad():
        torch.testing.assert_close(with_adapters(**inputs).logits, stage1(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_layers_of_adapters_are_torchs_own():
    """compressed-tensors saves by class which layers it left alone, and takes a subclass for one that it did not."""
    adapter = make_model(fusion="concat").model.vision_tower.mr_adapters[0]
    assert {type(module) for module in adapter.modules() if not list(module.children())} == {
        torch.nn.Linear,
        torch.nn.Conv2d,
    }


def test_every_part_says_whether_it_can_be_split():
    """Tools such as GPTQ's ask every part for its plans."""
    parts = [module for module in make_model().modules() if isinstance(module, PreTrainedModel)]
    plans = [(part.supports_tp_plan, part.supports_pp_plan) for part in parts]
    assert plans == [(True, True), (True, True), (False, False), (False, False), (True, True)]


def test_every_parameter_of_a_new_adapter_learns():
    """Neither side of a zero-initialised adapter may be dead: after one step all of it gets a gradient."""
    for choices in ({}, {"fusion": "concat"}):
        model = LlavaHrForConditionalGeneration(make_config(**choices)).train()
        inputs = make_inputs(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
        without = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
        # a key bias adds the same to all scores of a query, so its gradient is zero but for rounding
        assert [name for name in without if not name.endswith("k_proj.bias")] == []


def test_layer_scale_missing_from_a_checkpoint_starts_at_one(tmp_path):
    model = make_model()
    state = {name: tensor for name, tensor in model.state_dict().items() if "gamma" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = LlavaHrForConditionalGeneration.from_pretrained(tmp_path)
    gammas = [tensor for name, tensor in loaded.named_parameters() if name.endswith("gamma")]
    assert len(gammas) == 4 and all((gamma == 1).all() for gamma in gammas)


def test_position_embeddings_of_a_larger_grid():
    """Bicubic with antialias: reproduced with PIL, which always antialiases (released code; float32)."""
    model = make_model().model.vision_tower.embeddings
    pixel_values = torch.zeros(1, 3, 84, 84)
    with torch.no_grad():
        output = model(pixel_values)[0]  # no bias in CLIP's patch embedding: zero pixels leave the positions
    table = model.position_embedding.weight.detach().numpy().reshape(4, 4, -1)
    for channel in range(0, 64, 13):
        expected = Image.fromarray(table[:, :, channel].copy()).resize((6, 6), Image.Resampling.BICUBIC)
        torch.testing.assert_close(output[:, channel].reshape(6, 6), torch.from_numpy(np.array(expected)))


def test_outputs_carry_gates_and_high_res_features():
    model, inputs = make_model(), make_inputs(1, 2)
    with torch.no_grad():
        outputs = model(**inputs)
        features = model.get_image_features(inputs["pixel_values"])
    assert outputs.image_outputs.high_res_features.shape == (3, 48, 4, 4)
    assert [gate.shape for gate in outputs.image_outputs.mr_adapter_gates] == [(3, 1)] * 3
    assert features.last_hidden_state.shape == (3, TOKENS, 64)
    torch.testing.assert_close(features.pooler_output, outputs.image_outputs.pooler_output)
    assert outputs.image_outputs.hidden_states is None
    recorded = model(**inputs, output_hidden_states=True).image_outputs.hidden_states
    assert [state.shape for state in recorded] == [(3, TOKENS, 64)] * 5


def test_both_views_matter():
    model, inputs = make_model(), make_inputs(1)
    with torch.no_grad():
        inputs["low_res_pixel_values"] = torch.randn(1, 3, 56, 56)
        logits = model(**inputs).logits
        for name in ("pixel_values", "low_res_pixel_values"):
            changed = {**inputs, name: torch.randn_like(inputs[name])}
            assert (model(**changed).logits - logits).abs().max() > 1e-3, name


def test_text_alone_does_not_run_the_towers():
    model = make_model()
    model.model.vision_tower = None
    outputs = model(input_ids=torch.randint(3, 100, (1, 8)))
    assert outputs.logits.shape == (1, 8, 128) and outputs.image_outputs is None


@pytest.mark.parametrize(
    ("low", "high", "tokens"), [(56, 64, 16), (56, 128, 16), (56, 256, 16), (84, 64, 36), (84, 192, 36)]
)
def test_sizes_are_independent_at_run_time(low, high, tokens):
    features = make_model().get_image_features(torch.randn(1, 3, high, high), torch.randn(1, 3, low, low))
    assert features.pooler_output.shape == (1, tokens, 64)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ((1, 3, 56, 56), (1, 3, 160, 160), "5 x 5.*4 x 4"),
        ((1, 3, 50, 50), (1, 3, 128, 128), "`low_res_size`.*multiple of the patch size 14"),
        ((1, 3, 56, 56), (1, 3, 130, 130), "`size` .*multiple of `high_res_stride` .32"),
        ((1, 3, 56, 56), (2, 3, 128, 128), "one view of each image"),
        ((3, 56, 56), (3, 128, 128), "shape"),
        ((1, 3, 56, 70), (1, 3, 128, 128), "shape"),
    ],
)
def test_views_that_do_not_fit_are_named(low, high, expected):
    with pytest.raises(ValueError, match=expected):
        make_model().get_image_features(torch.zeros(high), torch.zeros(low))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "low_res_size", "expected"),  # the rule, else the config's side
    [(64, None, 56), (128, None, 56), (192, None, 84), (256, 56, 56), (128, 84, 84)],
)
def test_the_model_makes_the_low_resolution_view(dtype, side, low_res_size, expected):
    model = make_model(low_res_size=low_res_size)
    pixel_values = torch.randn(2, 3, side, side).to(dtype)
    # in float32 whatever arrives, as corners meet; an own formula
    view = torch.stack([bilinear_aligned(image.float().permute(1, 2, 0), expected) for image in pixel_values])
    with torch.no_grad():
        features = model.get_image_features(pixel_values).pooler_output
        given = model.get_image_features(pixel_values, view.permute(0, 3, 1, 2)).pooler_output
    assert features.shape == (2, (expected // 14) ** 2, 64)
    torch.testing.assert_close(features, given, atol=1e-4, rtol=1e-4)


def test_a_prompt_for_another_side_is_rejected():
    model, inputs = make_model(), make_inputs(1)
    inputs["pixel_values"] = torch.randn(1, 3, 256, 256)
    with pytest.raises(ValueError, match="tokens: 16, features: 64 .of 1 images.*`low_res_pixel_values`"):
        model(**inputs)
    assert model(**inputs, low_res_pixel_values=torch.randn(1, 3, 56, 56)).logits.isfinite().all()


@pytest.mark.parametrize("auto_class", [AutoModel, LlavaHrVisionModel])
@pytest.mark.parametrize("source", ["tower", "whole"])
def test_the_vision_tower_alone(tmp_path, auto_class, source):
    """Saved by itself or taken from a whole model, with every setting that the ViT's configuration does not have."""
    model = make_model(fusion="concat", mr_adapter_gate="channel", mr_adapter_layers=[2], low_res_size=84)
    tower, pixel_values = model.model.vision_tower, make_inputs(1)["pixel_values"]
    (tower if source == "tower" else model).save_pretrained(tmp_path)
    loaded, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    if source == "whole" and auto_class is AutoModel:
        loaded = loaded.vision_tower
    assert not info["missing_keys"]
    assert not [key for key in info["unexpected_keys"] if "vision_tower" in key]
    with torch.no_grad():
        for output, expected in zip(loaded(pixel_values).values(), tower(pixel_values).values(), strict=True):
            torch.testing.assert_close(output, expected, atol=0, rtol=0)
    for name in ("fusion", "mr_adapter_gate", "mr_adapter_layers", "low_res_size"):
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_contradicting_inputs_are_named():
    model, inputs = make_model(), make_inputs(1)
    features = model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="both `pixel_values` and `mm_encoder_outputs`"):
        model(**inputs, mm_encoder_outputs={"image": features})
    with pytest.raises(ValueError, match="Exactly one"):
        model()


# torch 2.11 warns about itself while it traces flex attention's mask
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_agree_and_reach_both_transformers(tmp_path, attention):
    model, inputs = make_model(), make_inputs(1, 0, 2)
    model.save_pretrained(tmp_path)
    loaded = LlavaHrForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    vision_layer, text_layer = loaded.model.vision_tower.layers[0], loaded.model.language_model.layers[0]
    assert vision_layer.self_attn.config._attn_implementation == attention
    assert text_layer.self_attn.config._attn_implementation == attention
    with torch.no_grad():
        kept = inputs["attention_mask"].bool()
        torch.testing.assert_close(loaded(**inputs).logits[kept], model(**inputs).logits[kept], atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs a CUDA device and the package flash-attn")
def test_flash_attention(tmp_path):
    model, inputs = make_model(), make_inputs(1, 0, 2)
    model.save_pretrained(tmp_path)
    kwargs = {"dtype": torch.bfloat16, "device_map": "cuda"}
    flash = LlavaHrForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="flash_attention_2", **kwargs
    )
    sdpa = LlavaHrForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa", **kwargs)
    inputs = {name: value.to("cuda") for name, value in inputs.items()}
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():  # bfloat16 has 8 bits of mantissa
        torch.testing.assert_close(flash(**inputs).logits[kept], sdpa(**inputs).logits[kept], atol=0.1, rtol=0.05)


@pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="torch 2.11 does not trace `torch_compilable_check` of transformers 5.24, in its own LLaVA either",
)
def test_compiles_as_one_graph():
    model, inputs = make_model(), make_inputs(1, 1)
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_reaches_both_towers_and_keeps_gradients():
    inputs = make_inputs(1, 2)
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            tower = model.model.vision_tower
            assert tower.high_res_tower.gradient_checkpointing
            assert all(stage.grad_checkpointing for stage in tower.high_res_tower.timm_model.stages)
            assert all(layer.gradient_checkpointing for layer in [*tower.layers, *tower.mr_adapters])
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    model.gradient_checkpointing_disable()
    assert not model.model.vision_tower.high_res_tower.timm_model.stages[0].grad_checkpointing


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(tmp_path, where):
    model, inputs = make_model(), make_inputs(1, 2)
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    device_map = {
        "model.vision_tower.embeddings": where,
        "model.vision_tower.high_res_tower": where,
        "model.vision_tower.pre_layernorm": "cpu",
        "model.vision_tower.layers": where,
        "model.vision_tower.mr_adapters": where,
        "model.vision_tower.fusion": "cpu",
        "model.multi_modal_projector": where,
        "model.language_model": where,
        "lm_head": "cpu",
    }
    loaded = LlavaHrForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    if where == "disk":
        assert loaded.model.vision_tower.embeddings.position_embedding.weight.device.type == "meta"
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


ADAPTER, CONVNEXT, TOWER = "LlavaHrMixtureOfResolutionAdapter", "ConvNeXtBlock", "LlavaHrHighResVisionModel"
SIGLIP = SiglipVisionConfig(**VIT_SIZES)
RESNET = TimmWrapperConfig(architecture="resnet18", do_pooling=False, model_args={"channels": [8, 16, 24, 32]})
QWEN = Qwen2Config(**TEXT_SIZES, vocab_size=128, pad_token_id=0)


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({}, {"LlamaDecoderLayer", "CLIPEncoderLayer", CONVNEXT, ADAPTER}),
        ({"mr_adapter_layers": []}, {"LlamaDecoderLayer", "CLIPEncoderLayer", CONVNEXT}),
        ({"vision_config": SIGLIP}, {"LlamaDecoderLayer", "SiglipEncoderLayer", CONVNEXT, ADAPTER}),
        ({"high_res_vision_config": RESNET}, {"LlamaDecoderLayer", "CLIPEncoderLayer", TOWER, ADAPTER}),
        ({"text_config": QWEN}, {"Qwen2DecoderLayer", "CLIPEncoderLayer", CONVNEXT, ADAPTER}),
    ],
)
def test_the_blocks_that_stay_whole_are_those_of_the_model(options, blocks):
    """FSDP refuses a name that no module has; a block without its name would be split between devices."""
    model = make_model(**options)
    assert set(model._no_split_modules) == blocks | {"LlavaHrVisionEmbeddings"}
    policy = fsdp2_prepare_auto_wrap_policy(
        FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap"), model
    )
    assert {type(module).__name__ for module in model.modules() if policy(module)} == set(model._no_split_modules)


def test_batch_norms_keep_their_statistics_in_training():
    """A batch of text alone brings one image whose map has one position: no statistics to train with."""
    model = make_model(high_res_vision_config=RESNET).train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    assert buffers
    inputs = make_inputs(1)
    inputs["pixel_values"] = inputs["pixel_values"][..., :32, :32]
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, buffer in model.named_buffers():
        if name in buffers:
            torch.testing.assert_close(buffer, buffers[name], atol=0, rtol=0, msg=name)
    assert model.model.vision_tower.high_res_tower.timm_model.bn1.bias.grad.abs().sum() > 0


def test_cnns_of_other_families_see():
    with torch.no_grad():
        outputs = make_model(high_res_vision_config=RESNET)(**make_inputs(1))
    assert outputs.image_outputs.high_res_features.shape == (1, 32, 4, 4)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_architectures_without_a_feature_map_are_refused(architecture):
    config = TimmWrapperConfig(architecture=architecture, do_pooling=False)
    with pytest.raises(ValueError, match=f"architecture.*{architecture}"):
        LlavaHrForConditionalGeneration(make_config(high_res_vision_config=config))


def test_siglip_as_low_resolution_pathway():
    model = make_model(vision_config=SIGLIP)
    assert model.model.vision_tower.embeddings.patch_embedding.bias is not None
    with torch.no_grad():
        assert model(**make_inputs(1)).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_other_language_models_and_tied_embeddings(tmp_path, family):
    sizes = {**TEXT_SIZES, "num_key_value_heads": 2}
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
    text_config = {"model_type": family, "vocab_size": 128, "tie_word_embeddings": True, **sizes}
    model = LlavaHrForConditionalGeneration(make_config(text_config=text_config)).eval()
    model.save_pretrained(tmp_path)
    loaded = LlavaHrForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = make_inputs(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    tokens = loaded.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_loss_ignores_masked_labels():
    model, inputs = make_model(), make_inputs(1)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with torch.no_grad():
        outputs = model(**inputs, labels=labels)
    expected = F.cross_entropy(outputs.logits[0, -4:-1], inputs["input_ids"][0, -3:])
    torch.testing.assert_close(outputs.loss, expected)


def test_many_images_go_through_the_high_resolution_tower_in_chunks(monkeypatch):
    """Bounded memory, the same features, and one pass where the tower is trained."""
    model, inputs = make_model(), make_inputs(2, 3)
    pixel_values = inputs["pixel_values"]
    sizes = []
    model.model.vision_tower.high_res_tower.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        whole = model.get_image_features(pixel_values)
        monkeypatch.setitem(modeling._MAX_HIGH_RES_PIXELS, "cpu", 2 * pixel_values.shape[-1] ** 2)
        chunked = model.get_image_features(pixel_values)
    with_gradients = model.get_image_features(pixel_values)
    model.model.vision_tower.high_res_tower.requires_grad_(False)
    frozen = model.get_image_features(pixel_values)
    assert sizes == [5, 2, 2, 1, 5, 2, 2, 1] and frozen.pooler_output.requires_grad
    # convolutions may sum in another order for another batch size
    torch.testing.assert_close(chunked.high_res_features, whole.high_res_features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked.pooler_output, with_gradients.pooler_output, rtol=1e-5, atol=1e-5)
