# SPDX-License-Identifier: Apache-2.0
"""
The models that the benchmarks compare: LLaVA-HR, LLaVA-1.5 with the same ViT and language model, and the towers of two
rivals. Weights are random and made in memory: speed does not depend on them.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    DeepseekVLHybridConfig,
    FastVlmConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    SamVisionConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
)

from modeling_llava_hr import LlavaHrConfig


@dataclass(frozen=True)
class Shapes:
    """
    Sizes of the models of a preset, as arguments of transformers' configurations.

    Args:
        text (`dict`): Language model, `LlamaConfig`; its last token id stands for image features.
        vision (`dict`): ViT of LLaVA-HR and LLaVA-1.5, `CLIPVisionConfig`.
        high_res (`dict`): ConvNeXt of LLaVA-HR, `TimmWrapperConfig`.
        siglip (`dict`): Low-resolution tower of DeepSeek-VL-hybrid, `SiglipVisionConfig`.
        sam (`dict`): Its high-resolution tower, `SamVisionConfig`.
        fastvit (`dict`): Tower of FastVLM, `TimmWrapperConfig`.
        distinct_layers (`int`, *optional*): Layers of the language model that have weights of their own; the others
            share theirs in turn, to save memory.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    high_res: dict[str, Any]
    siglip: dict[str, Any]
    sam: dict[str, Any]
    fastvit: dict[str, Any]
    distinct_layers: int | None = None

    @property
    def image_token_id(self) -> int:
        return self.text["vocab_size"] - 1


def _vit(width: int, layers: int, heads: int, **kwargs) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": 4 * width, **kwargs}


