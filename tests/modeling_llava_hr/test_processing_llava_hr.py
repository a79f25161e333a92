# SPDX-License-Identifier: Apache-2.0
"""The processor against recorded prompts, token ids and labels of the released code (tests/fixtures/reference)."""

import re

import pytest
import torch
from chats import chat, tokenize
from converted_checkpoints import NUM_IMAGE_TOKENS, REFERENCE, STAGES, read_cases
from jinja2 import Environment, nodes
from PIL import Image
from sentencepiece import SentencePieceProcessor
from tiny_configs import make_bpe_tokenizer
from transformers import AutoProcessor

from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrProcessor
from modeling_llava_hr.processing_llava_hr import PLAIN_CHAT_TEMPLATE, VICUNA_V1_CHAT_TEMPLATE


CASES = [pytest.param(stage, case, id=f"{stage}-{case['name']}") for stage in STAGES for case in read_cases(stage)]


@pytest.fixture
def processor(converted_stage2):
    return AutoProcessor.from_pretrained(converted_stage2)


def collapse(processor, ids, num_tokens, *others):
    """Ids as the released code has them before expansion, -200 for an image; and the same places of other lists."""
    kept, position = [], 0
    while position < len(ids):
        kept.append(position)
        if ids[position] == processor.image_token_id:
            assert ids[position : position + num_tokens] == [processor.image_token_id] * num_tokens
            position += num_tokens
        else:
            position += 1
    collapsed = [-200 if ids[index] == processor.image_token_id else ids[index] for index in kept]
    return collapsed, *([other[index] for index in kept] for other in others)


@pytest.mark.parametrize(("stage", "case"), CASES)
def test_recorded_prompts_ids_and_labels(converted, stage, case):
    processor = AutoProcessor.from_pretrained(converted[stage])
    options = {"add_generation_prompt": case["messages"][-1]["role"] == "user"}
    template = PLAIN_CHAT_TEMPLATE if "caption" in case else None
    inputs = tokenize(
        processor, case["messages"], chat_template=template, return_assistant_tokens_mask=True, **options
    )
    ids, mask = inputs["input_ids"][0].tolist(), torch.as_tensor(inputs["assistant_masks"])[0].tolist()
    collapsed, mask = collapse(processor, ids, NUM_IMAGE_TOKENS[stage], mask)
    assert collapsed == case["input_ids_before_expansion"]
    if "labels_before_expansion" in case:
        labels = [token if kept else -100 for token, kept in zip(collapsed, mask, strict=True)]
        assert labels == case["labels_before_expansion"]
    if "prompt" in case:
        prompt = processor.apply_chat_template(case["messages"], **options)
        # the space makes the tokenizer treat what follows as the start of a text, as the released code does
        assert prompt == "<s> " + case["prompt"].replace("<image>", "<image> ")
        # in two steps: the template's text begins with the start token, which stays alone
        assert processor(text=prompt, images=case["images"] or None)["input_ids"][0] == ids
        assert len(ids) == case["sequence_length"]


def test_a_caption_that_begins_with_a_lone_space_token_is_supervised_from_there(processor):
    """The released code tokenizes "4711" as a text of its own: "▁", "4", ...; all of it is label."""
    messages = [*chat("", Image.new("RGB", (8, 8))), {"role": "assistant", "content": "4711 is read."}]
    options = {"return_assistant_tokens_mask": True, "add_generation_prompt": False}
    inputs = tokenize(processor, messages, chat_template=PLAIN_CHAT_TEMPLATE, **options)
    ids, mask = inputs["input_ids"][0].tolist(), torch.as_tensor(inputs["assistant_masks"])[0].tolist()
    ids, mask = collapse(processor, ids, 1024, mask)
    expected = processor.tokenizer("4711 is read.\n", add_special_tokens=False)["input_ids"]
    assert ids[2:] == expected and processor.tokenizer.convert_ids_to_tokens(ids[2]) == "▁"
    assert mask == [0, 0] + [1] * len(expected)


def test_answers_alone_are_supervised_with_several_images_and_turns(processor):
    image = Image.new("RGB", (8, 8))
    messages = [
        *chat("Compare.", image, image),
        {"role": "assistant", "content": "They are equal."},
        *chat("And this?", image),
        {"role": "assistant", "content": "The same."},
    ]
    inputs = tokenize(processor, messages, return_assistant_tokens_mask=True, add_generation_prompt=False)
    ids, mask = inputs["input_ids"][0], torch.as_tensor(inputs["assistant_masks"])[0].bool()
    tokens = processor.tokenizer.convert_ids_to_tokens(ids[mask])
    assert "".join(tokens).replace("▁", " ") == " They are equal.</s> The same.</s>"


@pytest.mark.parametrize("for_masks", [True, False])
def test_offsets_for_masks_are_a_list(processor, for_masks):
    """transformers iterates over them in Python; over a tensor that takes most of the time of a training batch."""
    kwargs = {"return_offsets_mapping": True, "return_text_replacement_offsets": for_masks, "return_tensors": "pt"}
    offsets = processor(text="Hello there", **kwargs)["offset_mapping"]
    assert isinstance(offsets, list if for_masks else torch.Tensor)
    assert torch.as_tensor(offsets)[0, -1, 1] == len("Hello there")


