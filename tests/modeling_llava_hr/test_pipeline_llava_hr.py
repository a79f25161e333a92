# SPDX-License-Identifier: Apache-2.0
"""`pipeline("image-text-to-text")` with the tiny model: batches of chats give the single answers."""

from pathlib import Path

import pytest
import torch
from chats import chat, tokenize
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


EXAMPLES = Path(__file__).parent.parent.parent / "examples"
IMAGES = [EXAMPLES / "pictures" / f"{name}.jpg" for name in ("street", "receipt")]
SIGN, SHOWN = "What does the green sign say?", "What is shown?"
CHATS = [chat(SIGN, IMAGES[0]), chat(SHOWN, IMAGES[1]), chat(SHOWN, *IMAGES), chat(SIGN, *reversed(IMAGES))]


@pytest.fixture(scope="module")
def pipe():
    return pipeline("image-text-to-text", model=str(EXAMPLES / "tiny-llava-hr"), dtype=torch.float32)


@pytest.mark.parametrize("sizes", [{}, {"size": 512, "low_res_size": 56}], ids=["saved sides", "other sides"])
def test_batches_of_chats_with_one_and_several_images(pipe, sizes):
    def ask(chats, **kwargs):
        options = {"max_new_tokens": 8, "return_full_text": False, "processor_kwargs": dict(sizes)}
        return [output[0]["generated_text"] for output in pipe(chats, **options, **kwargs)]

    expected = [ask([chat])[0] for chat in CHATS]
    assert len(set(expected)) > 1 and (sizes or expected[0].strip() == "1471")
    if sizes:  # the pipeline keeps one row of a tensor that it does not know
        with pytest.raises(ValueError, match=r"`low_res_pixel_values` must have.*got \(2, 3, 56, 56\) with 3 images"):
            ask(CHATS[1:3], batch_size=2)
    else:
        assert ask(CHATS, batch_size=2) == expected


def test_chats_with_and_without_images_are_not_mixed(pipe):
    """transformers batches inputs of the same names alone; a padded batch of the processor takes both."""
    chats = [CHATS[0], chat("Say hello.")]
    with pytest.raises(ValueError, match="different keys"):
        pipe(chats, batch_size=2, max_new_tokens=8)
    inputs = tokenize(pipe.processor, chats, processor_kwargs={"padding": True})
    output = pipe.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = pipe.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers == [pipe(chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"] for chat in chats]
