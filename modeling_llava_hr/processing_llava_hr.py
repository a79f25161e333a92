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
from dataclasses import is_dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .configuration_llava_hr import get_num_image_tokens


IMAGE_TOKEN = "<image>"
# Keys of a message's part that may hold its image
IMAGE_KEYS = ("image", "url", "path", "base64")

# Stage 2 and inference of the released models ("vicuna_v1"). Images come first in their message, each on a line of its
# own, wherever their parts are: so the models were trained. If a user's message is one string, its tags stay where
# they are; in all other text a tag is text, and a space keeps it from being tokenized as an image. The space after the
# start token and `image_suffix`, see [`get_chat_template`], give the token ids of the released code. vLLM recognises
# contents as lists of parts by the loop over `message['content']`.
VICUNA_V1_CHAT_TEMPLATE = """\
{%- set image_suffix = ' ' -%}
{%- macro text_of(content) -%}
{%- if content is string -%}
{{- content | replace('<image>', '< image>') -}}
{%- else -%}
{{- (content or []) | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') \
| replace('<image>', '< image>') -}}
{%- endif -%}
{%- endmacro -%}
{{- bos_token + ' ' if bos_token else '' -}}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system, turns = text_of(messages[0]['content']), messages[1:] -%}
{%- else -%}
{%- set system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives \
helpful, detailed, and polite answers to the user's questions." -%}
{%- set turns = messages -%}
{%- endif -%}
{{- system + ' ' if system else '' -}}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' -}}
{%- if message['content'] is string -%}
{%- for text in (message['content'] + ' ').split('<image>') -%}
{{- ('' if loop.first else '<image>' + image_suffix if text else '<image>') + text -}}
{%- endfor -%}
{%- else -%}
{%- if message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}{{- '<image>' + image_suffix + '\\n' -}}
{%- elif part['type'] != 'text' -%}
{{- raise_exception("A part's type must be 'text' or 'image', but got '" + part['type'] + "'.") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- text_of(message['content']) + ' ' -}}
{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT:' -}}{%- generation -%}{{- ' ' + text_of(message['content']) + eos_token -}}{%- endgeneration -%}
{%- else -%}
{{- raise_exception("A message's role must be 'user' or 'assistant', or 'system' in the first message, but got '" \
+ message['role'] + "'.") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

# Stage 1 of the released models ("plain"): image and caption, no system text, no roles.
PLAIN_CHAT_TEMPLATE = """\
{%- set image_suffix = ' ' -%}
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set content = message['content'] -%}
{%- set text = content if content is string else (content or []) | map(attribute='text') | join('\\n') -%}
{%- generation -%}{{- image_suffix + (text | replace('<image>', '< image>')) + '\\n' -}}{%- endgeneration -%}
{%- else -%}
{{- '<image>' -}}
{%- endif -%}
{%- endfor -%}
"""


def get_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str = VICUNA_V1_CHAT_TEMPLATE) -> str:
    """
    A chat template of this file for a tokenizer. The released code tokenizes the text after an image as the start of a
    text, to which Llama's sentencepiece tokenizer adds a space: the templates' `image_suffix`. Other tokenizers get
    none.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        chat_template (`str`, *optional*): `VICUNA_V1_CHAT_TEMPLATE` or `PLAIN_CHAT_TEMPLATE`.
    """
    marks_start = tokenizer.tokenize("a")[0].startswith("▁")
    return chat_template if marks_start else chat_template.replace("image_suffix = ' '", "image_suffix = ''")


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
            Stands for one image in the text, and for each of its features in the expanded prompt.

    Raises:
        ValueError: If the tokenizer does not know `image_token`.

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
        image_processor: BaseImageProcessor,
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

    def __call__(
        self, images: Any = None, text: Any = None, videos: None = None, audio: None = None, **kwargs: Any
    ) -> BatchFeature:
        """
        Like [`ProcessorMixin.__call__`]. A text that begins with the start token, as the chat template's do, gets no
        second one.

        Args:
            images: Images of the texts in their order, flat or a list for each text. See [`LlavaHrImageProcessor`].
            text (`str` or `list[str]`): Prompts with one image token for each image.
            size, low_res_size (`int`, *optional*): Sides of the image and of its low-resolution view in pixels, for
                this call.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, `(batch_size, sequence_length)` each, and with images
            `pixel_values` `(images, 3, H, H)`. Where this call's low-resolution side differs from the one that the
            model computes (the saved one or the released rule), also `low_res_pixel_values` `(images, 3, L, L)`.

        Raises:
            ValueError: If images and tags differ in number, an image cannot be used, or truncation would cut one.
        """
        first = text if isinstance(text, str) or not text else text[0]
        bos_token = self.tokenizer.bos_token
        has_start = bos_token is not None and isinstance(first, str) and first.startswith(bos_token)
        if has_start and "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", False)
        inputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        offsets = inputs.get("offset_mapping")
        if "text_replacement_offsets" in inputs and isinstance(offsets, torch.Tensor):
            # `apply_chat_template` iterates over it to mask the answers, which is slow over a tensor
            inputs["offset_mapping"] = offsets.tolist()
        return inputs

    def apply_chat_template(
        self, conversation: list[dict] | list[list[dict]], chat_template: str | None = None, **kwargs: Any
    ) -> str | list[str] | BatchFeature:
        """
        Like [`ProcessorMixin.apply_chat_template`]. An image is a part of its own: an image token in a part of text,
        an answer or the system text is text, and gets a space inside. Keys with the value `None`, as Arrow adds them
        to parts, are ignored.

        Raises:
            ValueError: If a conversation does not have the form of messages, or not the one that the template knows;
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
        # saving notes in these objects where their code lies; that belongs into the files alone
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
        if text is None:
            return
        samples = [text] if isinstance(text, str) else text
        for index, sample in enumerate(samples):
            try:
                sample.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"Sample {index} of `text` has half a character (an unpaired surrogate) at position "
                    f"{error.start}, as cutting a text between two bytes leaves. Take it out: "
                    'text.encode(errors="replace").decode().'
                ) from error
        num_tags = [sample.count(self.image_token) for sample in samples]
        is_nested = isinstance(images, (list, tuple)) and all(isinstance(sample, (list, tuple)) for sample in images)
        if not is_nested:
            num_images = len(make_flat_list_of_images(images)) if images is not None else 0
            if sum(num_tags) != num_images:
                raise ValueError(
                    f"`text` has {sum(num_tags)} {self.image_token} tags, but `images` has {num_images} images. "
                    f"Give one tag for each image."
                )
            return
        if len(images) != len(num_tags):
            raise ValueError(f"`images` is a list of {len(images)} lists, but `text` has {len(num_tags)} samples.")
        for index, (tags, sample_images) in enumerate(zip(num_tags, images, strict=True)):
            if tags != len(sample_images):
                raise ValueError(
                    f"Sample {index} has {tags} {self.image_token} tags in its text, but {len(sample_images)} "
                    f"images in `images`. Give one tag for each image."
                )

    @property
    def model_input_names(self) -> list[str]:
        """What the processor returns by default: without the view that the model makes itself."""
        return [name for name in super().model_input_names if name != "low_res_pixel_values"]

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        low_res_size = self.image_processor.get_low_res_size(**kwargs)
        made_by_model = low_res_size == self.image_processor.get_low_res_size(kwargs.get("size"))
        return super()._process_images(images, **{"return_low_res": not made_by_model, **kwargs})

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that replaces the tag of image `image_idx`: one image token for each of its features."""
        patch_size = kwargs.get("patch_size", self.image_processor.patch_size)
        return self.image_token * get_num_image_tokens(self.image_processor.get_low_res_size(**kwargs), patch_size)

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """
        Number of image tokens of images that are not available yet; vLLM plans its memory with it.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): Heights and widths of the images in pixels. Only their
                number matters: each image becomes one square.
            kwargs: Arguments of the image processor: `size`, `low_res_size`.

        Returns:
            `MultiModalData` with `num_image_tokens` and `num_image_patches` (1 each) for each image.
        """
        if image_sizes is None:
            return MultiModalData()
        num_tokens = self.replace_image_token({}, 0, **kwargs).count(self.image_token)
        return MultiModalData(
            num_image_tokens=[num_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def _is_object(value: Any) -> bool:
    """Whether transformers makes a dict of this message, or part of one: of dataclasses and pydantic's models."""
    return is_dataclass(value) or hasattr(value, "model_dump")


