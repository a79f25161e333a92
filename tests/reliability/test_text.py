# SPDX-License-Identifier: Apache-2.0
"""
Bad text: whatever is written, an image's tokens are where an image was given, and nowhere else; unusable text is a
ValueError that names its place, before anything large is computed.
"""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from chats import tokenize
from converted_checkpoints import TINY_MODEL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from modeling_llava_hr import LlavaHrImageProcessor
from modeling_llava_hr.processing_llava_hr import PLAIN_CHAT_TEMPLATE
from training.check_data import CheckOptions, check_data
from training.data import DataConfig, load_table, to_messages


MODELS = ("tiny", "stage1-384", "stage2-1024")
IMAGE = Image.new("RGB", (9, 9), "red")
FORMS = [pytest.param(100, id="short"), pytest.param(3000, id="long", marks=pytest.mark.slow)]
MAX_SECONDS = 20  # on a busy machine


@pytest.fixture(scope="module")
def processors(converted):
    """The tiny model's and those of two converted checkpoints, with views of the fewest pixels that give 4 tokens."""
    processors = {name: AutoProcessor.from_pretrained(folder) for name, folder in converted.items()}
    processors["tiny"] = AutoProcessor.from_pretrained(TINY_MODEL)
    for processor in processors.values():
        processor.image_processor = LlavaHrImageProcessor(size=64, low_res_size=28)
    return processors


NUM_TOKENS = 4


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


def image(**source) -> dict:
    return {"type": "image", **(source or {"image": IMAGE})}


def text(value) -> dict:
    return {"type": "text", "text": value}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def get_runs(ids: torch.Tensor, image_token_id: int) -> list[int]:
    """Lengths of the runs of image tokens."""
    return [len(run) for run in re.findall("1+", "".join("01"[token == image_token_id] for token in ids.tolist()))]


# --- any text ---

# Special to a tokenizer, a template, a decoder or a terminal, and pieces of that
PIECES = [
    *("<image>", "<ima", "ge>", "<", ">", "< image>", "<<image>image>", "<IMAGE>", "＜image＞", "<image/>"),
    *("&lt;image&gt;", "<s>", "</s>", "<unk>", "<pad>", "USER: ", "ASSISTANT:", "{{ messages }}", "{% for %}"),
    *("\\n", "\n", "\r\n", "\t", "", " ", "  ", "\0", "\x1b[2J", "\u202e", "\u200b", "\ufeff", "\ufffd"),
    *("é", "e\u0301", "日本", "\U0001f469\u200d\U0001f467", "\U0010ffff"),
]
SURROGATES = ["\ud83d", "\udc00", "\udfff\ud800"]


def texts(*more: str) -> st.SearchStrategy[str]:
    pieces = st.sampled_from([*PIECES, *more]) | st.text(max_size=5)
    return st.lists(pieces, max_size=8).map("".join)


def conversations(written: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict]]:
    """Turns of user and assistant with any text, images anywhere in the user's, optionally after a system text."""
    part = st.one_of(written.map(text), st.builds(image))
    question = st.lists(part, max_size=4).map(lambda parts: user(*parts))
    answer = st.one_of(written, written.map(lambda value: [text(value)]))
    turns = st.lists(st.tuples(question, answer), max_size=3)
    system = st.lists(written, max_size=1)

    def build(system, turns, last):
        messages = [{"role": "system", "content": value} for value in system]
        for asked, answered in turns:
            messages += [asked, {"role": "assistant", "content": answered}]
        return [*messages, last]

    return st.builds(build, system, turns, question)


def count_images(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for m in messages if m["role"] == "user" for part in m["content"])


def fuzz(num_examples: int, strategy: st.SearchStrategy, try_one) -> None:
    @settings(
        max_examples=num_examples,
        derandomize=True,
        database=None,
        deadline=1000 * MAX_SECONDS,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value):
        try_one(value)

    run()


