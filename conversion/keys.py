# SPDX-License-Identifier: Apache-2.0
"""Tables from the tensor names of other formats to those of [`LlavaHrForConditionalGeneration`]."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Key(NamedTuple):
    """
    One row of a table.

    Args:
        pattern (`str`): Regular expression for the whole name in the source.
        name (`str`, *optional*): Template of the name in the model; `None` if the tensor is deliberately dropped.
        reason (`str`): Why a tensor is dropped.
        change (`Callable`, *optional*): Applied to the tensor.
    """

    pattern: str
    name: str | None = None
    reason: str = ""
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def look_up(source: str, keys: Sequence[Key]) -> tuple[Key | None, str | None]:
    """The first row that matches a name, and the name in the model; `None` twice if no row does."""
    for key in keys:
        if match := re.fullmatch(key.pattern, source):
            return key, None if key.name is None else match.expand(key.name)
    return None, None


def _squeeze(weight: torch.Tensor) -> torch.Tensor:
    """`(out, in, 1, 1)` of a 1x1 convolution -> `(out, in)`; any other shape stays, and fails the check of shapes."""
    return weight.flatten(1) if weight.shape[2:] == (1, 1) else weight


def _without_class_row(positions: torch.Tensor) -> torch.Tensor:
    """`(1 + patches, d)` -> `(patches, d)`: the model has no class token."""
    return positions[1:] if positions.ndim == 2 else positions


TOWER = "model.vision_tower."
TIMM_PREFIX = TOWER + "high_res_tower.timm_model."
# Embeddings and output layer of the language model, which grow by the image token
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
# Weights that no pretrained part has. A stage-1 checkpoint has the first two.
PROJECTOR_AND_FUSION = ("model.multi_modal_projector.", TOWER + "fusion.")
NEW_WEIGHTS = (*PROJECTOR_AND_FUSION, TOWER + "mr_adapters.")

# ViTs of transformers
_POSITIONS = r"embeddings\.position_embedding\.weight"
_VIT_KEYS = (
    Key(r"embeddings\.patch_embedding\.(weight|bias)", TOWER + r"embeddings.patch_embedding.\1"),
    Key(r"pre_layrnorm\.(weight|bias)", TOWER + r"pre_layernorm.\1"),
    Key(r"encoder\.(layers\.\d+\..+)", TOWER + r"\1"),
    Key(r"embeddings\.class_embedding", reason="the class token is not used"),
    Key(r"embeddings\.position_ids", reason="computed"),
    Key(r"post_layernorm\.(weight|bias)", reason="the features are taken before the last norm"),
)
CLIP_KEYS = (
    Key(_POSITIONS, TOWER + "embeddings.position_embedding.weight", change=_without_class_row),
    *_VIT_KEYS,
)
SIGLIP_KEYS = (
    Key(_POSITIONS, TOWER + "embeddings.position_embedding.weight"),  # there is no class token
    *_VIT_KEYS,
    Key(r"head\..+", reason="the features are taken before the pooling head"),
)

# CNNs: weights of open_clip's complete models, of timm's and of transformers' timm wrapper
CNN_KEYS = (
    Key(r"(?:visual\.trunk\.|timm_model\.)?(?:head|fc|classifier)\..+", reason="the feature map is taken before it"),
    Key(r"visual\.head\..+", reason="the feature map is taken before it"),
    Key(r"(?:transformer|token_embedding|ln_final|text)\..+", reason="CLIP's text model"),
    Key(r"positional_embedding|text_projection|logit_scale|logit_bias", reason="CLIP's text model"),
    Key(r"(?:visual\.trunk\.|timm_model\.)?(.+)", TIMM_PREFIX + r"\1"),
)

# The released LLaVA-HR code
_VIT = r"model\.vision_tower\.fast_vision_tower\.vision_tower\.vision_model\."
_CNN = r"model\.vision_tower\.slow_vision_tower\.vision_tower\."
_ADAPTER = r"model\.vision_tower\.align_stages_latent\.(\d+)\."
# stage 1 writes its names with or without "model."
_FUSION = r"(?:model\.)?vision_tower\.align_stages\.0\."
_PROJECTOR = r"(?:model\.)?mm_projector\."
_MRA = TOWER + r"mr_adapters.\1."
LLAMA_KEYS = (
    Key(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", reason="computed"),
    Key(r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    Key(r"lm_head\.weight", "lm_head.weight"),
)
ORIGINAL_KEYS = (
    *LLAMA_KEYS,
    Key(_PROJECTOR + r"0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    Key(_PROJECTOR + r"2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    Key(_FUSION + r"fast_proj\.(weight|bias)", TOWER + r"fusion.low_res_proj.\1"),
    Key(_FUSION + r"slow_proj\.(weight|bias)", TOWER + r"fusion.high_res_proj.\1"),
    Key(_ADAPTER + r"fast_conv\.(weight|bias)", _MRA + r"low_res_mapping.depthwise.\2"),
    Key(
        _ADAPTER + r"fast_proj\.(weight|bias)",
        _MRA + r"low_res_mapping.pointwise.\2",
        "",
        _squeeze,
    ),
    Key(_ADAPTER + r"slow_conv\.(weight|bias)", _MRA + r"high_res_mapping.fc1.\2", "", _squeeze),
    Key(_ADAPTER + r"slow_proj\.(weight|bias)", _MRA + r"high_res_mapping.fc2.\2", "", _squeeze),
    Key(_ADAPTER + r"gate\.0\.(weight|bias)", _MRA + r"gate.fc1.\2"),
    Key(_ADAPTER + r"gate\.2\.(weight|bias)", _MRA + r"gate.fc2.\2"),
    Key(_CNN + r"stages\.(\d+)\.blocks\.(\d+)\.weight", TIMM_PREFIX + r"stages.\1.blocks.\2.gamma"),
    Key(_CNN + r"((?:stem|stages)\..+)", TIMM_PREFIX + r"\1"),
    Key(_CNN + r"head\..+", reason="the feature map is taken before the classifier"),
    *(key._replace(pattern=_VIT + key.pattern) for key in CLIP_KEYS),
)
