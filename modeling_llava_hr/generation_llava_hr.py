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
"""How LLaVA-HR generates: `GenerationMixin` with images in the cache, and the cache's name across versions."""

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg


# The keys and values of earlier tokens are `cache` in transformers 5.24 and later, `past_key_values` before
CACHE_NAME = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))


def deprecate_old_name(forward: Callable) -> Callable:
    """Makes a `forward` that takes both names of the cache warn about the old one if there is a new one."""
    if CACHE_NAME == "past_key_values":
        return forward
    return deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")(forward)


class LlavaHrGenerationMixin(GenerationMixin):
    """Checks prompts before anything is computed, and lets a conversation continue from its cache."""

    def check_prompt_length(self, num_tokens: int) -> None:
        """
        Raises:
            ValueError: If a prompt of `num_tokens` tokens is empty or leaves no room for an answer in the context.
        """
        longest = self.config.context_length
        if num_tokens == 0:
            raise ValueError("The prompt is empty. Give at least one token.")
        if longest is not None and num_tokens >= longest:
            raise ValueError(
                f"The prompt has {num_tokens} tokens, but with an answer at most {longest} (`config.context_length`) "
                f"fit into the context. Use less text, fewer images, or images with fewer tokens (a smaller `size` of "
                f"the processor)."
            )

    def _prepare_generated_length(
        self, generation_config: GenerationConfig, *, input_ids_length: int, inputs_tensor: torch.Tensor, **kwargs: Any
    ) -> GenerationConfig:
        """Limits the answer to the context. `max_length` does not count a prompt that is given as embeddings."""
        generation_config = super()._prepare_generated_length(
            generation_config=generation_config,
            input_ids_length=input_ids_length,
            inputs_tensor=inputs_tensor,
            **kwargs,
        )
        if self.config.context_length is not None:
            longest = self.config.context_length - (inputs_tensor.shape[1] - input_ids_length)
            generation_config.max_length = min(generation_config.max_length, longest)
        return generation_config

    def _prepare_model_inputs(
        self, inputs: torch.Tensor | None, bos_token_id: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        """
        Rejects what cannot be answered before an image is encoded or memory allocated, and drops images whose tokens
        are all in the cache. No other hook of `generate` sees the arguments before transformers encodes the images.
        """
        inputs, name, model_kwargs = super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)
        self.check_prompt_length(inputs.shape[1])
        images = {key: model_kwargs.pop(key, None) for key in ("pixel_values", "low_res_pixel_values", "image_sizes")}
        images = {key: pixels for key, pixels in images.items() if pixels is not None}
        # A copy: transformers changes the features in place, but the caller may want to use them again
        encoded = model_kwargs.pop("mm_encoder_outputs", None) or {}
        encoded = {key: copy.copy(outputs) for key, outputs in encoded.items()}
        mask = self.model.get_placeholder_mask(*((inputs, None) if name == "input_ids" else (None, inputs)))
        cached = model_kwargs[CACHE_NAME].get_seq_length() if model_kwargs.get(CACHE_NAME) is not None else 0
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.shape[-1] > inputs.shape[1]:
            cached = 0  # `inputs` are only the tokens that are not in the cache
        num_new = int(mask[:, cached:].sum())
        if num_new and not images and not encoded and name == "input_ids":
            raise ValueError(
                f"The prompt has {num_new} image tokens, but there are no images. Make `input_ids` and `pixel_values` "
                f"in one call of the processor, whose `apply_chat_template` treats a tag in a part of text as text."
            )
        if cached and not num_new:
            images, encoded = {}, {}
        elif cached and (images or encoded):
            if images:
                images, encoded = {}, {"image": self.get_image_features(**images, return_dict=True), **encoded}
            features = torch.cat(tuple(encoded["image"].pooler_output))
            if len(features) == mask.sum():  # of the whole conversation
                features = features[mask.nonzero()[:, 1].to(features.device) >= cached]
            encoded["image"].pooler_output = [features]
        return inputs, name, {**model_kwargs, **images, **({"mm_encoder_outputs": encoded} if encoded else {})}

    def _expand_multimodal_outputs(
        self,
        input_ids: torch.Tensor | None,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Repeats the features of each sample's images as a group; transformers 5.18 repeats image by image."""
        if not (image_outputs := mm_encoder_output.get("image")):
            return mm_encoder_output
        has_ids = input_ids is not None and input_ids.numel() > 0
        features = image_outputs.pooler_output
        mask = self.model.get_placeholder_mask(input_ids if has_ids else None, inputs_embeds, features)
        samples = torch.cat(tuple(features)).split(mask.sum(-1).tolist())
        image_outputs = copy.copy(image_outputs)
        image_outputs.pooler_output = [sample for sample in samples for _ in range(expand_size)]
        return {**mm_encoder_output, "image": image_outputs}


__all__ = ["LlavaHrGenerationMixin"]
