# SPDX-License-Identifier: Apache-2.0
"""
The models that the benchmarks compare: LLaVA-HR, and LLaVA-1.5 with the same ViT and language model. Weights are
random and made in memory: speed does not depend on them.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from modeling_llava_hr import LlavaHrConfig, get_unpadded_cells


@dataclass(frozen=True)
class Shapes:
    """Sizes of the models of a preset, as arguments of transformers' configurations."""

    text: dict[str, Any]  # language model, `LlamaConfig`; its last token id is the image token
    vision: dict[str, Any]  # ViT, `CLIPVisionConfig`
    high_res: dict[str, Any]  # ConvNeXt of LLaVA-HR, `TimmWrapperConfig`
    # number of language-model layers with distinct weights, which the others share in turn to save memory
    distinct_layers: int | None = None

    @property
    def image_token_id(self) -> int:
        return self.text["vocab_size"] - 1


def _transformer(width: int, layers: int, heads: int, inner: int, **kwargs) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": inner, **kwargs}


_LLAMA = {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
_CLIP = {"image_size": 336, "patch_size": 14}
_CONVNEXT = {"architecture": "convnext_large_mlp", "do_pooling": False}
SHAPES = {
    # Vicuna-7B, CLIP ViT-L/14-336, CLIP-ConvNeXt-L
    "full": Shapes(
        text=_transformer(4096, 32, 32, 11008, vocab_size=32064, **_LLAMA),
        vision=_transformer(1024, 24, 16, 4096, **_CLIP),
        high_res=_CONVNEXT,
    ),
    # Two cores, minutes. ViT, ConvNeXt and language model have about the same shares of the FLOPs as in 7B at 1024 px
    # (5, 9 and 86 of 100). Language model: width x 3/16, layers / 8; vocabulary in proportion. ViT: width x 3/16,
    # layers / 6. ConvNeXt: width / 8, layers / 3.
    "cpu": Shapes(
        text=_transformer(768, 4, 6, 2064, vocab_size=1024, **_LLAMA),
        vision=_transformer(192, 4, 3, 768, **_CLIP),
        high_res={**_CONVNEXT, "model_args": {"depths": [1, 1, 9, 1], "dims": [24, 48, 96, 192]}},
    ),
}
# The real shapes, with 5 GB of memory instead of 15. Four layers in bfloat16 are 1.6 GB, more than a cache holds: each
# layer's weights come from memory, as they would if all 32 differed.
SHAPES["7b-cpu"] = dataclasses.replace(SHAPES["full"], distinct_layers=4)

# Tokens of a prompt without its image
PROMPT_TOKENS = 50
# Side of the high-resolution view -> side of the low-resolution view, in pixels (section 4.1 of the paper)
LLAVA_HR_SIDES = {384: 336, 768: 336, 1024: 448, 1536: 672}
# The sides at which LLaVA-1.5 has as many visual tokens, and the one that sees as much as LLaVA-HR at 1024 px
LLAVA_SIDES = (336, 448, 672, 1022)
CONTENDERS = (*(f"llava-hr-{side}" for side in LLAVA_HR_SIDES), *(f"llava-1.5-{side}" for side in LLAVA_SIDES))
# Sizes of a language model that is replaced afterwards
_STUB = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64}


