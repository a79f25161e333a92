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
"""
The vision side of LLaVA-HR (arXiv 2403.03003, section 4): two pathways, MR-Adapters between them, fusion.

Shape legend: `images` in the batch, `d` ViT width, `g` side of the ViT grid (patches), `C` channels and `k` side of
the high-resolution feature map, `D` language-model width.
"""

import math
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from transformers import CLIPVisionConfig, SiglipVisionConfig, TimmWrapperConfig, TimmWrapperModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipEncoderLayer
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_llava_hr import (
    LlavaHrConfig,
    LlavaHrVisionConfig,
    get_low_res_size,
    get_num_image_tokens,
)
from .generation_llava_hr import CACHE_NAME
from .image_processing_llava_hr import make_low_res_view


_Layer = TypeVar("_Layer", bound=nn.Module)
_VISION_LAYERS = {"clip_vision_model": CLIPEncoderLayer, "siglip_vision_model": SiglipEncoderLayer}
_GATE_ACTS: dict[str, Any] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}
# The high-resolution tower dominates vision memory (about 240 MB per image at 1024 pixels in bfloat16). Unless it is
# trained, it processes at most this many pixels per pass.
_MAX_HIGH_RES_PIXELS = {"cuda": 8 * 1024**2, "cpu": 2 * 1024**2}


@dataclass
class LlavaHrVisionModelOutput(BaseModelOutputWithPooling):
    r"""
    Output of the dual-resolution vision model and of `get_image_features`.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(images, g * g, d)`):
            The fused features F_v of equation 2.
        pooler_output (`torch.Tensor` of shape `(images, g * g, D)`, *optional*):
            The projected features that take the place of the image tokens; set by `get_image_features`.
        hidden_states (`tuple(torch.Tensor)`, *optional*): Inputs of each ViT layer and output of the last.
        attentions (`tuple(torch.Tensor)`, *optional*): Attention weights of each ViT layer.
        high_res_features (`torch.Tensor` of shape `(images, C, k, k)`):
            The high-resolution feature map F_vh.
        mr_adapter_gates (`tuple(torch.Tensor)` of shape `(images, 1)` or `(images, d)`):
            The gate g of each MR-Adapter: how much of the high-resolution view it lets in.
    """

    high_res_features: torch.Tensor | None = None
    mr_adapter_gates: tuple[torch.Tensor, ...] | None = None


# transformers does not call `_init_weights` on modules of custom code that own no parameter directly, so a branch on
# the adapter itself would never run. Instead, each layer that starts in a particular way says so. Subclasses would do
# as well, but tools such as compressed-tensors look for `nn.Linear` itself.
def _start(layer: _Layer, weight: str) -> _Layer:
    """
    Says how the weight of an MR-Adapter's layer starts: `"xavier"` (uniform, released code), `"zero"` (so that an
    inserted adapter changes nothing at first) or `"sum"` (of the two halves of the input).
    """
    layer.initial_weight = weight  # type: ignore[assignment]  # torch declares attributes as tensors or modules
    return layer


class LlavaHrConvMapping(nn.Module):
    """Convolution block of an MR-Adapter: depthwise 7x7, GELU, pointwise (section 4.3)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.depthwise = _start(
            nn.Conv2d(in_channels, in_channels, kernel_size=7, padding=3, groups=in_channels), "xavier"
        )
        self.pointwise = _start(nn.Linear(in_channels, out_channels), "zero")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(images, in_channels, h, w)` -> `(images, out_channels, h, w)`."""
        hidden = F.gelu(self.depthwise(features)).permute(0, 2, 3, 1)  # (images, h, w, in_channels)
        return self.pointwise(hidden).permute(0, 3, 1, 2)


class LlavaHrMlpMapping(nn.Module):
    """MLP of an MR-Adapter, applied to each position: linear, GELU, linear (section 4.3)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.fc1 = _start(nn.Linear(in_channels, in_channels), "xavier")
        self.fc2 = _start(nn.Linear(in_channels, out_channels), "zero")

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(images, in_channels, h, w)` -> `(images, out_channels, h, w)`."""
        hidden = F.gelu(self.fc1(features.permute(0, 2, 3, 1)))  # (images, h, w, in_channels)
        return self.fc2(hidden).permute(0, 3, 1, 2)