SHAPES = {
    # Vicuna-7B, CLIP ViT-L/14-336, CLIP-ConvNeXt-L; the rivals as published (DeepSeek-VL-7B, FastVLM-7B), projected to
    # the width of the same language model.
    "full": Shapes(
        text={"vocab_size": 32064, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
        vision=_vit(1024, 24, 16, image_size=336, patch_size=14),
        high_res={"architecture": "convnext_large_mlp", "do_pooling": False},
        siglip=_vit(1024, 24, 16, image_size=384, patch_size=16, vision_use_head=False),
        sam={
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "global_attn_indexes": [2, 5, 8, 11],
        },
        fastvit={
            "architecture": "fastvit_mci3",
            "do_pooling": False,
            "hidden_size": 3072,
            "model_args": {"inference_mode": True},
        },
    ),
    # Two cores, minutes. FLOPs of ViT, ConvNeXt and language model stand to each other about as in 7B at 1024 px (5, 9
    # and 86 of 100). Language model: width x 3/16, layers / 8; vocabulary in proportion. ViTs: width x 3/16, layers /
    # 6 (SAM / 4, so that a third of its layers still attends to the whole image). CNNs: width / 8, layers / 3.
    "cpu": Shapes(
        text={
            "vocab_size": 1024,
            "hidden_size": 768,
            "intermediate_size": 2064,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
        },
        vision=_vit(192, 4, 3, image_size=336, patch_size=14),
        high_res={
            "architecture": "convnext_large_mlp",
            "do_pooling": False,
            "model_args": {"depths": [1, 1, 9, 1], "dims": [24, 48, 96, 192]},
        },
        siglip=_vit(192, 4, 3, image_size=384, patch_size=16, vision_use_head=False),
        sam={
            "hidden_size": 144,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "global_attn_indexes": [2],
            "output_channels": 48,
        },
        fastvit={
            "architecture": "fastvit_mci3",
            "do_pooling": False,
            "hidden_size": 384,
            "model_args": {"inference_mode": True, "layers": [1, 4, 8, 1, 1], "embed_dims": [12, 24, 48, 96, 192]},
        },
    ),
}

# The real shapes, with 5 GB of memory instead of 15. Four layers in bfloat16 are 1.6 GB, more than a cache holds: each
# layer's weights come from memory, as they would if all 32 differed.
SHAPES["7b-cpu"] = dataclasses.replace(SHAPES["full"], distinct_layers=4)

# Side of the high-resolution view -> side of the low-resolution view, in pixels (section 4.1 of the paper)
LLAVA_HR_SIDES = {384: 336, 768: 336, 1024: 448, 1536: 672}
# The sides at which LLaVA-1.5 has as many visual tokens, and the one that sees as much as LLaVA-HR at 1024 px
LLAVA_SIDES = (336, 448, 672, 1022)


@dataclass(frozen=True)
class Contender:
    """
    A model at a resolution.

    Args:
        model ([`PreTrainedModel`]): The model; several contenders may share it, or its language model.
        sides (`dict[str, int]`): Side in pixels of each view, by its name among the model's inputs.
        num_image_tokens (`int`): Tokens of an image in the prompt.
    """

    model: PreTrainedModel
    sides: dict[str, int]
    num_image_tokens: int

    def make_pixels(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Random views `(batch_size, 3, side, side)`, by name."""
        shape = {"device": self.model.device, "dtype": self.model.dtype}
        return {name: torch.randn(batch_size, 3, side, side, **shape) for name, side in self.sides.items()}

    def make_inputs(self, batch_size: int, text_tokens: int) -> dict[str, torch.Tensor]:
        """A batch of prompts, each with one image and then `text_tokens` random tokens: arguments of `forward`."""
        config, device = self.model.config, self.model.device
        image = torch.full((batch_size, self.num_image_tokens), config.image_token_id, device=device)
        text = torch.randint(1, config.image_token_id, (batch_size, text_tokens), device=device)
        input_ids = torch.cat([image, text], dim=1)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **self.make_pixels(batch_size)}


def make_llava_hr(
    shapes: Shapes, device: str, dtype: torch.dtype, mr_adapters: bool = True, sides: dict[int, int] | None = None
) -> dict[str, Contender]:
    """
    LLaVA-HR, one model at several resolutions.

    Args:
        shapes ([`Shapes`]): Its sizes.
        device (`str`): Where it is made; `"meta"` for counting alone.
        dtype (`torch.dtype`): Of its weights.
        mr_adapters (`bool`): Whether it has MR-Adapters (not in stage 1 of training).
        sides (`dict[int, int]`, *optional*): Sides of high-resolution views, each with that of the low-resolution
            view; [`LLAVA_HR_SIDES`] by default.

    Returns:
        `dict[str, Contender]`: By names like `llava-hr-1024`.
    """
    config = LlavaHrConfig(
        vision_config=CLIPVisionConfig(**shapes.vision),
        high_res_vision_config=TimmWrapperConfig(**shapes.high_res),
        text_config=LlamaConfig(**shapes.text),
        image_token_id=shapes.image_token_id,
        mr_adapter_layers=None if mr_adapters else [],
    )
    model = _make(AutoModelForImageTextToText, config, device, dtype, shapes.distinct_layers)
    return {
        f"llava-hr-{high}": Contender(
            model, {"pixel_values": high, "low_res_pixel_values": low}, (low // shapes.vision["patch_size"]) ** 2
        )
        for high, low in (sides or LLAVA_HR_SIDES).items()
    }


def make_llava(
    shapes: Shapes,
    device: str,
    dtype: torch.dtype,
    sides: tuple[int, ...] = LLAVA_SIDES,
    source: PreTrainedModel | None = None,
) -> dict[str, Contender]:
    """
    LLaVA-1.5 with a ViT made for each resolution (its position embeddings fit) and one language model.

    Args:
        shapes ([`Shapes`]): Its sizes.
        device (`str`): Where it is made; `"meta"` for counting alone.
        dtype (`torch.dtype`): Of its weights.
        sides (`tuple[int]`): Sides of the view in pixels.
        source ([`PreTrainedModel`], *optional*): Model whose language model is shared; made here by default.

    Returns:
        `dict[str, Contender]`: By names like `llava-1.5-336`.
    """
    contenders = {}
    for side in sides:
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**{**shapes.vision, "image_size": side}),
            text_config=LlamaConfig(**shapes.text) if source is None else _stub(shapes),
            image_token_id=shapes.image_token_id,
        )
        model = _make(AutoModelForImageTextToText, config, device, dtype, shapes.distinct_layers)
        source = source or model
        num_tokens = (side // shapes.vision["patch_size"]) ** 2
        contenders[f"llava-1.5-{side}"] = Contender(model, {"pixel_values": side}, num_tokens)
    share_language_model(contenders, source)
    return contenders


def make_contender(shapes: Shapes, name: str, device: str, dtype: torch.dtype, mr_adapters: bool = True) -> Contender:
    """One contender of [`make_llava_hr`] or [`make_llava`] by its name, with a model of its own."""
    family, side = name.rsplit("-", 1)
    if family == "llava-hr":
        sides = {int(side): LLAVA_HR_SIDES[int(side)]}
        return make_llava_hr(shapes, device, dtype, mr_adapters, sides)[name]
    return make_llava(shapes, device, dtype, (int(side),))[name]


def make_rivals(shapes: Shapes, device: str, dtype: torch.dtype) -> dict[str, Contender]:
    """
    The towers of two other models of transformers at 1024 px: DeepSeek-VL-hybrid (SigLIP and SAM) and FastVLM. Their
    language models are stubs of the right width: call `get_image_features` alone.

    Args:
        shapes ([`Shapes`]): Their sizes.
        device (`str`): Where they are made.
        dtype (`torch.dtype`): Of their weights.

    Returns:
        `dict[str, Contender]`: By name.
    """
    stub = _stub(shapes)
    deepseek = DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(**shapes.siglip),
        high_res_vision_config=SamVisionConfig(**shapes.sam),
        text_config=stub,
        image_token_id=shapes.image_token_id,
    )
    fast_vlm = FastVlmConfig(
        vision_config=TimmWrapperConfig(**shapes.fastvit), text_config=stub, image_token_id=shapes.image_token_id
    )
    low = shapes.siglip["image_size"]
    return {
        "deepseek-vl-hybrid-1024": Contender(
            _make(AutoModel, deepseek, device, dtype),
            {"pixel_values": low, "high_res_pixel_values": 1024},
            (low // shapes.siglip["patch_size"]) ** 2,
        ),
        "fastvlm-1024": Contender(
            _make(AutoModel, fast_vlm, device, dtype), {"pixel_values": 1024}, (1024 // 64) ** 2
        ),
    }


def share_language_model(contenders: dict[str, Contender], source: PreTrainedModel) -> None:
    """Replaces the contenders' language models by that of `source`, so that it is in memory once."""
    for contender in contenders.values():
        contender.model.model.language_model = source.model.language_model
        contender.model.lm_head = source.lm_head
        contender.model.config.text_config = source.config.text_config  # one switch of its attention implementation


def copy_contender(contender: Contender, source: PreTrainedModel) -> Contender:
    """A contender with the language model of `source` (shared) and copies of its own towers and projector."""
    model = contender.model
    shared = {
        id(model.model.language_model): source.model.language_model,
        id(model.lm_head): source.lm_head,
        id(model.config.text_config): source.config.text_config,
    }
    return dataclasses.replace(contender, model=copy.deepcopy(model, shared))


def compile_towers(contender: Contender) -> Contender:
    """A copy of a LLaVA-HR whose whole vision tower torch compiles at its first call, with CUDA graphs on a GPU."""
    compiled = copy_contender(contender, contender.model)
    compiled.model.model.vision_tower.compile(mode="reduce-overhead", dynamic=False)
    return compiled


def make_4bit_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The language model's layers in 4 bits (NF4) as a user loads them, computing in `dtype`, in either family."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )


def get_weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters and buffers, and of the scales of its 4-bit weights, in bytes."""
    return sum(tensor.nbytes for tensor in {**dict(model.named_buffers()), **model.state_dict()}.values())


def _stub(shapes: Shapes) -> LlamaConfig:
    """A language model of the right width that is small otherwise, to be replaced or not to be called."""
    return LlamaConfig(**{**shapes.text, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64})


def _make(
    auto_class: type, config, device: str, dtype: torch.dtype, distinct_layers: int | None = None
) -> PreTrainedModel:
    """A model with random weights. Layers of its language model are copies of the first: initializing 7B is slow."""
    num_layers, config.text_config.num_hidden_layers = config.text_config.num_hidden_layers, 1
    with torch.device(device):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    layers = model.get_decoder().layers
    for index in range(1, num_layers):
        is_shared = distinct_layers is not None and index >= distinct_layers
        source = layers[index % distinct_layers if is_shared else 0]
        layer = copy.deepcopy(source, {id(p): p for p in source.parameters()} if is_shared else {})
        layer.self_attn.layer_idx = index
        layers.append(layer)
    for text_config in (model.config.text_config, model.get_decoder().config):
        text_config.num_hidden_layers = num_layers
    return model
