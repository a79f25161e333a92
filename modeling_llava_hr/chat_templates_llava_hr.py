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
"""Prompt forms of the released models, as Jinja templates, and the check of the conversations that they render."""

from dataclasses import is_dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase


# Keys of a message's part that may hold its image
IMAGE_KEYS = ("image", "url", "path", "base64")

# Stage 2 and inference of the released models ("vicuna_v1"). Images come first in their message, each on its own line,
# wherever their parts are, as in the training of these models. If a user's message is one string, its tags stay in
# place; in all other text a tag is plain text, and a space keeps it from being tokenized as an image. The space after
# the start token and `image_suffix`, see [`get_chat_template`], give the token ids of the released code. vLLM detects
# from the loop over `message['content']` that contents are lists of parts.
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
    Adapts a chat template of this file to a tokenizer. The released code tokenizes the text after an image separately,
    so Llama's sentencepiece tokenizer puts a space before it: the templates' `image_suffix`, which is empty for other
    tokenizers.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        chat_template (`str`, *optional*): `VICUNA_V1_CHAT_TEMPLATE` or `PLAIN_CHAT_TEMPLATE`.
    """
    marks_start = tokenizer.tokenize("a")[0].startswith("▁")
    return chat_template if marks_start else chat_template.replace("image_suffix = ' '", "image_suffix = ''")


def _is_object(value: Any) -> bool:
    """Whether transformers converts this message or part to a dict, as it does dataclasses and pydantic models."""
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
    Checks the structure of a conversation.

    Args:
        messages (`list[dict]`): The messages.
        name (`str`): Name of the conversation in error messages.

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


__all__ = ["PLAIN_CHAT_TEMPLATE", "VICUNA_V1_CHAT_TEMPLATE", "check_messages", "get_chat_template", "is_unicode"]