@pytest.mark.parametrize("num_examples", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_image_tokens_are_those_of_the_images(processors, name, num_examples, capsys):
    """Whatever the text: each image has its tokens, and nothing else has any."""
    processor, count = processors[name], [0, 0]

    def try_one(messages):
        inputs = tokenize(processor, messages)
        num_images = count_images(messages)
        runs = get_runs(inputs["input_ids"][0], processor.image_token_id)
        assert sum(runs) == num_images * NUM_TOKENS and all(run % NUM_TOKENS == 0 for run in runs)
        assert ("pixel_values" in inputs) == (num_images > 0)
        if num_images:
            assert len(inputs["pixel_values"]) == num_images
        count[0] += 1
        count[1] += "<image>" in str([part for m in messages for part in m["content"] if part != image()])

    fuzz(num_examples, conversations(texts()), try_one)
    with capsys.disabled():
        print(f"\n{name}: {count[0]:,} conversations, {count[1]:,} with typed image tags: none became an image")
    assert count[1] > count[0] / 10


@pytest.mark.parametrize("num_examples", FORMS)
def test_anything_for_a_conversation_is_a_result_or_a_clear_error(processors, num_examples, capsys):
    processor, count = processors["tiny"], {"results": 0, "errors": 0}
    scalar = st.sampled_from([None, 5, True, 0.5, "", "<image>", "user", b"a", object(), float("nan")])
    written = texts(*SURROGATES)
    part = st.one_of(
        *(written.map(text), st.builds(image), scalar.map(text), scalar, written.map(lambda name: {"type": name})),
        *(scalar.map(lambda value: image(image=value)), st.just(image(image=IMAGE, url="a.png")), st.just({})),
    )
    message = st.one_of(
        scalar,
        st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from(["user", "assistant", "system", "tool", "User", "", None, 3]),
                "content": st.one_of(written, st.lists(part, max_size=3), scalar, part),
            },
        ),
    )

    def try_one(conversation):
        try:
            inputs = tokenize(processor, conversation)
        except ValueError as error:
            assert re.search(r"`conversation|`text`|`images|Image \d|in the text|tags", str(error)), error
            count["errors"] += 1
        else:
            runs = get_runs(inputs["input_ids"][0], processor.image_token_id)
            assert sum(runs) == NUM_TOKENS * len(inputs.get("pixel_values", []))
            count["results"] += 1

    fuzz(2 * num_examples, st.one_of(st.lists(message, max_size=3), conversations(written), message), try_one)
    results, errors = count["results"], count["errors"]
    with capsys.disabled():
        print(f"\n{results + errors:,} odd conversations: {results:,} results, {errors:,} clear errors")
    assert min(count.values()) > 0


# --- image tags ---


def test_an_image_stays_where_it_was_given(processors):
    """One image and one typed tag: the counts would match if the image's part were lost."""
    processor = processors["tiny"]
    messages = [user(image(), text("See <image>?")), {"role": "assistant", "content": "<image>"}, user(text("So?"))]
    ids = tokenize(processor, messages)["input_ids"][0].tolist()
    plain = [user(image(), text("See < image>?")), {"role": "assistant", "content": "< image>"}, user(text("So?"))]
    assert ids == tokenize(processor, plain)["input_ids"][0].tolist()


def test_a_part_has_one_image(processors):
    """A second one could be taken for a tag elsewhere."""
    messages = [user(image(image=IMAGE, path="a.png")), {"role": "user", "content": "<image>"}]
    with pytest.raises(ValueError, match=r"Part 0 of `conversation\[0\]` must have one image, but has image, path"):
        tokenize(processors["tiny"], messages)


def test_thousands_of_tags(processors):
    processor, start = processors["stage2-1024"], time.perf_counter()
    ids = tokenize(processor, [user(image(), text("<image>" * 20_000))])["input_ids"][0]
    assert get_runs(ids, processor.image_token_id) == [NUM_TOKENS]
    with pytest.raises(ValueError, match="20000 <image> (token|tag).*1 image"):
        processor(images=IMAGE, text="<image>" * 20_000)
    assert time.perf_counter() - start < MAX_SECONDS


@pytest.mark.parametrize("name", MODELS)
def test_an_answer_with_a_tag_is_learned_as_text(processors, name):
    processor = processors[name]
    messages = [user(image(), text("Where?")), {"role": "assistant", "content": "In <image> tags."}]
    for template in (None, PLAIN_CHAT_TEMPLATE):
        options = {"chat_template": template, "add_generation_prompt": False, "return_assistant_tokens_mask": True}
        inputs = tokenize(processor, messages, **options)
        learned = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"])[0].bool()]
        assert processor.tokenizer.decode(learned).strip().removesuffix("</s>") == "In < image> tags."
        assert get_runs(inputs["input_ids"][0], processor.image_token_id) == [NUM_TOKENS]


def test_image_tokens_without_images_are_refused(processors, model):
    """The tokenizer alone does not check them."""
    ids = processors["tiny"].tokenizer("What is an <image>?", return_tensors="pt")["input_ids"]
    assert (ids == model.config.image_token_id).sum() == 1
    with pytest.raises(ValueError, match="1 image tokens, but there are no images"):
        model.generate(ids, max_new_tokens=1)


# --- unpaired surrogates ---


@pytest.mark.parametrize("half", SURROGATES)
def test_unpaired_surrogates_are_named(processors, half):
    for processor in processors.values():
        with pytest.raises(ValueError, match="Sample 1 of `text` has an unpaired surrogate"):
            processor(text=["Good", f"Bad {half}"], padding=True)
        with pytest.raises(ValueError, match="unpaired surrogate"):
            tokenize(processor, [user(image(), text(half))])
    assert tokenize(processors["tiny"], [user(text(f"{half}".encode(errors="replace").decode()))])