@dataclass(frozen=True)
class Contender:
    """A model at a resolution."""

    model: PreTrainedModel  # several contenders may share it, or its language model
    sides: dict[str, int]  # in pixels, of each view by its name among the model's inputs
    num_image_tokens: int
    image_size: tuple[int, int] | None = None  # height and width in pixels, if the padding's tokens are dropped

    def make_pixels(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Random views `(batch_size, 3, side, side)` by name, and `image_sizes` where padding is dropped."""
        shape = {"device": self.model.device, "dtype": self.model.dtype}
        pixels = {name: torch.randn(batch_size, 3, side, side, **shape) for name, side in self.sides.items()}
        if self.image_size is not None:
            pixels["image_sizes"] = torch.tensor([self.image_size] * batch_size)
        return pixels

    def make_inputs(self, batch_size: int, text_tokens: int = PROMPT_TOKENS) -> dict[str, torch.Tensor]:
        """A batch of prompts, each with one image and then `text_tokens` random tokens: arguments of `forward`."""
        config, device = self.model.config, self.model.device
        image = torch.full((batch_size, self.num_image_tokens), config.image_token_id, device=device)
        text = torch.randint(1, config.image_token_id, (batch_size, text_tokens), device=device)
        input_ids = torch.cat([image, text], dim=1)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **self.make_pixels(batch_size)}


def make_contenders(
    shapes: Shapes, names: Iterable[str], device: str, dtype: torch.dtype, mr_adapters: bool = True
) -> dict[str, Contender]:
    """
    LLaVA-HR, one model at several resolutions, and LLaVA-1.5 with a ViT made for each resolution (its position
    embeddings fit). All share one language model.

    Args:
        shapes ([`Shapes`]): Their sizes.
        names (`Iterable[str]`): Some of `CONTENDERS`; `"llava-hr-1024-16:9"` is one whose images have that shape
            (width and height) and whose padding is dropped.
        device (`str`): Where they are made; `"meta"` for counting alone.
        dtype (`torch.dtype`): Of their weights.
        mr_adapters (`bool`): Whether LLaVA-HR has MR-Adapters (not in stage 1 of training).

    Returns:
        `dict[str, Contender]`: By name.
    """
    contenders: dict[str, Contender] = {}
    llava_hr = first = None
    for name in names:
        family, side, *shape = name.split("-")[1:]
        side = int(side)
        common = {"image_token_id": shapes.image_token_id}
        # the first model's language model replaces that of the others
        common["text_config"] = LlamaConfig(**shapes.text if first is None else {**shapes.text, **_STUB})
        if family == "hr":
            if llava_hr is None:
                config = LlavaHrConfig(
                    vision_config=CLIPVisionConfig(**shapes.vision),
                    high_res_vision_config=TimmWrapperConfig(**shapes.high_res),
                    mr_adapter_layers=None if mr_adapters else [],
                    **common,
                )
                llava_hr = _make(config, device, dtype, shapes.distinct_layers)
            model, sides = llava_hr, {"pixel_values": side, "low_res_pixel_values": LLAVA_HR_SIDES[side]}
        else:
            vision_config = CLIPVisionConfig(**{**shapes.vision, "image_size": side})
            config = LlavaConfig(vision_config=vision_config, **common)
            model, sides = _make(config, device, dtype, shapes.distinct_layers), {"pixel_values": side}
        first = first or model
        model.model.language_model, model.lm_head = first.model.language_model, first.lm_head
        model.config.text_config = first.config.text_config  # so that one switch sets its attention implementation
        grid = min(sides.values()) // shapes.vision["patch_size"]
        num_tokens, image_size = grid**2, None
        if shape:
            width, height = (float(length) for length in shape[0].split(":"))
            image_size = tuple(max(1, round(length / max(width, height) * side)) for length in (height, width))
            rows, columns = get_unpadded_cells(*image_size, grid)
            num_tokens = (rows.stop - rows.start) * (columns.stop - columns.start)
        contenders[name] = Contender(model, sides, num_tokens, image_size)
    return contenders


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


def get_weight_bytes(model: nn.Module) -> int:
    """Memory of a model's parameters and buffers, and of the scales of its 4-bit weights, in bytes."""
    return sum(tensor.nbytes for tensor in {**dict(model.named_buffers()), **model.state_dict()}.values())


@torch.no_grad()
def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of a call with tensors on the meta device, counted by torch; attention counts without its causal mask."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _make(config: PreTrainedConfig, device: str, dtype: torch.dtype, distinct_layers: int | None) -> PreTrainedModel:
    """A model with random weights. Layers of its language model are copies of the first: initializing 7B is slow."""
    num_layers, config.text_config.num_hidden_layers = config.text_config.num_hidden_layers, 1
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    layers = model.get_decoder().layers
    attention_config = layers[0].self_attn.config
    for index in range(1, num_layers):
        is_shared = distinct_layers is not None and index >= distinct_layers
        source = layers[index % distinct_layers if is_shared else 0]
        shared = {
            id(attention_config): attention_config
        }  # so that a switch of the attention implementation reaches every layer
        if is_shared:
            shared |= {id(parameter): parameter for parameter in source.parameters()}
        layer = copy.deepcopy(source, shared)
        layer.self_attn.layer_idx = index
        layers.append(layer)
    for text_config in (model.config.text_config, model.get_decoder().config):
        text_config.num_hidden_layers = num_layers
    return model