def text_after_last_system_sentence(prompt):
    return prompt.split("user's questions. ")[1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hello", "USER: Hello ASSISTANT:"),
        ([{"type": "text", "text": "Hello"}], "USER: Hello ASSISTANT:"),
        ("<image>\nWhat?", "USER: <image> \nWhat? ASSISTANT:"),
        ("Compare <image> and <image>.", "USER: Compare <image>  and <image> . ASSISTANT:"),
        ("<image><image>\nWhat?", "USER: <image><image> \nWhat? ASSISTANT:"),
        ([{"type": "image"}, {"type": "text", "text": "What?"}], "USER: <image> \nWhat? ASSISTANT:"),
        ([{"type": "text", "text": "What?"}, {"type": "image"}], "USER: <image> \nWhat? ASSISTANT:"),
        (
            [{"type": "image"}, {"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}],
            "USER: <image> \n<image> \nA\nB ASSISTANT:",
        ),
    ],
)
def test_content_as_string_or_parts(processor, content, expected):
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text_after_last_system_sentence(prompt) == expected


@pytest.mark.parametrize("content", ["Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_system_message(processor, content):
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == "<s> Be brief. USER: Hi ASSISTANT:"
    messages[0]["content"] = ""
    assert processor.apply_chat_template(messages) == "<s> USER: Hi "


def test_continue_a_started_answer(processor):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two"}]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert text_after_last_system_sentence(prompt) == "USER: Count. ASSISTANT: One, two"


def test_unknown_parts_are_named(processor):
    with pytest.raises(Exception, match="'text' or 'image', but got 'audio'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])
    url = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "Hi"}]
    assert "<image> \nHi" in processor.apply_chat_template([{"role": "user", "content": url}])


@pytest.mark.parametrize("role", ["tool", "human"])
def test_unknown_roles_are_named(processor, role):
    with pytest.raises(Exception, match=f"'assistant'.*got '{role}'"):
        processor.apply_chat_template([{"role": role, "content": "Hi"}])


@pytest.mark.parametrize("kind", ["converted_stage2", "converted_stage2_legacy"])
@pytest.mark.parametrize(
    "pieces", [["Compare ", " and ", "."], ["", "", " What?"], ["Look:", "\nWhat is  this", ""], ["", "4711", "\n\n"]]
)
def test_text_between_images_is_tokenized_as_the_start_of_a_text(request, kind, pieces):
    """Independent: the released code tokenizes each piece by itself, with sentencepiece, and joins them."""
    processor = AutoProcessor.from_pretrained(request.getfixturevalue(kind))
    sentencepiece = SentencePieceProcessor(str(REFERENCE / "stage2-1024" / "checkpoint" / "tokenizer.model"))
    message = {"role": "user", "content": "<image>".join(pieces)}
    text = processor.apply_chat_template([{"role": "system", "content": ""}, message])
    inputs = processor(images=[Image.new("RGB", (8, 8))] * 2, text=text)
    first, second, third = map(sentencepiece.encode, ("USER: " + pieces[0], pieces[1], pieces[2] + " "))
    ids = collapse(processor, inputs["input_ids"][0], 1024)[0]
    assert ids == [sentencepiece.bos_id(), *first, -200, *second, -200, *third]


def test_text_after_the_end_of_an_answer_depends_on_the_tokenizer_kind(converted_stage2, converted_stage2_legacy):
    """Legacy tokenizers treat it as the start of a text; the others do not."""
    sentencepiece = SentencePieceProcessor(str(REFERENCE / "stage2-1024" / "checkpoint" / "tokenizer.model"))
    for folder, legacy in ((converted_stage2, False), (converted_stage2_legacy, True)):
        ids = AutoProcessor.from_pretrained(folder)(text="Yes</s>USER: Hi")["input_ids"][0]
        after = ids[ids.index(sentencepiece.eos_id()) + 1 :]
        as_start = sentencepiece.encode("USER: Hi")
        assert (after == as_start) is legacy
        assert sentencepiece.decode(after) == "USER: Hi"


def test_other_tokenizers_get_no_extra_space(processor):
    other = LlavaHrProcessor(processor.image_processor, make_bpe_tokenizer("<image>"))
    assert other.apply_chat_template([{"role": "user", "content": "Hi"}]).startswith("A chat between")
    for content in ("<image>\nHi", [{"type": "image"}, {"type": "text", "text": "Hi"}]):
        assert "USER: <image>\nHi " in other.apply_chat_template([{"role": "user", "content": content}])


def test_a_tokenizer_without_the_image_token_is_refused(processor):
    with pytest.raises(ValueError, match=r"`tokenizer` does not have the image token '<photo>'"):
        LlavaHrProcessor(processor.image_processor, make_bpe_tokenizer("<image>"), image_token="<photo>")


@pytest.mark.parametrize(
    ("sizes", "size", "low_res_size", "tokens"),
    [
        ({"size": 384}, 384, None, 576),
        ({"size": 768, "low_res_size": 336}, 768, None, 576),
        ({}, 1024, None, 1024),
        ({"size": {"height": 1536, "width": 1536}, "low_res_size": {"height": 672, "width": 672}}, 1536, None, 2304),
        ({"size": 1536, "low_res_size": 336}, 1536, 336, 576),
        ({"low_res_size": 672}, 1024, 672, 2304),
    ],
)
def test_sizes_can_be_given_per_call(processor, sizes, size, low_res_size, tokens):
    """The low-resolution view is returned where the model would not make the same one (`low_res_size` is not None)."""
    image = Image.new("RGB", (60, 40), "red")
    for inputs in (
        processor(images=image, text="<image>\nHi", return_tensors="pt", **sizes),
        processor(images=image, text="<image>\nHi", return_tensors="pt", images_kwargs=sizes),
        tokenize(processor, chat("Hi", image), processor_kwargs=sizes),
    ):
        assert inputs["pixel_values"].shape == (1, 3, size, size)
        assert ("low_res_pixel_values" in inputs) == (low_res_size is not None)
        if low_res_size is not None:
            assert inputs["low_res_pixel_values"].shape == (1, 3, low_res_size, low_res_size)
        assert (inputs["input_ids"] == processor.image_token_id).sum() == tokens
    data = processor._get_num_multimodal_tokens(image_sizes=[(40, 60), (9, 9)], **sizes)
    assert data["num_image_tokens"] == [tokens] * 2 and data["num_image_patches"] == [1, 1]


def test_a_saved_low_resolution_side_is_the_models(processor, tmp_path):
    """What differs from the saved side travels with the inputs; the saved side itself does not."""
    processor.image_processor = LlavaHrImageProcessor(size=768, low_res_size=336)
    processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (8, 8))
    for sizes, names in (
        ({}, {"pixel_values"}),
        ({"size": 1536}, {"pixel_values"}),
        ({"size": 1536, "low_res_size": 672}, {"pixel_values", "low_res_pixel_values"}),
    ):
        inputs = processor(images=image, text="<image>\nHi", return_tensors="pt", **sizes)
        assert set(inputs) - {"input_ids", "attention_mask"} == names
        assert (inputs["input_ids"] == processor.image_token_id).sum() == (sizes.get("low_res_size", 336) // 14) ** 2


def test_keys_without_a_value_are_ignored(processor):
    """Arrow gives each part the keys of all parts."""
    image = Image.new("RGB", (8, 8), "red")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]
    arrow = [{"type": None, "text": None, "image": None, "path": None, **part} for part in parts]
    expected, inputs = (tokenize(processor, [{"role": "user", "content": content}]) for content in (parts, arrow))
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert arrow[1]["image"] is None  # the caller's messages stay as they are


def test_count_mismatches_are_named(processor):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="2.*1"):
        processor(images=[image], text="<image>\n<image>\nHi")
    with pytest.raises(ValueError, match="no images|1 <image> tags, but `images` has 0 images"):
        processor(text="<image>\nHi")
    # as many tags as images in all, but not in each sample
    with pytest.raises(ValueError, match=r"texts have \[2, 0\] of them and the lists \[1, 1\] images"):
        processor(images=[[image], [image]], text=["<image>\n<image>\nHi", "Hi"])
    with pytest.raises(ValueError, match=r"texts have \[1, 1\] of them and the lists \[2\] images"):
        processor(images=[[image, image]], text=["<image>\nHi", "<image>\nHi"])


