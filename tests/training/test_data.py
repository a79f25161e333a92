# SPDX-License-Identifier: Apache-2.0
"""Reading, checking and converting training data; labels against the recordings of the released code."""

import gzip
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import ExifTags
from PIL import Image as PILImage
from row_forms import FILES, ROWS, write_rows

from training.check_data import CheckOptions
from training.check_data import check_data as check
from training.checks import LengthLimit
from training.data import DataConfig, get_lengths, load_table, sample_rows
from training.data import load_data as load
from training.rows import check_image, convert_row, read_rows
from training.stages import STAGES, load_processor
from training.trainer import LlavaHrDataCollator


def load_data(path, *, limit=None, batch_size=1, **options):
    return load(DataConfig(str(path), **options), limit, batch_size)


def check_data(path, **options):
    return check(CheckOptions(str(path), **options))


def write(path, rows, kind):
    text = json.dumps(rows, indent=1, ensure_ascii=False) if kind == "json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("chunk_size", [1, 7, 2**20])
def test_rows_are_read_in_pieces(tmp_path, kind, chunk_size):
    rows = [{"id": 1, "text": 'a "b", [c] }{ é 漢\n\t\\'}, {}, {"n": {"m": [1, [2]]}}, {"id": "x"}]
    path = write(tmp_path / "rows", rows, kind)
    assert [row for row, _ in read_rows(path, chunk_size=chunk_size)] == rows
    with gzip.open(tmp_path / "rows.gz", "wb") as file:
        file.write(path.read_bytes())
    assert [row for row, _ in read_rows(tmp_path / "rows.gz", chunk_size=chunk_size)] == rows


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_parts", [2, 3])
def test_a_large_file_is_converted_in_parts(tmp_path, monkeypatch, num_parts):
    rows = [{"id": index, "conversations": [human("é" * (index % 7)), gpt(f"No. {index}")]} for index in range(2500)]
    path = write(tmp_path / "rows.json", rows, "json")
    monkeypatch.setattr("training.data.PART_SIZE", path.stat().st_size // num_parts)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    table, _ = load_table(DataConfig(str(path)))
    assert table["row"][:] == list(range(2500)) and table["id"][:] == [str(index) for index in range(2500)]
    assert [m[1]["content"][0]["text"] for m in table["messages"]] == [f"No. {index}" for index in range(2500)]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_large_file_that_is_not_json_is_refused_with_its_place(tmp_path, monkeypatch, num_parts):
    path = write(tmp_path / "rows.json", [{"conversations": [human("Hi"), gpt("Hi")]}] * 100, "json")
    path.write_text(path.read_text().rstrip("]") + ', {"b" 2}]')
    monkeypatch.setattr("training.data.PART_SIZE", path.stat().st_size // num_parts)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    with pytest.raises(ValueError, match="neither a JSON array nor JSON lines: .* at character"):
        load_table(DataConfig(str(path)))


@pytest.mark.parametrize(
    ("text", "position"), [('[{"a": 1}, {"b" 2}]', 16), ('{"a": 1}\n{"b": ', 15), ("{'a': 1}", 1)]
)
def test_what_is_no_json_is_refused_with_its_place(tmp_path, text, position):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=rf"neither a JSON array nor JSON lines: .* at character {position}\."):
        list(read_rows(tmp_path / "rows.json"))


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


SYSTEM = {"from": "system", "value": "Be brief."}
HI, HELLO = human("Hi."), gpt("Hello.")
ORDER = "must begin with a user turn and end with an assistant turn, but has"


def ask(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Red."}]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": [HI, HELLO]}, None),
        ({"conversations": [SYSTEM, HI, HELLO]}, None),
        ({"image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("A cat."), HI, HELLO]}, None),
        ({"image": ["a.png", "b.png"], "conversations": [human("<image> and <image>"), gpt("Cats.")]}, None),
        ([], "it must be an object"),
        ({"id": 1}, "`conversations` must be a list"),
        ({"conversations": []}, "`conversations` must be a list"),
        ({"text": "A cat."}, "or `prompt` and `completion`; it has text"),
        ({"__key__": "1", "jpg": b"", "txt": "A cat."}, "it has id, jpg, txt, images"),
        ({"video": "a.mp4", "conversations": [human("<video>\nHi."), HELLO]}, "it has `video`"),
        (
            {"image": f"data:image/png;base64,{'A' * 9999}", "conversations": [human("<image>"), HELLO]},
            "is text (data:",
        ),
        ({"image": "/9j/" + "A" * 9999, "conversations": [human("<image>"), HELLO]}, "an image is text (/9j/AAA"),
        ({"image": 3, "conversations": [HI, HELLO]}, "`image` must have names of images"),
        ({"image": "a.png", "conversations": [HI, HELLO]}, "it has 0 <image> tags, but 1 images"),
        ({"conversations": [human("<image>\nHi."), HELLO]}, "it has 1 <image> tags, but 0 images"),
        ({"image": "a.png", "conversations": [HI, gpt("<image>")]}, "turn 1 by gpt has an <image> tag"),
        ({"conversations": [HI, {"from": "bot", "value": "Hello."}]}, "turn 1 has the unknown speaker 'bot'"),
        ({"conversations": [HI, {"from": ["gpt"]}]}, "turn 1 has the unknown speaker ['gpt']"),
        ({"conversations": ["Hi.", HELLO]}, "turn 0 has the unknown speaker None"),
        ({"conversations": [HI, gpt(" \n")]}, "turn 1 is an empty answer"),
        ({"conversations": [HI, gpt(None)]}, "turn 1 has no text"),
        ({"conversations": [HI, HI, HELLO]}, "turns 0 and 1 are both by user"),
        ({"conversations": [HELLO]}, f"{ORDER} assistant"),
        ({"conversations": [HI]}, f"{ORDER} user"),
        ({"conversations": [HI, SYSTEM, HELLO]}, "a system text must be the first turn"),
        (ask({"type": "video", "path": "a.mp4"}), "neither text nor image"),
        (ask({"type": "image", "url": "a.png"}), "image 'a.png' lies outside"),
        (ask({"type": "image", "path": "a.png", "image": "b.png"}), "more than one image"),
    ],
)
def test_problems_of_a_row(row, problem):
    problems = convert_row(row)["problems"]
    assert problems == [] if problem is None else problem in problems[0] and len(problems[0]) < 200


