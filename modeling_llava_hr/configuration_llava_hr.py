# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""LLaVA-HR configuration."""

import math
import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PreTrainedConfig, TimmWrapperConfig
from transformers.activations import ACT2FN


# What a saved config.json says about the code next to it. `save_pretrained` of a model only registers that model's own
# class; vLLM, TRL and others need the base model as well.
AUTO_MAP = {
    "AutoConfig": "configuration_llava_hr.LlavaHrConfig",
    "AutoModel": "modeling_llava_hr.LlavaHrModel",
    "AutoModelForImageTextToText": "modeling_llava_hr.LlavaHrForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_llava_hr.LlavaHrForConditionalGeneration",
}
VISION_AUTO_MAP = {
    "AutoConfig": "configuration_llava_hr.LlavaHrVisionConfig",
    "AutoModel": "modeling_llava_hr_vision.LlavaHrVisionModel",
}

SUPPORTED_VISION_MODEL_TYPES = ("clip_vision_model", "siglip_vision_model")

_CHOICES = {
    "mr_adapter_gate": ("scalar", "channel"),
    "mr_adapter_gate_act": ("tanh", "sigmoid", "hard_sigmoid"),
    "mr_adapter_low_res_mapping": ("conv", "mlp"),
    "mr_adapter_high_res_mapping": ("conv", "mlp"),
    "fusion": ("sum", "concat"),
}

# Upper bounds of sizes, each many times that of any existing model. Without them a config.json of a few bytes could
# take hours and all memory before the first weight is compared with it.
_LARGEST = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "vocab_size": 2**23,
    "max_position_embeddings": 2**27,
    "num_channels": 2**5,
    "image_size": 2**14,
    "patch_size": 2**8,
}
# RoPE types whose factor extends `max_position_embeddings`; for the others that field is the extended length
_STRETCHING_ROPE_TYPES = ("linear", "dynamic", "yarn")
# Arguments that make timm read a file or the network. A configuration says what to build, not what to load.
_TIMM_SOURCES = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