def is_unicode(text: str) -> bool:
    """Whether a text has no unpaired surrogate: JSON lets them through, tokenizers and Arrow do not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_messages(messages: Any, name: str) -> list:
    """
    The one check of the structure of a conversation.

    Args:
        messages (`list[dict]`): The messages.
        name (`str`): What errors call them.

    Returns:
        `list`: The messages without keys that are `None`.

    Raises:
        ValueError: If this is not a list of messages, or a part has more than one image.
    """
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"`{name}` must be a list of messages, but is {messages!r:.80}.")
    if not messages:
        raise ValueError(f"`{name}` is empty: give at least one message.")
    checked = []
    for index, message in enumerate(messages):
        if _is_object(message):
            checked.append(message)
            continue
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"`{name}[{index}]` must be a dict with `role` and `content`, but is {message!r:.80}.")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise ValueError(
                f"The content of `{name}[{index}]` must be a string or a list of parts, but is {content!r:.80}."
            )
        if isinstance(content, (list, tuple)):
            parts = [_check_part(part, f"Part {n} of `{name}[{index}]`") for n, part in enumerate(content)]
            message = {**message, "content": parts}
        checked.append(message)
    return checked


def _check_part(part: Any, where: str) -> Any:
    if _is_object(part):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError(f"{where} must be a dict with `type`, but is {part!r:.80}.")
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"{where} must have a string as `text`, but has {part.get('text')!r:.80}.")
    sources = [key for key in IMAGE_KEYS if part.get(key) is not None]
    if part["type"] == "image" and len(sources) > 1:
        raise ValueError(f"{where} must have one image, but has {', '.join(sources)}.")
    return {key: value for key, value in part.items() if value is not None}


__all__ = ["LlavaHrProcessor", "PLAIN_CHAT_TEMPLATE", "VICUNA_V1_CHAT_TEMPLATE"]
