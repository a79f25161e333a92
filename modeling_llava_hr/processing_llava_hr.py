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
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .configuration_llava_hr import get_num_image_tokens


# Where a part of a message may have its picture
PICTURE_KEYS = ("image", "url", "path", "base64")

# Stage 2 and inference of the released models ("vicuna_v1"). Pictures come first in their message, each on a line of
# its own, wherever they stand among the parts: so the models were trained. If a user's message is one string, its
# tags stay where they are; in all other text a tag is text, and a space keeps it from being tokenized as a picture.
# The space after the first token is what the released tokenization of a text's start amounts to.
# `image_suffix` is not set here but by vLLM's users: vLLM tokenizes the prompt itself (docs/serving.md). That contents
# are lists of parts, it finds by the loop over `message['content']`, which must stand as it is.
VICUNA_V1_CHAT_TEMPLATE = """\
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
{{- message['content'] + ' ' -}}
{%- else -%}
{%- if message['content'] -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}{{- '<image>' + (image_suffix | default('')) + '\\n' -}}
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

# Stage 1 of the released models ("plain"): picture and caption, no system text, no roles.
PLAIN_CHAT_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set content = message['content'] -%}
{%- set text = content if content is string else (content or []) | map(attribute='text') | join('\\n') -%}
{%- generation -%}{{- text | replace('<image>', '< image>') + '\\n' -}}{%- endgeneration -%}
{%- else -%}
{{- '<image>' -}}
{%- endif -%}
{%- endfor -%}
"""