def get_low_res_size(
    size: int,
    low_res_size: int | None = None,
    *,
    patch_size: int = 14,
    stride: int = 32,
    min_low_res_size: int = 336,
) -> int:
    """
    The rule for the sides of the two views (section 4.1 of the paper and the released code). By default the ViT's
    grid is as large as the high-resolution feature map, but not smaller than the grid that the ViT was trained with.

    Args:
        size (`int`): Side H of the image in pixels, as the high-resolution pathway sees it.
        low_res_size (`int`, *optional*): Side L of the low-resolution view in pixels if it does not follow the rule.
        patch_size (`int`): Side of a ViT patch in pixels.
        stride (`int`): Pixels of the image per position of the high-resolution feature map.
        min_low_res_size (`int`): Smallest side that the rule gives in pixels: the ViT's own image size.

    Returns:
        `int`: Side of the low-resolution view in pixels, e.g. 448 for 1024.

    Raises:
        ValueError: If a side does not consist of whole patches or strides, or the feature map can neither be enlarged
            nor pooled to the ViT's grid; the message names a pair that fits.
    """
    for name, value in (("size", size), ("patch_size", patch_size), ("high_res_stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive number of pixels, but got {value!r}.")
    grid = max(round(size / stride), 1)
    fits = f"`size={grid * stride}` with `low_res_size={max(grid, min_low_res_size // patch_size) * patch_size}` fits."
    if size % stride:
        raise ValueError(f"`size` ({size}) must be a positive multiple of `high_res_stride` ({stride}). {fits}")
    if low_res_size is None:
        low_res_size = max(grid * patch_size, min_low_res_size)
    low_res_grid = math.isqrt(get_num_image_tokens(low_res_size, patch_size))
    if grid > low_res_grid and grid % low_res_grid:
        raise ValueError(
            f"The feature map of an image with `size={size}` ({grid} x {grid}) cannot be pooled to the ViT's grid of "
            f"`low_res_size={low_res_size}` ({low_res_grid} x {low_res_grid}): it must be at most as large, or an "
            f"integer multiple of it. {fits}"
        )
    return low_res_size


def get_num_image_tokens(low_res_size: int, patch_size: int) -> int:
    """
    Number of language-model tokens of one image: one per ViT patch of the low-resolution view, no class token
    (section 4.1 of the paper).

    Args:
        low_res_size (`int`): Side of the square low-resolution view in pixels.
        patch_size (`int`): Side of a ViT patch in pixels.

    Returns:
        `int`: The number of tokens, e.g. 1024 for 448 pixels and patches of 14.

    Raises:
        ValueError: If `low_res_size` is not a positive multiple of `patch_size`.
    """
    if not isinstance(low_res_size, int) or low_res_size <= 0 or low_res_size % patch_size:
        raise ValueError(
            f"`low_res_size`, the side of the low-resolution view, must be a positive multiple of the patch size "
            f"{patch_size}, but got {low_res_size!r}."
        )
    return (low_res_size // patch_size) ** 2


def get_unpadded_cells(height: int, width: int, grid: int) -> tuple[slice, slice]:
    """
    The tokens that `unpad` keeps: those of all grid cells that show a part of the image, which is in the middle of the
    padded square.

    Args:
        height, width (`int`): Size of the image in pixels, before it is padded.
        grid (`int`): Side of the ViT's grid in patches.

    Returns:
        `tuple[slice, slice]`: Rows and columns of the grid, at least one of each.
    """
    side = max(height, width)
    starts = [(side - length) // 2 for length in (height, width)]
    rows, columns = (
        slice(start * grid // side, -(-(start + length) * grid // side))
        for start, length in zip(starts, (height, width), strict=True)
    )
    return rows, columns


def get_mr_adapter_layers(num_hidden_layers: int) -> list[int]:
    """
    Positions of the MR-Adapters: before the last three of four stages of the ViT (section 5.2).

    Args:
        num_hidden_layers (`int`): Layers of the ViT.

    Returns:
        `list[int]`: Indices of layers, e.g. `[6, 12, 18]` for 24. If four does not divide the number of layers, the
        stages differ by one layer.
    """
    return sorted({num_hidden_layers * stage // 4 for stage in (1, 2, 3)})


class LlavaHrVisionConfig(PreTrainedConfig):
    r"""
    Configuration of [`LlavaHrVisionModel`], the two vision pathways of LLaVA-HR with their adapters and fusion, which
    can be used and saved on their own. [`LlavaHrConfig`] has the same fields.

    Args:
        vision_config (`CLIPVisionConfig`, `SiglipVisionConfig` or `dict`, *optional*):
            The low-resolution pathway's ViT. Defaults to CLIP ViT-L/14-336.
        high_res_vision_config (`TimmWrapperConfig` or `dict`, *optional*):
            The high-resolution pathway: a CNN of timm by its name (`architecture`), with `model_args` for other depths
            and widths. Defaults to `convnext_large_mlp`.
        mr_adapter_layers (`list[int]`, *optional*):
            Indices of the ViT layers that are preceded by an MR-Adapter, ascending. Defaults to the starts of the last
            three of four equal stages (section 5.2), `[6, 12, 18]` of 24 layers. `[]` is a model after stage 1, whose
            two pathways meet only after the ViT.
        mr_adapter_gate (`str`, *optional*, defaults to `"scalar"`):
            `"scalar"` as released: one gate per image, computed from the low-resolution tokens with their residual.
            `"channel"` as equation 4 of the paper: one gate per channel, computed without the residual.
        mr_adapter_gate_act (`str`, *optional*, defaults to `"tanh"`):
            Gate function of table 3: `"tanh"`, `"sigmoid"` or `"hard_sigmoid"`.
        mr_adapter_low_res_mapping (`str`, *optional*, defaults to `"conv"`):
            f_l of equation 3: `"conv"` (depthwise 7x7, GELU, pointwise) or `"mlp"` (two linear layers).
        mr_adapter_high_res_mapping (`str`, *optional*, defaults to `"mlp"`):
            f_h of equation 3: `"mlp"` or `"conv"`.
        fusion (`str`, *optional*, defaults to `"sum"`):
            How an MR-Adapter joins the two mapped views: `"sum"` (equation 3) or `"concat"` (table 3), a linear layer
            over both, which is initialised as the sum.
        low_res_size (`int`, *optional*):
            Side of the low-resolution view in pixels, a multiple of the patch size. `None`, the default, is the
            released rule: as many patches as the high-resolution feature map has positions, but at least
            `vision_config.image_size` pixels. See [`get_low_res_size`].

    Raises:
        ValueError: If the values contradict each other; the message says what to change.
    """

    model_type = "llava_hr_vision"
    sub_configs = {"vision_config": AutoConfig, "high_res_vision_config": TimmWrapperConfig}
    # Not a field, so that it is not saved without the code. TRL reads it to find the model class.
    auto_map = VISION_AUTO_MAP
    _auto_class = "AutoConfig"

    vision_config: dict | PreTrainedConfig | None = None
    high_res_vision_config: dict | PreTrainedConfig | None = None
    mr_adapter_layers: list[int] | None = None
    mr_adapter_gate: str = "scalar"
    mr_adapter_gate_act: str = "tanh"
    mr_adapter_low_res_mapping: str = "conv"
    mr_adapter_high_res_mapping: str = "mlp"
    fusion: str = "sum"
    low_res_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                projection_dim=768,
            )
        elif isinstance(self.vision_config, dict):
            self.vision_config = _config_from_dict("vision_config", self.vision_config, "clip_vision_model")
        if self.high_res_vision_config is None:
            self.high_res_vision_config = TimmWrapperConfig(architecture="convnext_large_mlp", do_pooling=False)
        elif isinstance(self.high_res_vision_config, dict):
            self.high_res_vision_config = _config_from_dict(
                "high_res_vision_config", self.high_res_vision_config, "timm_wrapper"
            )
        if self.mr_adapter_layers is None:
            self.mr_adapter_layers = get_mr_adapter_layers(self.vision_config.num_hidden_layers)
        self._check_vision()
        super().__post_init__(**kwargs)

    def _check_vision(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {getattr(self, name)!r}.")

        vision, high_res = self.vision_config, self.high_res_vision_config
        if vision.model_type not in SUPPORTED_VISION_MODEL_TYPES:
            raise ValueError(
                f"`vision_config` must be of type {' or '.join(SUPPORTED_VISION_MODEL_TYPES)}, but got "
                f"{vision.model_type!r}. Take the vision part of a CLIP or SigLIP model."
            )
        if high_res.model_type != "timm_wrapper":
            raise ValueError(
                f"`high_res_vision_config` must be a TimmWrapperConfig, but got {high_res.model_type!r}. Name a CNN "
                'of timm, for example TimmWrapperConfig(architecture="convnext_large_mlp", do_pooling=False).'
            )
        check_sizes("vision_config", vision)
        _check_timm("high_res_vision_config", high_res)
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"`vision_config.image_size` ({vision.image_size}) must be a multiple of `vision_config.patch_size` "
                f"({vision.patch_size}): the position embeddings form a square grid with one entry per patch."
            )

        layers = list(self.mr_adapter_layers or [])
        if any(not isinstance(layer, int) or not 0 <= layer < vision.num_hidden_layers for layer in layers):
            raise ValueError(
                f"`mr_adapter_layers` are indices of the ViT layers that follow an adapter, from 0 to "
                f"{vision.num_hidden_layers - 1} (`vision_config.num_hidden_layers` - 1), but got {layers}."
            )
        if layers != sorted(set(layers)):
            raise ValueError(
                f"`mr_adapter_layers` must ascend and name each layer once, but got {layers}. "
                f"Use {sorted(set(layers))}."
            )
        if self.low_res_size is not None:
            get_num_image_tokens(self.low_res_size, vision.patch_size)

    # CLIP's layers look up the attention implementation in their own configuration, so that is where it is kept
    @property
    def _attn_implementation_internal(self) -> str | None:
        return self.vision_config._attn_implementation_internal

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        self.vision_config._attn_implementation_internal = value

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Like [`PreTrainedConfig.get_config_dict`]; takes the vision fields from a complete LLaVA-HR's."""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") == LlavaHrConfig.model_type and cls.model_type != LlavaHrConfig.model_type:
            names = {*LlavaHrVisionConfig.__annotations__, "dtype"} & set(values)
            values = {"model_type": cls.model_type, **{name: values[name] for name in names}}
        return values, kwargs

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Like [`PreTrainedConfig.save_pretrained`], with the complete `auto_map` beside a model's code."""
        auto_map = type(self).auto_map
        code = auto_map["AutoModel"].partition(".")[0] + ".py"
        has_model_code = os.path.isfile(os.path.join(save_directory, code))
        self.auto_map = dict(auto_map) if has_model_code else {"AutoConfig": auto_map["AutoConfig"]}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class LlavaHrConfig(LlavaHrVisionConfig):
    r"""
    Configuration of a [`LlavaHrForConditionalGeneration`] ("Mixture-of-Resolution Adaptation for Multimodal Large
    Language Models", arXiv 2403.03003). The defaults describe LLaVA-HR-7B as released; where paper and released code
    differ, the released behaviour is the default and the paper's formula is an option.

    Args:
        vision_config, high_res_vision_config, mr_adapter_layers, mr_adapter_gate, mr_adapter_gate_act, \
mr_adapter_low_res_mapping, mr_adapter_high_res_mapping, fusion, low_res_size:
            See [`LlavaHrVisionConfig`].
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Any attention-based causal language model of transformers. Defaults to Vicuna-7B v1.5 with an image token
            (vocabulary padded from 32001 to 32064 entries, a multiple of 64).
        image_token_id (`int`, *optional*, defaults to 32000):
            Id of the token that marks an image feature in the prompt; must be in the vocabulary.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's two linear layers.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether input and output embeddings share one tensor. Also true if `text_config` ties them.

    Raises:
        ValueError: If the values contradict each other; the message says what to change.

    Example:

    ```python
    >>> from transformers import LlamaConfig, TimmWrapperConfig
    >>> from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration

    >>> llava_hr_7b = LlavaHrConfig()

    >>> # LLaVA-HR-X-13B: a larger language model and a larger high-resolution pathway
    >>> llava_hr_x_13b = LlavaHrConfig(
    ...     high_res_vision_config=TimmWrapperConfig(architecture="convnext_xxlarge", do_pooling=False),
    ...     text_config=LlamaConfig(
    ...         vocab_size=32064,
    ...         hidden_size=5120,
    ...         intermediate_size=13824,
    ...         num_hidden_layers=40,
    ...         num_attention_heads=40,
    ...         max_position_embeddings=4096,
    ...         rms_norm_eps=1e-5,
    ...     ),
    ... )
    ```"""

    model_type = "llava_hr"
    sub_configs = {**LlavaHrVisionConfig.sub_configs, "text_config": AutoConfig}
    auto_map = AUTO_MAP
    _attn_implementation_internal = None  # its own, not the ViT's
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",  # its name since transformers 5.24
        "image_outputs",
    ]

    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = CONFIG_MAPPING["llama"](
                vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, pad_token_id=0
            )
        elif isinstance(self.text_config, dict):
            self.text_config = _config_from_dict("text_config", self.text_config, "llama")
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` must be an activation of transformers ({', '.join(ACT2FN)}), but got "
                f"{self.projector_hidden_act!r}."
            )
        check_sizes("text_config", self.text_config.get_text_config())
        vocab_size = self.text_config.get_text_config().vocab_size
        if not 0 <= self.image_token_id < vocab_size:
            raise ValueError(
                f"`image_token_id` ({self.image_token_id}) must be inside the vocabulary (`text_config.vocab_size` = "
                f"{vocab_size}). Add an image token to the vocabulary, or name a token that it has."
            )

    @property
    def context_length(self) -> int | None:
        """
        Largest number of tokens of prompt and answer together; `None` for a language model without such a limit
        (ALiBi, as in Bloom). Includes the factor by which `rope_parameters` extend the positions after training.
        """
        text_config = self.text_config.get_text_config()
        # not every language model's configuration has these two
        length = getattr(text_config, "max_position_embeddings", None)
        rope = getattr(text_config, "rope_parameters", None) or {}
        if length is None or rope.get("rope_type") not in _STRETCHING_ROPE_TYPES:
            return length
        return max(length, int(rope.get("original_max_position_embeddings", length) * (rope.get("factor") or 1)))

    def get_vision_tower_config(self) -> LlavaHrVisionConfig:
        """The part that describes [`LlavaHrVisionModel`]; its sub-configurations are the same objects."""
        return LlavaHrVisionConfig(
            **{name: getattr(self, name) for name in LlavaHrVisionConfig.__annotations__},
            dtype=self.dtype,
            attn_implementation=self.vision_config._attn_implementation,
            output_attentions=self.vision_config.output_attentions,
            output_hidden_states=self.vision_config.output_hidden_states,
        )


def check_sizes(name: str, config: PreTrainedConfig) -> None:
    """
    Validates the sizes in a part's configuration before a model is built from it.

    Args:
        name (`str`): The part's name, for the message.
        config (`PreTrainedConfig`): Its configuration.

    Raises:
        ValueError: If a size is out of range; names it.
    """
    values = config.to_dict()
    values |= {alias: values.get(original) for alias, original in config.attribute_map.items()}
    for field, largest in _LARGEST.items():
        value = values.get(field)
        if isinstance(value, int) and not 0 < value <= largest:
            raise ValueError(
                f"`{name}.{field}` must be from 1 to {largest:,}, but got {value:,}. Correct config.json."
            )


def _check_timm(name: str, config: TimmWrapperConfig) -> None:
    if ":" in config.architecture:
        raise ValueError(
            f"`{name}.architecture` must be timm's name of a CNN, such as convnext_large_mlp, but got "
            f"{config.architecture!r}, which names a place to load weights from."
        )
    model_args = config.model_args or {}
    if sources := sorted(set(_TIMM_SOURCES) & set(model_args)):
        raise ValueError(
            f"`{name}.model_args` say what timm builds, but {', '.join(sources)} would make it load something. "
            "Remove that: the weights come from the checkpoint."
        )
    for field, values in model_args.items():
        largest = _LARGEST["num_hidden_layers" if field in ("depths", "layers") else "hidden_size"]
        values = values if isinstance(values, (list, tuple)) else [values]
        if any(isinstance(value, (int, float)) and value > largest for value in values):
            raise ValueError(f"`{name}.model_args[{field!r}]` must be at most {largest:,}, but got {values}.")


def _config_from_dict(name: str, values: dict, default_model_type: str) -> PreTrainedConfig:
    model_type = values.get("model_type", default_model_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"`{name}` has the model type {model_type!r}, which transformers does not know.")
    try:
        return CONFIG_MAPPING[model_type](**values)
    except (StrictDataclassError, ZeroDivisionError) as error:
        raise ValueError(f"`{name}` is not a valid {model_type} config: {' '.join(str(error).split())}") from error


__all__ = [
    "LlavaHrConfig",
    "LlavaHrVisionConfig",
    "get_low_res_size",
    "get_num_image_tokens",
    "get_unpadded_cells",
]