def test_stage_1_takes_one_image_and_one_caption():
    row = {"image": "a.png", "conversations": [human("<image>"), gpt("A cat.")]}
    assert convert_row(row, plain=True)["problems"] == []
    more = {**row, "conversations": [*row["conversations"], human("Sure?"), gpt("Yes.")]}
    text = {"conversations": [human("Hi."), gpt("Hello.")]}
    for row in (more, text):
        assert convert_row(row)["problems"] == []
        assert convert_row(row, plain=True)["problems"] == [
            "stage 1 takes rows of one image, one question and one answer"
        ]


def test_tags_move_to_the_front_of_their_message():
    """As in the released data loader: "What is this? <image>" becomes "<image>\\nWhat is this?"."""
    turns = [human("What is this? <image>"), gpt(" A cat. "), human("<image>\nAnd <image> this?"), gpt("Two.")]
    image = {"type": "image", "text": None}
    row = {"conversations": turns, "images": ["a.png", "b.png", "c.png"]}
    assert convert_row(row)["messages"] == [
        {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " A cat. "}]},
        {"role": "user", "content": [image, image, {"type": "text", "text": "And  this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
    ]


def collapse(row, image_token_id):
    """Without padding, and with the released code's placeholder for the tokens of a image (4 x 4 patches)."""
    ids = row["input_ids"][row["attention_mask"].bool()].tolist()
    labels = row["labels"][row["attention_mask"].bool()].tolist()
    start = ids.index(image_token_id) if image_token_id in ids else len(ids)
    assert ids[start : start + 16] == [image_token_id] * 16 * (start < len(ids))
    place = [-200] if start < len(ids) else []
    return ids[:start] + place + ids[start + 16 :], labels[:start] + [-100] * len(place) + labels[start + 16 :]


def test_ids_and_labels_equal_the_recordings(mini, miniature, tmp_path):
    """The complete chats of tests/fixtures/reference, through file, transform and collator, both stages."""
    for stage, names in (("finetune", ("case1",)), ("pretrain", ("plain",))):
        rows, cases = [], []
        for folder in ("stage1-384", "stage2-1024"):
            for case in json.loads((mini.reference / folder / "cases.json").read_text())["cases"]:
                if case["name"] not in names:
                    continue
                turns = case.get("turns", [["<image>", case.get("caption")]])
                turns = [turn for question, answer in turns for turn in mini.chat(question, answer)]
                image = (
                    {"image": str(mini.reference / folder / "images" / case.get("images", ["case0_0.png"])[0])}
                    if ("<image>" in turns[0]["value"])
                    else {}
                )
                rows.append({"id": folder, **image, "conversations": turns})
                cases.append(case)
        data = load_data(write(tmp_path / f"{stage}.jsonl", rows, "jsonl"), plain=stage == "pretrain")
        processor = load_processor(STAGES[stage], miniature, 128, 56)
        batch = LlavaHrDataCollator(processor, assistant_only_loss=True)([data[0], data[1]])
        assert len(cases) == 2 and batch["pixel_values"].shape[1:] == (3, 128, 128)
        for index, case in enumerate(cases):
            row = {name: batch[name][index] for name in ("input_ids", "attention_mask", "labels")}
            ids, labels = collapse(row, processor.image_token_id)
            assert ids == case["input_ids_before_expansion"]
            assert labels == case["labels_before_expansion"]


@pytest.fixture
def broken(tmp_path):
    """Six rows, four of them broken: a missing image, one that is cut off, text, an empty answer."""
    PILImage.new("RGB", (40, 30), "red").save(tmp_path / "good.jpg")
    PILImage.effect_noise((200, 200), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("no image")
    rows = [
        {"id": name, "image": f"{name}.jpg", "conversations": [human("<image>\nWhat?"), gpt("Red.")]}
        for name in ("good", "missing", "cut", "text")
    ]
    rows += [{"id": 5, "conversations": [human("Hi."), gpt("")]}, {"conversations": [human("Hi."), gpt("Hello.")]}]
    return write(tmp_path / "rows.json", rows, "json")


def test_check_data_reports_row_by_row(broken):
    command = [sys.executable, "-m", "training.check_data", str(broken)]
    environment = {**os.environ, "HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE}
    root = Path(__file__).parent.parent.parent
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"row 1 (id 'missing'): image '{broken.parent}/missing.jpg' is missing"
    assert lines[1].startswith(f"row 2 (id 'cut'): image '{broken.parent}/cut.jpg' is broken: image file is truncated")
    assert lines[2].startswith(f"row 3 (id 'text'): image '{broken.parent}/text.jpg' is broken: cannot identify image")
    assert lines[3] == "row 4 (id '5'): turn 1 is an empty answer"
    assert lines[4].endswith("6 rows, 4 broken")
    assert "4/4" in result.stderr  # the progress bar: distinct files


def test_check_data_passes_good_data(data, capsys):
    assert check_data(data / "train.jsonl") == 0
    assert capsys.readouterr().out.endswith("32 rows, 0 broken\n")
    assert check_data(data / "train.jsonl", plain=True) == 32  # no captions


def test_training_refuses_broken_rows_with_the_same_messages(broken, tmp_path):
    with pytest.raises(ValueError, match=f"4 of 6 rows in {broken} are broken") as error:
        load_data(broken, report=tmp_path / "skipped_rows.jsonl")
    for message in ("row 1 (id 'missing'): image ", "row 2 (id 'cut')", "row 4 (id '5'): turn 1 is an empty answer"):
        assert message in str(error.value)
    assert not (tmp_path / "skipped_rows.jsonl").exists()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_broken_rows_are_left_out_and_listed(broken, tmp_path):
    report = tmp_path / "run" / "skipped_rows.jsonl"
    data = load_data(broken, skip_broken=True, report=report)
    assert [len(sample["images"]) for sample in data] == [1, 0]
    listed = [(entry["row"], entry["id"]) for entry in read_lines(report)]
    assert listed == [(1, "missing"), (2, "cut"), (3, "text"), (4, "5")]
    # a resumed run sees the same rows, whatever became of the images
    PILImage.new("RGB", (40, 30)).save(tmp_path / "missing.jpg")
    assert len(load_data(broken, skip_broken=True, report=report)) == 2


def test_data_that_is_broken_throughout_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"id": 1, "conversations": [gpt("Hello.")]}], "jsonl")
    with pytest.raises(ValueError, match="All 1 rows in .*rows.jsonl are broken"):
        load_data(path, skip_broken=True, report=tmp_path / "skipped_rows.jsonl")


def corrupt(path):
    """Noise in the compressed data: header and end of the file stay as they are."""
    content = bytearray(path.read_bytes())
    content[60:-20] = random.Random(0).randbytes(len(content) - 80)
    path.write_bytes(content)


def test_an_image_that_fails_only_at_decoding_names_its_row_or_is_replaced(tmp_path):
    rows = []
    for name in ("a", "b", "c"):
        PILImage.effect_noise((60, 40), 50).save(tmp_path / f"{name}.png")
        rows.append({"id": name, "image": f"{name}.png", "conversations": [human("<image>\nWhat?"), gpt(name)]})
    rows.append({"id": "d", "conversations": [human("Hi."), gpt("d")]})
    corrupt(tmp_path / "b.png")
    path = write(tmp_path / "rows.jsonl", rows, "jsonl")
    assert check_image(str(tmp_path / "b.png")) is None and check_image(str(tmp_path / "b.png"), decode=True)
    with pytest.raises(ValueError, match=r"row 1 \(id 'b'\): image '.*b.png' is broken: .*rows.jsonl"):
        load_data(path)[1]
    report = tmp_path / "skipped_rows.jsonl"
    for _ in range(2):  # a resumed run replaces it by the same row
        data = load_data(path, skip_broken=True, report=report)
        answers = [sample["messages"][-1]["content"][0]["text"] for sample in data]
        assert answers == ["a", "c", "c", "d"]
    (entry,) = read_lines(report)
    assert (entry["row"], entry["replaced_by"]) == (1, 2) and "b.png" in entry["problems"][0]


def test_a_replacement_is_the_next_row_where_others_were_left_out_and_files_are_several(tmp_path):
    for number, names in enumerate(["abc", "def"]):
        rows = []
        for name in names:
            PILImage.effect_noise((80, 60), 50).save(tmp_path / f"{name}.png")
            rows.append({"image": f"{name}.png", "conversations": [human("<image>\nWhat?"), gpt(name)]})
        write(tmp_path / f"{number}.jsonl", rows, "jsonl")
    (tmp_path / "a.png").unlink()
    corrupt(tmp_path / "d.png")
    report = tmp_path / "skipped_rows.jsonl"
    data = load_data(tmp_path / "*.jsonl", image_folder=str(tmp_path), skip_broken=True, report=report)
    assert [sample["messages"][-1]["content"][0]["text"] for sample in data] == ["b", "c", "e", "e", "f"]
    replaced = read_lines(report)[-1]
    assert (replaced["row"], replaced["replaced_by"], Path(replaced["replaced_by_file"]).name) == (0, 1, "1.jsonl")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif"])
def test_a_cheap_check_finds_every_truncated_file(tmp_path, suffix):
    file = tmp_path / f"image.{suffix}"
    PILImage.effect_noise((80, 60), 50).save(file)
    content = file.read_bytes()
    for length in (0, 1, 10, len(content) // 2, len(content) - 30):
        file.write_bytes(content[:length])
        assert "is broken" in check_image(str(file))
    file.write_bytes(content + b"appended by a camera")
    assert check_image(str(file)) is None


def test_a_changed_file_is_read_again(tmp_path):
    rows = [{"id": index, "conversations": [human("Hi."), gpt("Hello.")]} for index in range(2)]
    path = write(tmp_path / "rows.jsonl", rows[:1], "jsonl")
    assert len(load_data(path)) == 1
    assert len(load_data(write(path, rows, "jsonl"))) == 2


ADDRESS = "http://127.0.0.1:9/street.png"
ELSEWHERE = [ADDRESS, "https://example.com/street.png", "../street.png", "file:///street.png"]


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("form", [*ROWS, "url"])
def test_no_row_leads_to_the_network_or_out_of_its_folder(tmp_path, monkeypatch, form, name):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection to {args[1:]}")

    for method in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, method, refuse)
    text = json.dumps(ROWS.get(form, ROWS["parts"])).replace("red.png", name)
    row = json.loads(text.replace('"path"', '"url"') if form == "url" else text)
    path = write(tmp_path / "rows.jsonl", [row], "jsonl")
    with pytest.raises(ValueError, match=f"row 0 .*image '{re.escape(name)}' lies outside of"):
        load_data(path)
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=f"image '{re.escape(name)}' lies outside of"):
        list(load_data(tmp_path / "rows.parquet", streaming=True))