_MAPPINGS = {"conv": LlavaHrConvMapping, "mlp": LlavaHrMlpMapping}


class LlavaHrGate(nn.Module):
    """Gate of equation 4: act(W2 GELU(W1 [pooled low-res, pooled high-res]))."""

    def __init__(self, hidden_size: int, out_features: int, act: str):
        super().__init__()
        self.fc1 = _start(nn.Linear(2 * hidden_size, hidden_size // 2), "xavier")
        self.fc2 = _start(nn.Linear(hidden_size // 2, out_features), "xavier")
        self.act = _GATE_ACTS[act]

    def forward(self, low_res: torch.Tensor, high_res: torch.Tensor) -> torch.Tensor:
        """Two maps `(images, d, g, g)` -> gate `(images, out_features)`."""
        pooled = torch.cat([low_res.mean(dim=(2, 3)), high_res.mean(dim=(2, 3))], dim=-1)  # (images, 2 * d)
        return self.act(self.fc2(F.gelu(self.fc1(pooled))))


def align_to_grid(features: torch.Tensor, grid: int) -> torch.Tensor:
    """
    `(images, channels, k, k)` -> `(images, channels, grid, grid)` as in the released code: enlarged bilinearly with
    aligned corners in float32, or average-pooled by an integer factor.
    """
    side = features.shape[-1]
    if side == grid:
        return features
    if side > grid:
        return F.avg_pool2d(features, side // grid)
    return F.interpolate(features.float(), size=(grid, grid), mode="bilinear", align_corners=True).to(features.dtype)


class LlavaHrMixtureOfResolutionAdapter(GradientCheckpointingLayer):
    """
    MR-Adapter (section 4.3, equations 3 and 4): lets the high-resolution features into the ViT.

        l  = F + f_l(F)
        h  = align(f_h(F_vh))
        g  = gate(l, h)                     "channel" (equation 4): gate(f_l(F), h)
        F' = l + g * h                      "concat": Linear([l, g * h])
    """

    def __init__(self, config: LlavaHrVisionConfig, high_res_channels: int):
        super().__init__()
        hidden_size = config.vision_config.hidden_size
        self.gate_per_channel = config.mr_adapter_gate == "channel"
        self.low_res_mapping = _MAPPINGS[config.mr_adapter_low_res_mapping](hidden_size, hidden_size)
        self.high_res_mapping = _MAPPINGS[config.mr_adapter_high_res_mapping](high_res_channels, hidden_size)
        self.gate = LlavaHrGate(hidden_size, hidden_size if self.gate_per_channel else 1, config.mr_adapter_gate_act)
        self.fusion = _start(nn.Linear(2 * hidden_size, hidden_size), "sum") if config.fusion == "concat" else None

    def forward(
        self, hidden_states: torch.Tensor, high_res_features: torch.Tensor, grid: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(images, g * g, d)`): The ViT's tokens F.
            high_res_features (`torch.Tensor` of shape `(images, C, k, k)`): The high-resolution map F_vh.
            grid (`int`): Side g of the ViT's grid in patches.

        Returns:
            `tuple`: The new tokens `(images, g * g, d)` and the gate, `(images, 1)` or `(images, d)`.
        """
        low_res = hidden_states.unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (images, d, g, g)
        mapped = self.low_res_mapping(low_res)
        low_res = low_res + mapped
        high_res = align_to_grid(self.high_res_mapping(high_res_features), grid)
        gate = self.gate(mapped if self.gate_per_channel else low_res, high_res)
        high_res = gate[:, :, None, None] * high_res

        if self.fusion is None:
            return (low_res + high_res).flatten(2).transpose(1, 2), gate
        both = torch.cat([low_res, high_res], dim=1).flatten(2).transpose(1, 2)  # (images, g * g, 2 * d)
        return self.fusion(both), gate


class LlavaHrFusion(nn.Module):
    """Fusion of the two pathways after the ViT (equation 2 as released): one linear layer each, summed."""

    def __init__(self, hidden_size: int, high_res_channels: int):
        super().__init__()
        self.low_res_proj = nn.Linear(hidden_size, hidden_size)
        self.high_res_proj = nn.Linear(high_res_channels, hidden_size)

    def forward(self, hidden_states: torch.Tensor, high_res_features: torch.Tensor, grid: int) -> torch.Tensor:
        """Tokens `(images, g * g, d)` and map `(images, C, k, k)` -> fused tokens `(images, g * g, d)`."""
        high_res = align_to_grid(high_res_features, grid).flatten(2).transpose(1, 2)  # (images, g * g, C)
        low_res = self.low_res_proj(hidden_states)
        return low_res + self.high_res_proj(high_res).to(low_res.device)


class LlavaHrVisionEmbeddings(nn.Module):
    """Patch and position embeddings of CLIP or SigLIP without a class token, for any input size."""

    def __init__(self, config: CLIPVisionConfig | SiglipVisionConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_positions = get_num_image_tokens(config.image_size, config.patch_size)
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.model_type == "siglip_vision_model",
        )
        self.position_embedding = nn.Embedding(self.num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, 3, L, L)` -> `(images, g * g, d)` with g = L / patch size."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (images, d, g, g)
        grid = patches.shape[-1]
        # call the module rather than read its weight: offloaded weights exist only during a call
        positions = self.position_embedding(torch.arange(self.num_positions, device=patches.device))
        if grid * grid != self.num_positions:
            side = math.isqrt(self.num_positions)
            table = positions.T.unflatten(1, (side, side))[None].float()  # (1, d, side, side)
            table = F.interpolate(table, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
            positions = table[0].flatten(1).T.to(patches.dtype)
        return patches.flatten(2).transpose(1, 2) + positions


class LlavaHrPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving that all LLaVA-HR models share."""

    config: LlavaHrConfig
    config_class = LlavaHrConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] | set[str] = []  # each submodel sets its own; FSDP requires all of them to exist
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_quantized = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        weight = getattr(module, "initial_weight", None)
        if weight == "xavier":
            init.xavier_uniform_(module.weight)
        elif weight == "zero":
            init.zeros_(module.weight)
        elif weight == "sum" and isinstance(module, nn.Linear):
            identity = torch.eye(module.out_features, dtype=module.weight.dtype, device=module.weight.device)
            init.copy_(module.weight, torch.cat([identity, identity], dim=1))

    @property
    def is_quantized(self) -> bool:
        """Whether a quantizer of transformers, which sets this first, replaces layers of this model."""
        return self._is_quantized

    # No quantizer replaces `_keep_in_fp32_modules`. The vision side is small beside the language model, and its gates
    # and convolutions lose most. Only quantized models list it, because in float16 models the list means float32.
    @is_quantized.setter
    def is_quantized(self, is_quantized: bool) -> None:
        self._is_quantized = is_quantized
        if not is_quantized:
            return
        for name in ("vision_tower", "multi_modal_projector"):  # patterns are anchored at the start
            self._keep_in_fp32_modules |= {name, f"model.{name}"}

    # transformers has no hook that can stop either, and the weights would be silently wrong
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """
        Like [`PreTrainedModel.save_pretrained`].

        Raises:
            ValueError: If this is a 4-bit model that already ran on a CPU: bitsandbytes has then repacked its weights
                with a loss, and the file would be another model.
        """
        if not self._hf_peft_config_loaded:  # which saves the adapter alone
            self._check_not_repacked("save_pretrained")
        super().save_pretrained(save_directory, *args, **kwargs)

    def dequantize(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Like [`PreTrainedModel.dequantize`]. Raises a `ValueError` where `save_pretrained` does."""
        self._check_not_repacked("dequantize")
        return super().dequantize(*args, **kwargs)

    def _check_not_repacked(self, method: str) -> None:
        states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in self.modules()]
        if any(getattr(state, "packing_format_for_cpu", False) for state in states):
            raise ValueError(
                "This 4-bit model has already run on the CPU, where bitsandbytes repacks its weights in place with a "
                f"loss. Load it again and call `{method}` before the first forward pass."
            )


class LlavaHrHighResVisionModel(TimmWrapperModel):
    """
    High-resolution pathway: the stem and stages of a CNN of timm, without final norm, pooling and head
    (section 4.2; CLIP-ConvNeXt in the released models).
    """

    # A CNN has no attention, so it accepts any implementation that the user chooses for the other parts
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # The inherited properties look up plans in timm's model and raise
    supports_tp_plan = False
    supports_pp_plan = False

    def __init__(self, config: TimmWrapperConfig):
        super().__init__(config)
        self._gradient_checkpointing = False
        has_fixed_size = any(hasattr(self.timm_model, name) for name in ("patch_embed", "pos_embed"))
        if has_fixed_size or not getattr(self.timm_model, "feature_info", None):
            raise ValueError(
                f"`high_res_vision_config.architecture` must be a CNN of timm, such as a ConvNeXt or a ResNet, which "
                f"makes a feature map of an image of any size, but got {config.architecture!r}."
            )
        classifier = self.timm_model.pretrained_cfg["classifier"]
        # num_classes=0 still leaves the head's norm (ConvNeXt), which would never get a gradient
        setattr(self.timm_model, classifier.split(".")[0], nn.Identity())
        self.num_channels = self.timm_model.num_features
        self.stride = self.timm_model.feature_info[-1]["reduction"]
        is_convnext = any(isinstance(module, ConvNeXtBlock) for module in self.modules())
        # the block classes of other CNNs vary, so such a tower is never split across devices
        self._no_split_modules = {(ConvNeXtBlock if is_convnext else type(self)).__name__}

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the CNN recomputes its activations in the backward pass: transformers' switch, which sets timm's."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self._gradient_checkpointing = enable and self.supports_gradient_checkpointing
        if self.supports_gradient_checkpointing:
            self.timm_model.set_grad_checkpointing(enable)

    def train(self, mode: bool = True) -> "LlavaHrHighResVisionModel":
        """Keeps a ResNet's batch norms in eval mode: small batches and blank images would spoil their statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            # layer scale: 1 rather than timm's 1e-6, with which a CNN does not learn to read from scratch
            init.ones_(module.gamma)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> TimmWrapperModelOutput:
        """`(images, 3, H, H)` -> an output with `last_hidden_state` `(images, C, H / stride, H / stride)`."""
        return TimmWrapperModelOutput(last_hidden_state=self.timm_model.forward_features(pixel_values.to(self.dtype)))


class LlavaHrVisionModel(LlavaHrPreTrainedModel):
    """
    The two pathways, the MR-Adapters between the ViT's stages and the fusion after them (sections 4.1 to 4.3). All
    layers of the ViT run; there is no class token and no post-layernorm (released code). Loads from its own folder or
    from that of a complete LLaVA-HR.
    """

    config: LlavaHrVisionConfig
    config_class = LlavaHrVisionConfig
    base_model_prefix = "model.vision_tower"  # in the weights of a complete LLaVA-HR
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _auto_class = "AutoModel"
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {
        "hidden_states": [CLIPEncoderLayer, SiglipEncoderLayer],
        "attentions": [CLIPAttention, SiglipAttention],
    }

    def __init__(self, config: LlavaHrVisionConfig):
        super().__init__(config)
        vision_config = config.vision_config
        self.high_res_tower = LlavaHrHighResVisionModel(config.high_res_vision_config)
        high_res_channels = self.high_res_tower.num_channels

        self.embeddings = LlavaHrVisionEmbeddings(vision_config)
        self.pre_layernorm = (
            nn.LayerNorm(vision_config.hidden_size, eps=vision_config.layer_norm_eps)
            if vision_config.model_type == "clip_vision_model"
            else nn.Identity()
        )
        layer_class = _VISION_LAYERS[vision_config.model_type]
        self.layers = nn.ModuleList([layer_class(vision_config) for _ in range(vision_config.num_hidden_layers)])
        self.mr_adapter_layers = list(config.mr_adapter_layers or [])
        self.mr_adapters = nn.ModuleList(
            [LlavaHrMixtureOfResolutionAdapter(config, high_res_channels) for _ in self.mr_adapter_layers]
        )
        self.fusion = LlavaHrFusion(vision_config.hidden_size, high_res_channels)
        whole = (self.embeddings, *self.layers, *self.mr_adapters)
        self._no_split_modules = {type(module).__name__ for module in whole}
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        low_res_pixel_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LlavaHrVisionModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`):
                Images as the high-resolution pathway sees them.
            low_res_pixel_values (`torch.Tensor` of shape `(images, 3, L, L)`, *optional*):
                Low-resolution views, if not the ones that the model computes itself, see [`get_low_res_size`].

        Returns:
            [`LlavaHrVisionModelOutput`]

        Raises:
            ValueError: If the views do not belong together or their grids cannot be aligned.
        """
        low_res_size = self.get_low_res_size(pixel_values, low_res_pixel_values)
        if low_res_pixel_values is None:
            low_res_pixel_values = make_low_res_view(pixel_values, low_res_size)
        grid = low_res_size // self.embeddings.patch_size
        high_res_features = self._encode_high_res(pixel_values)
        hidden_states = self.pre_layernorm(self.embeddings(low_res_pixel_values))

        gates = []
        for index, layer in enumerate(self.layers):
            if index in self.mr_adapter_layers:
                adapter = self.mr_adapters[self.mr_adapter_layers.index(index)]
                hidden_states, gate = adapter(hidden_states, high_res_features, grid)
                gates.append(gate)
            hidden_states = layer(hidden_states, attention_mask=None, **kwargs)

        return LlavaHrVisionModelOutput(
            last_hidden_state=self.fusion(hidden_states, high_res_features, grid),
            high_res_features=high_res_features,
            mr_adapter_gates=tuple(gates),
        )

    def _encode_high_res(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, 3, H, H)` -> F_vh, `(images, C, k, k)`; in several passes where that bounds memory."""
        keeps_activations = torch.is_grad_enabled() and any(p.requires_grad for p in self.high_res_tower.parameters())
        max_pixels = _MAX_HIGH_RES_PIXELS.get(pixel_values.device.type, _MAX_HIGH_RES_PIXELS["cuda"])
        is_traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
        if keeps_activations or is_traced:  # chunks would fix the number of images in the trace
            return self.high_res_tower(pixel_values).last_hidden_state
        chunks = pixel_values.split(max(1, max_pixels // pixel_values.shape[-1] ** 2))
        features = [self.high_res_tower(chunk).last_hidden_state for chunk in chunks]
        return features[0] if len(features) == 1 else torch.cat(features)

    def get_low_res_size(self, pixel_values: torch.Tensor, low_res_pixel_values: torch.Tensor | None = None) -> int:
        """
        Side of the low-resolution view in pixels: that of `low_res_pixel_values`, or of the model's own view.

        Raises:
            ValueError: If a view is not a batch of square images, or the two do not fit each other.
        """
        for name, view in {"pixel_values": pixel_values, "low_res_pixel_values": low_res_pixel_values}.items():
            if view is None:
                continue
            if view.ndim != 4 or view.shape[-1] != view.shape[-2] or view.shape[0] != pixel_values.shape[0]:
                raise ValueError(
                    f"`{name}` must have the shape (images, 3, side, side) with one view of each image, but got "
                    f"{tuple(view.shape)} with {pixel_values.shape[0]} images. Use the processor's."
                )
        # `int`, as sides are symbols while a model is exported, which is for one resolution
        low_res_size = self.config.low_res_size
        if low_res_pixel_values is not None:
            low_res_size = int(low_res_pixel_values.shape[-1])
        return get_low_res_size(
            int(pixel_values.shape[-1]),
            low_res_size,
            patch_size=self.embeddings.patch_size,
            stride=self.high_res_tower.stride,
            min_low_res_size=self.config.vision_config.image_size,
        )


__all__ = [
    "LlavaHrHighResVisionModel",
    "LlavaHrMixtureOfResolutionAdapter",
    "LlavaHrPreTrainedModel",
    "LlavaHrVisionModel",
    "LlavaHrVisionModelOutput",
    "align_to_grid",
]
