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
PyTorch LLaVA-HR: "Mixture-of-Resolution Adaptation for Multimodal Large Language Models" (arXiv 2403.03003).

Shape legend: `images` in the batch, `g` side of the ViT grid (patches), `D` language-model width; more in
`modeling_llava_hr_vision.py`.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from .configuration_llava_hr import LlavaHrConfig, get_unpadded_cells
from .generation_llava_hr import CACHE_NAME, LlavaHrGenerationMixin, deprecate_old_name
from .modeling_llava_hr_vision import LlavaHrPreTrainedModel, LlavaHrVisionModel, LlavaHrVisionModelOutput


@dataclass
class LlavaHrModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`LlavaHrModel`].

    Args:
        image_outputs ([`LlavaHrVisionModelOutput`], *optional*): Output of `get_image_features`.
    """

    image_outputs: LlavaHrVisionModelOutput | None = None


@dataclass
class LlavaHrCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Output of [`LlavaHrForConditionalGeneration`].

    Args:
        image_outputs ([`LlavaHrVisionModelOutput`], *optional*): Output of `get_image_features`.
    """

    image_outputs: LlavaHrVisionModelOutput | None = None


class LlavaHrMultiModalProjector(nn.Module):
    """Two linear layers with an activation between, from the ViT's width to the language model's."""

    def __init__(self, config: LlavaHrConfig):
        super().__init__()
        text_hidden_size = config.text_config.get_text_config().hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, text_hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(images, g * g, d)` -> `(images, g * g, D)`."""
        return self.linear_2(self.act(self.linear_1(image_features)))


class LlavaHrModel(LlavaHrPreTrainedModel):
    """Dual-resolution vision model, projector and language model, without the language-modeling head."""

    _auto_class = "AutoModel"

    def __init__(self, config: LlavaHrConfig):
        super().__init__(config)
        self.vision_tower = LlavaHrVisionModel(config.get_vision_tower_config())
        self.multi_modal_projector = LlavaHrMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        low_res_pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaHrVisionModelOutput:
        """
        Encodes images. The result can be passed to `forward` and `generate` as `mm_encoder_outputs={"image": result}`,
        so that an image is encoded once for many questions.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`):
                Images as the high-resolution pathway sees them.
            low_res_pixel_values (`torch.Tensor` of shape `(images, 3, L, L)`, *optional*):
                Low-resolution views. By default the model computes them from `pixel_values`, with the side
                `config.low_res_size` or, if that is `None`, by the released rule.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
                Heights and widths of the images in pixels, from a processor with `unpad`: the features of cells that
                lie entirely in the padding are dropped.

        Returns:
            [`LlavaHrVisionModelOutput`] with `pooler_output` of shape `(images, g * g, D)`, or with `image_sizes` a
            list with one tensor of shape `(kept cells, D)` for each image.

        Raises:
            ValueError: If the views or the sizes do not belong together.
        """
        outputs = self.vision_tower(pixel_values, low_res_pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = self.multi_modal_projector(outputs.last_hidden_state)
        if image_sizes is not None:
            # an exporter passes a list, with which its graph would fit no other image
            got = tuple(image_sizes.shape) if isinstance(image_sizes, torch.Tensor) else type(image_sizes).__name__
            if got != (len(pixel_values), 2):
                raise ValueError(
                    f"`image_sizes` must be a tensor of shape ({len(pixel_values)}, 2), the height and width of each "
                    f"image, but got {got}. Use the processor's; to export, use a processor with `unpad=False`."
                )
            grid = math.isqrt(outputs.pooler_output.shape[1])
            maps = outputs.pooler_output.unflatten(1, (grid, grid))  # (images, g, g, D)
            cells = [get_unpadded_cells(height, width, grid) for height, width in image_sizes.tolist()]
            outputs.pooler_output = [image[kept].flatten(0, 1) for image, kept in zip(maps, cells, strict=True)]
        return outputs

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        image_features: torch.Tensor | list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        `(batch_size, sequence_length)`, true at the image tokens of the ids or, without ids, of the embeddings.

        Raises:
            ValueError: If `image_features`, `(images, g * g, D)` or a list with those of each image, do not fit them.
        """
        if input_ids is None:
            image_token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        if image_features is not None:
            # Iterating over a tensor would fix the number of images of an exported model
            parts = [image_features] if isinstance(image_features, torch.Tensor) else image_features
            num_tokens, num_features = mask.sum(), sum(part[..., 0].numel() for part in parts)
            torch_compilable_check(
                num_tokens == num_features,
                lambda: (
                    f"Image features and image tokens do not match, tokens: {num_tokens}, features: {num_features} "
                    f"(of {len(image_features)} images). Make `input_ids` and `pixel_values` in one call of the "
                    f"processor, with one image tag per image, and do not cut the prompt. If the processor returns "
                    f"`low_res_pixel_values`, pass them as well."
                ),
            )
        return mask

    @can_return_tuple
    @auto_docstring
    @deprecate_old_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        low_res_pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaHrModelOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`, *optional*):
            All images of the batch in the order of their image tokens. Without them the vision model does not run.
        low_res_pixel_values (`torch.Tensor` of shape `(images, 3, L, L)`, *optional*):
            Low-resolution views, see [`LlavaHrModel.get_image_features`].
        image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
            Heights and widths in pixels with which padding is dropped, see [`LlavaHrModel.get_image_features`].
        cache (`Cache`, *optional*): Keys and values of earlier tokens.
        past_key_values (`Cache`, *optional*): The name of `cache` before transformers 5.24.
        mm_encoder_outputs (`dict`, *optional*):
            `{"image": outputs of get_image_features}`, in place of `pixel_values`.

        Raises:
            ValueError: If inputs contradict each other or the image tokens and the images' features differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        image_outputs = mm_encoder_outputs.get("image") if mm_encoder_outputs is not None else None
        if pixel_values is not None and image_outputs is not None:
            raise ValueError(
                "Got both `pixel_values` and `mm_encoder_outputs`. Pass the pixels, or the result of "
                "`get_image_features`."
            )

        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            recorded = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
            views = (pixel_values, low_res_pixel_values, image_sizes)
            image_outputs = self.get_image_features(*views, return_dict=True, **recorded)
        if image_outputs is not None:
            image_features = image_outputs.pooler_output
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features).to(inputs_embeds.device)
            if not isinstance(image_features, torch.Tensor):
                image_features = torch.cat(tuple(image_features))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), image_features)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE_NAME: past_key_values if cache is None else cache},
            **kwargs,
        )
        return LlavaHrModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            image_outputs=image_outputs,
        )


class LlavaHrForConditionalGeneration(LlavaHrPreTrainedModel, LlavaHrGenerationMixin):
    """LLaVA-HR with its language-modeling head: answers questions about images."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: LlavaHrConfig):
        super().__init__(config)
        self.model = LlavaHrModel(config)
        text_config = config.text_config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        # language models name their input embeddings differently (Llama `embed_tokens`, GPT-2 `wte`)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        low_res_pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaHrVisionModelOutput:
        """See [`LlavaHrModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, low_res_pixel_values, image_sizes, **kwargs)

    @can_return_tuple
    @auto_docstring
    @deprecate_old_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        low_res_pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | LlavaHrCausalLMOutputWithPast:
        r"""
        pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`, *optional*):
            All images of the batch in the order of their image tokens.
        low_res_pixel_values (`torch.Tensor` of shape `(images, 3, L, L)`, *optional*):
            Low-resolution views, see [`LlavaHrModel.get_image_features`].
        image_sizes (`torch.LongTensor` of shape `(images, 2)`, *optional*):
            Heights and widths in pixels with which padding is dropped, see [`LlavaHrModel.get_image_features`].
        cache (`Cache`, *optional*): Keys and values of earlier tokens.
        past_key_values (`Cache`, *optional*): The name of `cache` before transformers 5.24.
        mm_encoder_outputs (`dict`, *optional*):
            `{"image": outputs of get_image_features}`, in place of `pixel_values`.

        Returns:
            [`LlavaHrCausalLMOutputWithPast`]
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            low_res_pixel_values=low_res_pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values if cache is None else cache},
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)

        return LlavaHrCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            image_outputs=outputs.image_outputs,
        )


__all__ = ["LlavaHrForConditionalGeneration", "LlavaHrModel", "LlavaHrPreTrainedModel", "LlavaHrVisionModel"]