@pytest.mark.parametrize("end", ["", "]]"])
def test_an_array_whose_brackets_do_not_match_is_refused(tmp_path, end):
    (tmp_path / "rows.json").write_text('[{"conversations": []}' + end)
    with pytest.raises(ValueError, match="an array whose brackets do not match"):
        load_data(tmp_path / "rows.json")


IMAGES = [PILImage.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
QUESTION = [{"role": "user", "content": "What is this?"}]
ANSWER = [{"role": "assistant", "content": "Red."}]
MESSAGE = List({"role": Value("string"), "content": Value("string")})
PARTS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})


def make_dataset(form):
    """Four rows; of `messages` and `prompt-completion` the second has no image."""
    some, all_ = [[IMAGES[0]], [], [IMAGES[1]], [IMAGES[2]]], [[image] for image in [*IMAGES, IMAGES[0]]]
    first = [image[0] if image else None for image in some]
    part = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    answer = [{"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]
    turns = [[human("<image>\nWhat is this?"), gpt("Red.")]] * 4
    rows, features = {
        "messages": ({"messages": [QUESTION + ANSWER] * 4, "images": some}, {"messages": MESSAGE}),
        "image in a column": ({"messages": [QUESTION + ANSWER] * 4, "image": first}, {"messages": MESSAGE}),
        "parts": ({"messages": [part + answer] * 4, "images": all_}, {"messages": PARTS}),
        "roles": ({"conversations": [QUESTION + ANSWER] * 4, "images": all_}, {"conversations": MESSAGE}),
        "prompt-completion": (
            {"prompt": [QUESTION] * 4, "completion": [ANSWER] * 4, "image": first},
            {"prompt": MESSAGE, "completion": MESSAGE},
        ),
        "text": (
            {"prompt": ["What is <image> this?"] * 4, "completion": ["Red."] * 4, "images": all_},
            {"prompt": Value("string"), "completion": Value("string")},
        ),
        "conversations": (
            {"conversations": turns, "image": [image for (image,) in all_]},
            {"conversations": List({"from": Value("string"), "value": Value("string")})},
        ),
    }[form]
    column = {"images": List(Image())} if "images" in rows else {"image": Image()}
    return Dataset.from_dict(rows, features=Features({**features, **column}))


DATASETS = ["messages", "image in a column", "parts", "roles", "prompt-completion", "text", "conversations"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", DATASETS)
@pytest.mark.parametrize("place", ["parquet", "folder"])
def test_any_dataset_gives_the_same_labels(miniature, tmp_path, form, place, streaming):
    """Whatever its form, a question about an image becomes the same tokens; only the answer is learned."""
    dataset = make_dataset(form)
    path = tmp_path / ("rows.parquet" if place == "parquet" else "rows")
    dataset.to_parquet(path) if place == "parquet" else dataset.save_to_disk(path)
    data = load_data(path, streaming=streaming)
    processor = load_processor(STAGES["finetune"], miniature, 128, 56)
    batch = LlavaHrDataCollator(processor, assistant_only_loss=True)(list(data))
    has_text = form in ("messages", "image in a column", "prompt-completion")
    assert len(batch["pixel_values"]) == (3 if has_text else 4)
    answer = processor.tokenizer("Red.</s>", add_special_tokens=False)["input_ids"]
    for labels in batch["labels"]:
        assert labels[labels != -100].tolist() == answer
    if form != "text":  # where the tag stood inside of the question
        content = [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        prompt = list(prompt["input_ids"][0])
        assert batch["input_ids"][0][: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_inside_a_prompt_are_not_learned(miniature, tmp_path, streaming):
    first = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]
    again = [{"role": "user", "content": "Sure?"}]
    rows = {"prompt": [first + again, QUESTION, again], "completion": [ANSWER, ANSWER + again + ANSWER, ANSWER]}
    features = Features({"prompt": MESSAGE, "completion": MESSAGE, "image": Image()})
    Dataset.from_dict({**rows, "image": IMAGES}, features=features).save_to_disk(tmp_path / "rows")
    data = load_data(tmp_path / "rows", streaming=streaming)
    processor = load_processor(STAGES["finetune"], miniature, 128, 56)
    batch = LlavaHrDataCollator(processor, assistant_only_loss=True)(list(data))
    answer = processor.tokenizer("Red.</s>", add_special_tokens=False)["input_ids"]
    learned = [labels[labels != -100].tolist() for labels in batch["labels"]]
    assert learned == [answer, answer * 2, answer]


def encode_image(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [*ROWS, *FILES])
def test_every_form_gives_the_same_samples(tmp_path, form, streaming):
    path = write_rows(form, tmp_path)
    samples = list(load_data(path, streaming=streaming, split="train", image_folder=str(tmp_path)))
    assert len(samples) == 4
    for sample in samples:
        assert [image.getpixel((0, 0)) for image in sample["images"]] == [(255, 0, 0)]
        question, answer = (message["content"] for message in sample["messages"])
        assert question == [{"type": "image"}, {"type": "text", "text": "What?"}]
        assert answer == [{"type": "text", "text": "Red."}]


def test_sampling_strategies():
    assert list(sample_rows(10, "all")) == list(range(10))
    assert list(sample_rows(10, "first:3")) == [0, 1, 2] and list(sample_rows(10, "end:25%")) == [7, 8, 9]
    chosen = sample_rows(10, "random:50%")
    assert len(set(chosen)) == 5 and chosen == sample_rows(10, "random:50%") == sorted(chosen)
    for strategy in ("some", "first:x", "all:3"):
        with pytest.raises(ValueError, match="`sampling_strategy` must be all"):
            sample_rows(10, strategy)


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_rows_of_a_dataset_are_named_or_left_out(tmp_path, streaming):
    good, cut = encode_image(IMAGES[0]), encode_image(IMAGES[1])[:-30]
    images = [[{"bytes": good, "path": None}], [{"bytes": cut, "path": None}], [], [{"bytes": None, "path": "no.png"}]]
    asks = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    messages = [asks + [{"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]] * 4
    Dataset.from_dict({"messages": messages, "images": images}).to_parquet(tmp_path / "rows.parquet")
    report = tmp_path / "skipped_rows.jsonl"
    with pytest.raises(ValueError, match="row 1 .*embedded in the row is broken"):
        list(load_data(tmp_path / "rows.parquet", streaming=streaming))
    data = load_data(tmp_path / "rows.parquet", streaming=streaming, skip_broken=True, report=report)
    assert len(list(data)) == 1
    problems = {entry["row"]: entry["problems"][0] for entry in read_lines(report)}
    assert problems.keys() == {1, 2, 3}
    assert "truncated" in problems[1] or "broken" in problems[1]
    assert problems[2] == "it has 1 <image> tags, but 0 images" and "no.png" in problems[3]
    assert check_data(tmp_path / "rows.parquet") == 3


def test_rows_that_are_too_long_are_broken(miniature, data, tmp_path):
    processor = load_processor(STAGES["finetune"], miniature, 128, 56)
    rows = [{"conversations": [human("<image>\n" + "What? " * n), gpt("Red.")], "image": "0.png"} for n in (1, 40)]
    path = write(tmp_path / "rows.jsonl", rows, "jsonl")
    collate = LlavaHrDataCollator(processor)
    samples = load_data(path, image_folder=str(data / "images"))
    lengths = [collate([sample])["input_ids"].shape[1] for sample in samples]
    for limit, broken in ((lengths[1], []), (lengths[1] - 2, [1]), (lengths[0] - 2, [0, 1])):
        table, _ = load_table(DataConfig(str(path)))
        found = list(LengthLimit(processor, limit).find_long_rows(table))
        assert [index for index, _ in found] == broken
    with pytest.raises(ValueError, match=rf"row 1 .* tokens, more than {lengths[1] - 2} \(`max_length`"):
        load_data(path, image_folder=str(data / "images"), limit=LengthLimit(processor, lengths[1] - 2))


@pytest.mark.parametrize("form", ["files", "embedded"])
def test_with_unpad_lengths_depend_on_the_shapes_of_images(tmp_path, miniature, form):
    processor = load_processor(STAGES["finetune"], miniature, 128, 56, unpad=True)
    rows, exif = [], PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a tall image turned on its side
    for index, size in enumerate([(40, 40), (40, 10), (40, 10)]):
        PILImage.new("RGB", size).save(tmp_path / f"{index}.jpg", exif=exif if index == 2 else PILImage.Exif())
        rows.append({"conversations": [human("<image>\nWhat?"), gpt("Red.")], "image": f"{index}.jpg"})
    path = write(tmp_path / "rows.jsonl", rows, "jsonl")
    if form == "embedded":
        content = [{"bytes": (tmp_path / row["image"]).read_bytes(), "path": None} for row in rows]
        path = tmp_path / "rows.parquet"
        Dataset.from_list([row | {"image": image} for row, image in zip(rows, content, strict=True)]).to_parquet(path)
    folder = {"image_folder": str(tmp_path)} if form == "files" else {}
    collate = LlavaHrDataCollator(processor)
    batches = [collate([sample]) for sample in load_data(path, **folder)]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert [batch["image_sizes"].tolist() for batch in batches] == [[[40, 40]], [[10, 40]], [[40, 10]]]
    assert lengths[0] > lengths[1] == lengths[2]
    data = load_data(path, **folder, limit=LengthLimit(processor, lengths[0]))
    grouped, _ = get_lengths(data)
    assert [grouped[0] - length for length in grouped] == [4 * (lengths[0] - length) for length in lengths]
    with pytest.raises(
        ValueError, match=f"1 of 3 rows .*\n.*row 0 .*it has {lengths[0]} tokens, more than {lengths[1]}"
    ):
        load_data(path, **folder, limit=LengthLimit(processor, lengths[1]))


def test_lengths_and_kinds_are_found_without_decoding(tmp_path):
    for form, kinds in (("messages", [True, False, True, True]), ("prompt-completion", [True, False, True, True])):
        make_dataset(form).save_to_disk(tmp_path / form)
        lengths, has_image = get_lengths(load_data(tmp_path / form))
        assert has_image == kinds and len(set(lengths)) == 1
    rows = [{"conversations": [human("Hi."), gpt("Hello." * n)]} for n in (1, 3)]
    data = load_data(write(tmp_path / "rows.jsonl", rows, "jsonl"))
    assert get_lengths(data) == ([9, 21], [False, False])


def test_an_unknown_split_or_configuration_lists_the_known_ones(tmp_path):
    DatasetDict({"train": make_dataset("messages")}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'test', but train"):
        load_data(tmp_path / "saved", split="test")
    (tmp_path / "hub").mkdir()
    make_dataset("messages").to_parquet(tmp_path / "hub" / "train-0.parquet")
    with pytest.raises(ValueError, match=r"Unknown split \"test\". Should be one of \['train'\]"):
        load_data(tmp_path / "hub", split="test")
    with pytest.raises(ValueError, match="BuilderConfig 'x' not found. Available: \\['default'\\]"):
        load_data(tmp_path / "hub", name="x")


@pytest.mark.parametrize(
    ("name", "content"), [("rows.parquet", b"PAR1, cut off"), ("rows.txt", b"What?"), ("rows.jsonl", b"\n")]
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"`data_path` \(.*{name}\)"):
        load_data(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "rows.tar"])
def test_a_missing_data_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} .* does not exist"):
        load_data(tmp_path / name)


def test_a_stream_does_not_mix_images_and_text(tmp_path):
    kinds = random.Random(0).choices([True, False], k=21)
    rows = {"messages": [QUESTION + ANSWER] * 21, "images": [[IMAGES[0]] if kind else [] for kind in kinds]}
    features = Features({"messages": MESSAGE, "images": List(Image())})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    found = [len(s["images"]) for s in load_data(tmp_path / "rows", streaming=True, batch_size=4)]
    assert len(found) == 24 and sum(kinds) <= sum(found) < sum(kinds) + 4
    assert all(len(set(found[start : start + 4])) == 1 for start in range(0, 24, 4))


def test_images_are_read_when_their_turn_comes(data):
    """Memory does not grow with images."""
    samples = load_data(data / "train.jsonl")
    tracemalloc.start()
    for sample in samples:
        del sample
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
