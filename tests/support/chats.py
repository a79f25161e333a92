# SPDX-License-Identifier: Apache-2.0
"""Chats of one question, and the inputs that a processor makes of chats."""

from pathlib import Path

from PIL import Image
from transformers import BatchFeature, ProcessorMixin


def chat(text: str, *images: Image.Image | str | Path) -> list[dict]:
    """A question about images, which are PIL's or paths."""
    parts = [{"type": "image", "image": str(image) if isinstance(image, Path) else image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def tokenize(processor: ProcessorMixin, chats: list, **kwargs) -> BatchFeature:
    """A model's inputs for one chat, or for a list of chats (with `processor_kwargs={"padding": True}`)."""
    kwargs = {"add_generation_prompt": True, **kwargs}
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)
