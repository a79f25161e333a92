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
"""Processor class for LLaVA-HR."""

import os
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .chat_templates_llava_hr import (
    PLAIN_CHAT_TEMPLATE,
    VICUNA_V1_CHAT_TEMPLATE,
    check_messages,
    get_chat_template,
    is_unicode,
)
from .configuration_llava_hr import get_num_image_tokens, get_unpadded_cells
from .image_processing_llava_hr import LlavaHrImageProcessor
from .image_processing_pil_llava_hr import LlavaHrImageProcessorPil


IMAGE_TOKEN = "<image>"


class LlavaHrProcessor(ProcessorMixin):
    r"""
    Image processor, tokenizer and chat template of LLaVA-HR in one.

    Args:
        image_processor ([`LlavaHrImageProcessor`] or [`LlavaHrImageProcessorPil`]):
            Prepares images.
        tokenizer (`PreTrainedTokenizerBase`):
            Any tokenizer that has `image_token` as one token.
        chat_template (`str`, *optional*):
            Jinja template of the conversation; the prompt form of the released models ("vicuna_v1") by default.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Marks an image in the text, and each of its features in the expanded prompt.

    Raises:
        ValueError: If the tokenizer does not have `image_token`.

    Example:

    ```python
    >>> content = [{"type": "image", "path": "street.jpg"}, {"type": "text", "text": "What does the sign say?"}]
    >>> messages = [{"role": "user", "content": content}]
    >>> inputs = processor.apply_chat_template(
    ...     messages,
    ...     add_generation_prompt=True,
    ...     tokenize=True,
    ...     return_dict=True,
    ...     return_tensors="pt",
    ...     processor_kwargs={"size": 1536, "low_res_size": 336},  # a sharper view, still 576 tokens
    ... )
    ```"""

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: LlavaHrImageProcessor | LlavaHrImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = IMAGE_TOKEN,
    ) -> None:
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` does not have the image token {image_token!r}. Add it with "
                f"`tokenizer.add_tokens({image_token!r}, special_tokens=True)` and extend the model's embeddings, or "
                f"start from a folder made by conversion.assemble."
            )
        if chat_template is None:
            chat_template = get_chat_template(tokenizer)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Like [`ProcessorMixin.__call__`].

        Args:
            images: Images of the texts in their order, flat or a list for each text. See [`LlavaHrImageProcessor`].
            text (`str` or `list[str]`): Prompts with one image token for each image.
            size, low_res_size (`int`, *optional*): Sides of the image and of its low-resolution view in pixels, for
                this call.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, `(batch_size, sequence_length)` each, and with images
            `pixel_values` `(images, 3, H, H)`. Where this call's low-resolution side differs from the one that the
            model computes (the saved one or the released rule), also `low_res_pixel_values` `(images, 3, L, L)`; with
            `unpad` also `image_sizes` `(images, 2)`.

        Raises:
            ValueError: If images and tags differ in number, an image cannot be used, or truncation cuts image tokens.
        """
        first = text if isinstance(text, str) or not text else text[0]
        has_start = isinstance(first, str) and first.startswith(self.tokenizer.bos_token or "\0")
        if has_start and "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            # A prompt that `apply_chat_template` rendered in an earlier call must not get a second start token
            kwargs.setdefault("add_special_tokens", False)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if "text_replacement_offsets" in inputs and isinstance(inputs.get("offset_mapping"), torch.Tensor):
            # `apply_chat_template` iterates over it to mask the answers, which is slow over a tensor
            inputs["offset_mapping"] = inputs["offset_mapping"].tolist()
        return inputs

    def apply_chat_template(
        self, conversation: list[dict] | list[list[dict]], chat_template: str | None = None, **kwargs: Any
    ) -> str | list[str] | BatchFeature:
        """
        Like [`ProcessorMixin.apply_chat_template`]. Each image is a part of its own: an image token inside a text
        part, an answer or the system message is plain text, and gets a space inside. Keys with the value `None`, which
        Arrow adds to parts, are ignored.

        Raises:
            ValueError: If a conversation is not a list of messages, or has a form that the template does not support;
                the message says where.
        """
        is_batched = isinstance(conversation, (list, tuple)) and isinstance(
            next(iter(conversation), None), (list, tuple)
        )
        conversations = [
            check_messages(messages, f"conversation[{index}]" if is_batched else "conversation")
            for index, messages in enumerate(conversation if is_batched else [conversation])
        ]
        conversation = conversations if is_batched else conversations[0]
        try:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        except TemplateError as error:
            raise ValueError(f"`conversation` does not fit the chat template: {error}") from error

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Like [`ProcessorMixin.save_pretrained`], but leaves the processor as it was."""
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        # saving records in these objects where their code is, which belongs in the files only
        for part in (self, self.image_processor):
            part.__dict__.pop("auto_map", None)
        return files

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: None = None, audio: None = None, **kwargs: Any
    ) -> None:
        """
        Checks that texts and images belong together, sample by sample where `images` is a list per sample.

        Raises:
            ValueError: If there is neither, a text is not Unicode, or the numbers of image tags and images differ.
        """
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        samples = [text] if isinstance(text, str) else text or []
        for index, sample in enumerate(samples):
            if not is_unicode(sample):
                raise ValueError(
                    f"Sample {index} of `text` has an unpaired surrogate, such as half of a cut character. "
                    'Remove it: text.encode(errors="replace").decode().'
                )
        if not samples:
            return
        num_tags = [sample.count(self.image_token) for sample in samples]
        if isinstance(images, (list, tuple)) and all(isinstance(sample, (list, tuple)) for sample in images):
            num_images = [len(sample) for sample in images]
            if num_tags != num_images:
                raise ValueError(
                    f"`images` must be a list for each sample of `text`, with one image for each {self.image_token}, "
                    f"but the texts have {num_tags} of them and the lists {num_images} images."
                )
        else:  # transformers before 5.23 does not count these
            total = 0 if images is None else len(make_flat_list_of_images(images))
            if sum(num_tags) != total:
                raise ValueError(
                    f"`text` has {sum(num_tags)} {self.image_token} tags, but `images` has {total} images."
                )

    @property
    def model_input_names(self) -> list[str]:
        """Names of the outputs by default, which omit the view that the model computes itself."""
        omitted = {"low_res_pixel_values", *(() if self.image_processor.unpad else ("image_sizes",))}
        return [name for name in super().model_input_names if name not in omitted]

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        low_res_size = self.image_processor.get_low_res_size(**kwargs)
        made_by_model = low_res_size == self.image_processor.get_low_res_size(kwargs.get("size"))
        return super()._process_images(images, **{"return_low_res": not made_by_model, **kwargs})

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that replaces the tag of image `image_idx`: one image token for each of its features."""
        patch_size = kwargs.get("patch_size", self.image_processor.patch_size)
        low_res_size = self.image_processor.get_low_res_size(**kwargs)
        if "image_sizes" not in image_inputs:
            return self.image_token * get_num_image_tokens(low_res_size, patch_size)
        height, width = map(int, image_inputs["image_sizes"][image_idx])
        rows, columns = get_unpadded_cells(height, width, low_res_size // patch_size)
        return self.image_token * ((rows.stop - rows.start) * (columns.stop - columns.start))

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """
        Number of image tokens of images that are not available yet, from which vLLM plans its memory.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): Heights and widths of the images in pixels. Without
                `unpad` only their number matters.
            kwargs: Arguments of the image processor: `size`, `low_res_size`, `unpad`.

        Returns:
            `MultiModalData` with `num_image_tokens` and `num_image_patches` (1 each) for each image.
        """
        if image_sizes is None:
            return MultiModalData()
        image_inputs = {"image_sizes": image_sizes} if kwargs.get("unpad", self.image_processor.unpad) else {}
        texts = [self.replace_image_token(image_inputs, index, **kwargs) for index in range(len(image_sizes))]
        return MultiModalData(
            num_image_tokens=[text.count(self.image_token) for text in texts], num_image_patches=[1] * len(texts)
        )


__all__ = ["LlavaHrProcessor", "PLAIN_CHAT_TEMPLATE", "VICUNA_V1_CHAT_TEMPLATE"]