class LlavaHrProcessor(ProcessorMixin):
    r"""
    Image processor, tokenizer and chat template of LLaVA-HR in one.

    Args:
        image_processor ([`LlavaHrImageProcessor`] or [`LlavaHrImageProcessorPil`]):
            Makes the two views of a picture.
        tokenizer (`PreTrainedTokenizerBase`):
            Any tokenizer that has `image_token` as one token.
        chat_template (`str`, *optional*):
            Jinja template of the conversation; the prompt form of the released models ("vicuna_v1") by default.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Stands for one picture in the text, and for each of its features in the expanded prompt.
        image_suffix (`str`, *optional*, defaults to `""`):
            Put between a picture and the text after it. `" "` for Llama's sentencepiece tokenizer gives the token ids
            of the released code, which tokenizes the text after a picture as the start of a text.

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
    ...     processor_kwargs={"size": 336, "high_res_size": 1536},  # a sharper view, still 576 tokens
    ... )
    ```"""

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        image_suffix: str = "",
    ) -> None:
        self.image_token = image_token
        self.image_suffix = image_suffix
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`tokenizer` does not have the image token {image_token!r}. Add it with "
                f"`tokenizer.add_tokens({image_token!r}, special_tokens=True)` and extend the model's embeddings, or "
                f"start from a folder made by conversion.assemble."
            )
        if chat_template is None:
            chat_template = VICUNA_V1_CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: None = None, audio: None = None, **kwargs: Any
    ) -> BatchFeature:
        """
        Like [`ProcessorMixin.__call__`]. A text that begins with the start token, as the chat template's do, gets no
        second one.

        Args:
            images: Pictures of the texts in their order, flat or a list for each text. See [`LlavaHrImageProcessor`].
            text (`str` or `list[str]`): Prompts with one image token for each picture.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask`, `(batch_size, sequence_length)` each, and with
            pictures `pixel_values` `(images, 3, L, L)` and `high_res_pixel_values` `(images, 3, H, H)`.

        Raises:
            ValueError: If pictures and tags differ in number, a picture cannot be used, or truncation would cut one.
        """
        first = text if isinstance(text, str) or not text else text[0]
        bos_token = self.tokenizer.bos_token
        has_start = bos_token is not None and isinstance(first, str) and first.startswith(bos_token)
        if has_start and "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", False)
        return super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def apply_chat_template(
        self, conversation: list[dict] | list[list[dict]], chat_template: str | None = None, **kwargs: Any
    ) -> str | list[str] | BatchFeature:
        """
        Like [`ProcessorMixin.apply_chat_template`]. A picture is a part of its own: an image token that somebody wrote
        into a part of text, an answer or the system text is text, and gets a space inside.

        Raises:
            ValueError: If a conversation does not have the form of messages, or not the one that the template knows;
                the message says where.
        """
        is_batched = isinstance(conversation, (list, tuple)) and isinstance(
            next(iter(conversation), None), (list, tuple)
        )
        for index, messages in enumerate(conversation if is_batched else [conversation]):
            _check_messages(messages, f"conversation[{index}]" if is_batched else "conversation")
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
        Checks that texts and pictures belong together, sample by sample where `images` is a list per sample.

        Raises:
            ValueError: If there is neither, a text is no Unicode, or the number of image tags differs from that of the
                pictures.
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
                    f"`text` has {sum(num_tags)} {self.image_token} tags, but `images` {num_images} pictures. Give "
                    f"one tag for each picture."
                )
            return
        if len(images) != len(num_tags):
            raise ValueError(f"`images` is a list of {len(images)} lists, but `text` has {len(num_tags)} samples.")
        for index, (tags, sample_images) in enumerate(zip(num_tags, images, strict=True)):
            if tags != len(sample_images):
                raise ValueError(
                    f"Sample {index} has {tags} {self.image_token} tags in its text, but {len(sample_images)} "
                    f"pictures in `images`. Give one tag for each picture."
                )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that stands for picture `image_idx`: one image token for each of its features."""
        size = image_inputs["pixel_values"][image_idx].shape[-1]
        return self.image_token * get_num_image_tokens(size, kwargs.get("patch_size", self.image_processor.patch_size))

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Iterable[str] = (),
        videos_replacements: Iterable[str] = (),
        audio_replacements: Iterable[str] = (),
    ) -> tuple[list[str], list[list[dict]]]:
        """Like [`ProcessorMixin.get_text_with_replacements`], with `image_suffix` after pictures that text follows."""
        text, batch_offsets = super().get_text_with_replacements(
            text, list(images_replacements), list(videos_replacements), list(audio_replacements)
        )
        if not self.image_suffix:
            return text, batch_offsets
        for index, offsets in enumerate(batch_offsets):
            text[index], batch_offsets[index] = self._add_image_suffixes(text[index], offsets)
        return text, batch_offsets

    def _add_image_suffixes(self, sample: str, offsets: list[dict]) -> tuple[str, list[dict]]:
        pieces, new_offsets, last, shift = [], [], 0, 0
        for offset in offsets:
            start, end = offset["new_span"]
            new_offsets.append({**offset, "new_span": (start + shift, end + shift)})
            pieces.append(sample[last:end])
            last = end
            if end < len(sample) and not sample.startswith(self.image_token, end):
                pieces.append(self.image_suffix)
                shift += len(self.image_suffix)
                # An insertion of its own, one character on: an answer that begins right after a picture begins with
                # the suffix, as its label does in the released code
                after = offset["span"][1] + 1
                span, new_span = (after, after), (end + shift + 1, end + shift + 1)
                new_offsets.append(
                    {"type": "image", "span": span, "new_span": new_span, "text": "", "replacement": self.image_suffix}
                )
        return "".join([*pieces, sample[last:]]), new_offsets

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """
        Number of image tokens for pictures that are not at hand yet; vLLM plans its memory with it.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): Heights and widths of the pictures in pixels. Only
                their number matters: each picture becomes one square view of the same size.

        Returns:
            `MultiModalData` with `num_image_tokens` and `num_image_patches` (1 each) for each picture.
        """
        if image_sizes is None:
            return MultiModalData()
        size = kwargs.get("size") or self.image_processor.size
        size = size if isinstance(size, int) else size["height"]
        num_tokens = get_num_image_tokens(size, self.image_processor.patch_size)
        return MultiModalData(
            num_image_tokens=[num_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )


def _is_object(value: Any) -> bool:
    """Whether transformers makes a dict of this message, or part of one: of dataclasses and pydantic's models."""
    return is_dataclass(value) or hasattr(value, "model_dump")


def _check_messages(messages: Any, name: str) -> None:
    """Raises ValueError unless `messages` are ones of any chat template, with one picture in each part at most."""
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"`{name}` must be a list of messages, but is {messages!r:.80}.")
    if not messages:
        raise ValueError(f"`{name}` is empty: give at least one message.")
    for index, message in enumerate(messages):
        if _is_object(message):
            continue
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"`{name}[{index}]` must be a dict with `role` and `content`, but is {message!r:.80}.")
        content = message.get("content")
        if content is not None and not isinstance(content, (str, list, tuple)):
            raise ValueError(
                f"The content of `{name}[{index}]` must be a string or a list of parts, but is {content!r:.80}."
            )
        for number, part in enumerate(content if isinstance(content, (list, tuple)) else []):
            where = f"Part {number} of `{name}[{index}]`"
            if _is_object(part):
                continue
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise ValueError(f"{where} must be a dict with `type`, but is {part!r:.80}.")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise ValueError(f"{where} must have a string as `text`, but has {part.get('text')!r:.80}.")
            sources = [key for key in PICTURE_KEYS if part.get(key) is not None]
            if part["type"] == "image" and len(sources) > 1:
                raise ValueError(f"{where} must have one picture, but has {', '.join(sources)}.")


__all__ = ["LlavaHrProcessor", "PLAIN_CHAT_TEMPLATE", "VICUNA_V1_CHAT_TEMPLATE"]