# --- nothing, and too much ---


@pytest.mark.parametrize("name", MODELS)
def test_empty_turns(processors, name, model):
    for content in ("", [], [text("")], [image()], [image(), text("")], None):
        messages = [{"role": "user", "content": content}]
        inputs = tokenize(processors[name], messages)
        assert inputs["input_ids"].shape[1] > 1
        tokenize(processors[name], [*messages, {"role": "assistant", "content": content and ""}, *messages])
    if name == "tiny":
        assert model.generate(**tokenize(processors[name], [user()]), max_new_tokens=1).shape[0] == 1
    for nothing in ([], [[]], ()):
        with pytest.raises(ValueError, match=r"`conversation(\[0\])?` is empty"):
            tokenize(processors[name], nothing)


def test_prompts_beyond_the_context_are_refused_before_an_image_is_encoded(model, monkeypatch):
    longest = model.config.context_length
    processor = AutoProcessor.from_pretrained(TINY_MODEL)
    messages = [user(*[image()] * (longest // 64), text("What?"))]
    sizes = {"processor_kwargs": {"size": 64, "low_res_size": 56}}
    inputs = tokenize(processor, messages, **sizes)
    sentence = rf"The prompt has \d+ tokens, but with an answer at most {longest} "
    monkeypatch.setattr(model.model.vision_tower, "forward", lambda *_, **__: pytest.fail("an image was encoded"))
    for options in ({}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}):
        with pytest.raises(ValueError, match=sentence):
            model.generate(**inputs, max_new_tokens=1, **options)
    with pytest.raises(ValueError, match=sentence):
        pipeline("image-text-to-text", model=model, processor=processor)(messages, max_new_tokens=1, **sizes)


# --- training data ---


def check(content: bytes, folder: Path, capsys) -> str:
    """The output of `training.check_data` for a file."""
    (folder / "data.json").write_bytes(content)
    check_data(CheckOptions(str(folder / "data.json")))
    streams = capsys.readouterr()
    return streams.out + streams.err


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    IMAGE.save(tmp_path / "a.png")
    return tmp_path


def row(question: str, answer: str = "Yes.", **fields) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "1", "image": "a.png", "conversations": turns, **fields}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (row("<image>\nWhat? \ud83d"), "turn 0 has half a character"),
        (row("<image>\nWhat?", "\udc00"), "turn 1 has half a character"),
        (row("<image>", image="\ud83d.png"), "`image` must have names of images"),
    ],
)
def test_rows_with_unpaired_surrogates_are_named(folder, capsys, fields, problem):
    good = row("<image>\nA?", id="a\ud83d")  # in an id, half a character breaks nothing
    lines = check(json.dumps([good, fields]).encode(), folder, capsys)
    assert f"row 1 (id '1'): {problem}" in lines and "2 rows, 1 broken" in lines


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[{"id": "\xff"}]', "is not UTF-8 text"),
        (b"[" * 200_000, "an array whose brackets do not match"),
        (b'{"a": ' * 200_000, "unreadable row at character 0"),
        (b'[{"id": ' + b"1" * 10_000 + b"}]", "unreadable row at character 1"),
    ],
)
def test_files_that_are_not_data_are_named(folder, capsys, content, problem):
    with pytest.raises(ValueError, match=rf"data\.json.*({problem})"):
        check(content, folder, capsys)


@pytest.mark.parametrize("num_examples", FORMS)
def test_rows_without_problems_can_be_learned(processors, folder, num_examples, capsys):
    """Either the check finds a problem in a row, or the processor takes its messages."""
    processor, written = processors["stage2-1024"], texts(*SURROGATES, "<image>")
    sample = st.builds(row, st.one_of(written, written.map(lambda value: f"<image>\n{value}")), written)
    rows = []
    fuzz(num_examples, sample, rows.append)
    (folder / "data.json").write_text(json.dumps(rows))
    (table, _), count = load_table(DataConfig(str(folder / "data.json"))), [0, 0]
    for converted in table:
        count[len(converted["problems"]) > 0] += 1
        if not converted["problems"]:
            messages = to_messages(converted["messages"])
            for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
                part["image"] = IMAGE
            ids = tokenize(processor, messages, add_generation_prompt=False)["input_ids"][0]
            assert get_runs(ids, processor.image_token_id) == [NUM_TOKENS]
    with capsys.disabled():
        print(f"\n{len(rows):,} rows of training data: {count[0]:,} can be learned, {count[1]:,} are named as broken")
    assert min(count) > 0