def test_truncation_that_would_cut_an_image_is_an_error(processor):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="truncation"):
        processor(images=image, text="<image>\nHi", truncation=True, max_length=100)


def test_batches_pad_on_the_left(processor):
    image = Image.new("RGB", (8, 8))
    inputs = processor(images=[[image], []], text=["<image>\nHi", "Hi there"], padding=True, return_tensors="pt")
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][1, -1] == 1
    assert inputs["pixel_values"].shape[0] == 1


def test_text_alone_has_no_pixels(processor):
    inputs = tokenize(processor, chat("Hi"))
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_save_and_load_twice(tmp_path, processor):
    image, text = Image.new("RGB", (30, 20), "green"), "</s>USER: <image>\nHi ASSISTANT: <image>"
    expected = processor(images=[image, image], text=text, return_tensors="pt")
    for name in ("a", "b"):
        processor.save_pretrained(tmp_path / name)
        processor = AutoProcessor.from_pretrained(tmp_path / name)
    assert isinstance(processor, LlavaHrProcessor)
    again = processor(images=[image, image], text=text, return_tensors="pt")
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_vllm_finds_that_contents_are_lists_of_parts():
    """vLLM looks for a loop over `message['content']` itself; without one it joins the parts to a string."""
    # transformers' own tag, which marks what an assistant says
    template = re.sub(r"{%- ?(end)?generation ?-%}", "", VICUNA_V1_CHAT_TEMPLATE)
    loops = [loop.iter for loop in Environment().parse(template).find_all(nodes.For)]
    over = [(loop.node.name, loop.arg.value) for loop in loops if isinstance(loop, nodes.Getitem)]
    assert over == [("message", "content")]
