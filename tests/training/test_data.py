# SPDX-License-Identifier: Apache-2.0
"""Reading, checking and converting training data; labels against the recordings of the released code."""

import gzip
import json
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from chats import chat as ask
from chats import tokenize
from converted_checkpoints import ROOT, read_cases
from converted_checkpoints import STAGES as RECORDINGS
from datasets import Dataset, DatasetDict
from image_views import encode
from PIL import ExifTags
from PIL import Image as PILImage
from row_forms import FILES, IMAGE, ROWS, write_rows
from small_training import chat

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


def write(path, rows):
    """A JSON array, or JSON lines where the name of the file says so."""
    lines = "\n".join(map(json.dumps, rows))
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows, indent=1, ensure_ascii=False), "utf-8")
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


NOT_JSON = "neither a JSON array nor JSON lines: .* at character"


@pytest.fixture(scope="module")
def processor(converted_stage1):
    return load_processor(STAGES["finetune"], converted_stage1, 128, 56)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("chunk_size", [1, 7, 2**20])
def test_rows_are_read_in_pieces(tmp_path, kind, chunk_size):
    rows = [{"id": 1, "text": 'a "b", [c] }{ é 漢\n\t\\'}, {}, {"n": {"m": [1, [2]]}}, {"id": "x"}]
    path = write(tmp_path / f"rows.{kind}", rows)
    assert [row for row, _ in read_rows(path, chunk_size=chunk_size)] == rows
    with gzip.open(tmp_path / "rows.gz", "wb") as file:
        file.write(path.read_bytes())
    assert [row for row, _ in read_rows(tmp_path / "rows.gz", chunk_size=chunk_size)] == rows


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("num_parts", [2, 3])
def test_a_large_file_is_converted_in_parts_or_refused_with_its_place(tmp_path, monkeypatch, num_parts):
    rows = [{"id": index, "conversations": chat("é" * (index % 7), f"No. {index}")} for index in range(2500)]
    path = write(tmp_path / "rows.json", rows)
    monkeypatch.setattr("training.data.PART_SIZE", path.stat().st_size // num_parts)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    table, _ = load_table(DataConfig(str(path)))
    assert table["row"][:] == list(range(2500)) and table["id"][:] == [str(index) for index in range(2500)]
    assert [m[1]["content"][0]["text"] for m in table["messages"]] == [f"No. {index}" for index in range(2500)]
    path.write_text(path.read_text().rstrip("]") + ', {"b" 2}]')
    with pytest.raises(ValueError, match=NOT_JSON):
        load_table(DataConfig(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", '[{"a": 1}, {"b" 2}]', rf"{NOT_JSON} 16\."),
        ("rows.json", '{"a": 1}\n{"b": ', rf"{NOT_JSON} 15\."),
        ("rows.json", "{'a': 1}", rf"{NOT_JSON} 1\."),
        ("rows.json", '[{"conversations": []}', "an array whose brackets do not match"),
        ("rows.json", '[{"conversations": []}]]', "an array whose brackets do not match"),
        ("rows.jsonl", "\n", r"`data_path` \(.*rows.jsonl\)"),
        ("rows.parquet", "PAR1, cut off", r"`data_path` \(.*rows.parquet\)"),
        ("rows.txt", "What?", r"`data_path` \(.*rows.txt\)"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet", "rows.tar"])
def test_a_missing_data_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} .* does not exist"):
        load_data(tmp_path / name)


SYSTEM = {"from": "system", "value": "Be brief."}
HI, HELLO = chat("Hi.", "Hello.")
ORDER = "must begin with a user turn and end with an assistant turn, but has"


def with_parts(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "Red."}]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": [HI, HELLO]}, None),
        ({"conversations": [SYSTEM, HI, HELLO]}, None),
        ({"image": "a.png", "conversations": [*chat("<image>\nWhat?", "A cat."), HI, HELLO]}, None),
        ({"image": ["a.png", "b.png"], "conversations": chat("<image> and <image>", "Cats.")}, None),
        ([], "it must be an object"),
        ({"id": 1}, "`conversations` must be a list"),
        ({"conversations": []}, "`conversations` must be a list"),
        ({"text": "A cat."}, "or `prompt` and `completion`; it has text"),
        ({"__key__": "1", "jpg": b"", "txt": "A cat."}, "it has id, jpg, txt, images"),
        ({"video": "a.mp4", "conversations": chat("<video>\nHi.", "Hello.")}, "it has `video`"),
        ({"image": "data:image/png;base64," + "A" * 9999, "conversations": chat("<image>", "Hi.")}, "is text (data:"),
        ({"image": "/9j/" + "A" * 9999, "conversations": chat("<image>", "Hi.")}, "an image is text (/9j/AAA"),
        ({"image": 3, "conversations": [HI, HELLO]}, "`image` must have names of images"),
        ({"image": "a.png", "conversations": [HI, HELLO]}, "it has 0 <image> tags, but 1 images"),
        ({"conversations": chat("<image>\nHi.", "Hello.")}, "it has 1 <image> tags, but 0 images"),
        ({"image": "a.png", "conversations": chat("Hi.", "<image>")}, "turn 1 by gpt has an <image> tag"),
        ({"conversations": [HI, {"from": "bot", "value": "Hello."}]}, "turn 1 has the unknown speaker 'bot'"),
        ({"conversations": [HI, {"from": ["gpt"]}]}, "turn 1 has the unknown speaker ['gpt']"),
        ({"conversations": ["Hi.", HELLO]}, "turn 0 has the unknown speaker None"),
        ({"conversations": chat("Hi.", " \n")}, "turn 1 is an empty answer"),
        ({"conversations": chat("Hi.", None)}, "turn 1 has no text"),
        ({"conversations": [HI, HI, HELLO]}, "turns 0 and 1 are both by user"),
        ({"conversations": [HELLO]}, f"{ORDER} assistant"),
        ({"conversations": [HI]}, f"{ORDER} user"),
        ({"conversations": [HI, SYSTEM, HELLO]}, "a system text must be the first turn"),
        (with_parts({"type": "video", "path": "a.mp4"}), "neither text nor image"),
        (with_parts({"type": "image", "url": "a.png"}), "image 'a.png' lies outside"),
        (with_parts({"type": "image", "path": "a.png", "image": "b.png"}), "more than one image"),
    ],
)
def test_problems_of_a_row(row, problem):
    problems = convert_row(row)["problems"]
    assert problems == [] if problem is None else problem in problems[0] and len(problems[0]) < 200


def test_stage_1_takes_one_image_and_one_caption():
    row = {"image": "a.png", "conversations": chat("<image>", "A cat.")}
    assert convert_row(row, plain=True)["problems"] == []
    for other in ({**row, "conversations": [*row["conversations"], HI, HELLO]}, {"conversations": [HI, HELLO]}):
        assert convert_row(other)["problems"] == []
        (problem,) = convert_row(other, plain=True)["problems"]
        assert problem == "stage 1 takes rows of one image, one question and one answer"


def test_tags_move_to_the_front_of_their_message():
    """As in the released data loader: "What is this? <image>" becomes "<image>\\nWhat is this?"."""
    turns = chat("What is this? <image>", " A cat. ") + chat("<image>\nAnd <image> this?", "Two.")
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


@pytest.mark.parametrize(("stage", "name"), [("finetune", "case1"), ("pretrain", "plain")])
def test_ids_and_labels_equal_the_recordings(converted_stage1, tmp_path, stage, name):
    """The complete chats of tests/fixtures/reference, through file, transform and collator."""
    cases = [case for recording in RECORDINGS for case in read_cases(recording) if case["name"] == name]
    rows = []
    for case in cases:
        turns = [chat(question, answer) for question, answer in case.get("turns", [["<image>", case.get("caption")]])]
        rows.append({"image": case["images"], "conversations": [turn for pair in turns for turn in pair]})
    data = load_data(write(tmp_path / "rows.jsonl", rows), plain=stage == "pretrain")
    processor = load_processor(STAGES[stage], converted_stage1, 128, 56)
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
    chats = {"conversations": chat("<image>\nWhat?", "Red.")}
    rows = [{"id": name, "image": f"{name}.jpg", **chats} for name in ("good", "missing", "cut", "text")]
    rows += [{"id": 5, "conversations": chat("Hi.", "")}, {"conversations": chat("Hi.", "Hello.")}]
    return write(tmp_path / "rows.json", rows)


def test_check_data_reports_row_by_row(broken):
    command = [sys.executable, "-m", "training.check_data", str(broken)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
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
    path = write(tmp_path / "rows.jsonl", [{"conversations": [HELLO]}])
    with pytest.raises(ValueError, match="All 1 rows in .*rows.jsonl are broken"):
        load_data(path, skip_broken=True, report=tmp_path / "skipped_rows.jsonl")


def test_an_image_that_fails_only_at_decoding_names_its_row_or_is_replaced_by_the_next(tmp_path):
    """Where other rows are left out and files are several."""
    for file, names in (("0.jsonl", ["a", "b"]), ("1.jsonl", ["c", "text", "d", "e"])):
        rows = [{"id": name, "image": f"{name}.png", "conversations": chat("<image>\nWhat?", name)} for name in names]
        rows = [{"conversations": chat("Hi.", "text")} if row["id"] == "text" else row for row in rows]
        write(tmp_path / file, rows)
    for name in "abcde":
        PILImage.effect_noise((60, 40), 50).save(tmp_path / f"{name}.png")
    # noise in the compressed data: header and end of the file stay as they are
    content = bytearray((tmp_path / "c.png").read_bytes())
    content[60:-20] = random.Random(0).randbytes(len(content) - 80)
    (tmp_path / "c.png").write_bytes(content)
    assert check_image(str(tmp_path / "c.png")) is None and check_image(str(tmp_path / "c.png"), decode=True)
    data = load_data(tmp_path / "*.jsonl", image_folder=str(tmp_path))  # decodes nothing yet
    with pytest.raises(ValueError, match=r"row 0 \(id 'c'\): image '.*c.png' is broken: .*1.jsonl"):
        data[2]
    (tmp_path / "a.png").unlink()
    report = tmp_path / "run" / "skipped_rows.jsonl"
    for _ in range(2):  # a resumed run replaces it by the same row
        data = load_data(tmp_path / "*.jsonl", image_folder=str(tmp_path), skip_broken=True, report=report)
        answers = [sample["messages"][-1]["content"][0]["text"] for sample in data]
        assert answers == ["b", "d", "text", "d", "e"]
    missing, replaced = read_lines(report)
    assert (missing["row"], replaced["row"], replaced["replaced_by"]) == (0, 0, 2)
    assert Path(replaced["replaced_by_file"]).name == "1.jsonl" and "c.png" in replaced["problems"][0]


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
    path = write(tmp_path / "rows.jsonl", [{"conversations": [HI, HELLO]}])
    assert len(load_data(path)) == 1
    assert len(load_data(write(path, [{"conversations": [HI, HELLO]}] * 2))) == 2


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
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=f"row 0 .*image '{re.escape(name)}' lies outside of"):
        load_data(path)
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=f"image '{re.escape(name)}' lies outside of"):
        list(load_data(tmp_path / "rows.parquet", streaming=True))


IMAGES = [PILImage.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
QUESTION = [{"role": "user", "content": "What is this?"}]
ANSWER = [{"role": "assistant", "content": "Red."}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
]
# Columns of four rows, of which the second has no image
COLUMN = [IMAGES[0], None, *IMAGES[1:]]
LISTS = [[] if image is None else [image] for image in COLUMN]
TAGS = ["" if image is None else "<image>" for image in COLUMN]
DATASETS = {
    "messages": {"messages": [QUESTION + ANSWER] * 4, "images": LISTS},
    "prompt-completion": {"prompt": [QUESTION] * 4, "completion": [ANSWER] * 4, "image": COLUMN},
    "text": {"prompt": [f"What is {tag}this?" for tag in TAGS], "completion": ["Red."] * 4, "images": LISTS},
    "conversations": {"conversations": [chat(f"{tag}What is this?", "Red.") for tag in TAGS], "image": COLUMN},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", DATASETS)
@pytest.mark.parametrize("place", ["parquet", "folder"])
def test_any_dataset_gives_the_same_labels(processor, tmp_path, form, place, streaming):
    """Whatever its form, a question about an image becomes the same tokens; only the answer is learned."""
    dataset = Dataset.from_dict(DATASETS[form])
    path = tmp_path / ("rows.parquet" if place == "parquet" else "rows")
    dataset.to_parquet(path) if place == "parquet" else dataset.save_to_disk(path)
    data = load_data(path, streaming=streaming)
    batch = LlavaHrDataCollator(processor, assistant_only_loss=True)(list(data))
    assert len(batch["pixel_values"]) == 3
    answer = processor.tokenizer("Red.</s>", add_special_tokens=False)["input_ids"]
    for labels in batch["labels"]:
        assert labels[labels != -100].tolist() == answer
    (prompt,) = tokenize(processor, ask("What is this?", IMAGES[0]))["input_ids"]
    assert batch["input_ids"][0][: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_answers_inside_a_prompt_are_not_learned(processor, tmp_path, streaming):
    first = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]
    again = [{"role": "user", "content": "Sure?"}]
    rows = {"prompt": [first + again, QUESTION, again], "completion": [ANSWER, ANSWER + again + ANSWER, ANSWER]}
    Dataset.from_dict({**rows, "image": IMAGES}).save_to_disk(tmp_path / "rows")
    data = load_data(tmp_path / "rows", streaming=streaming)
    batch = LlavaHrDataCollator(processor, assistant_only_loss=True)(list(data))
    answer = processor.tokenizer("Red.</s>", add_special_tokens=False)["input_ids"]
    learned = [labels[labels != -100].tolist() for labels in batch["labels"]]
    assert learned == [answer, answer * 2, answer]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [*ROWS, *FILES])
def test_every_form_gives_the_same_samples(tmp_path, form, streaming):
    path = write_rows(form, tmp_path)
    samples = list(load_data(path, streaming=streaming, split="train", image_folder=str(tmp_path)))
    assert len(samples) == 4
    for sample in samples:
        assert [image.tobytes() for image in sample["images"]] == [IMAGE.tobytes()] and sample["num_answers"] == 1
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
    contents = [encode(IMAGES[0]), encode(IMAGES[1])[:-30]]
    images = [[{"bytes": content, "path": None}] for content in contents] + [[], [{"bytes": None, "path": "no.png"}]]
    Dataset.from_dict({"messages": [PARTS] * 4, "images": images}).to_parquet(tmp_path / "rows.parquet")
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


def test_rows_that_are_too_long_are_broken(processor, data, tmp_path):
    rows = [{"conversations": chat("<image>\n" + "What? " * n, "Red."), "image": "0.png"} for n in (1, 40)]
    path = write(tmp_path / "rows.jsonl", rows)
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
def test_with_unpad_lengths_depend_on_the_shapes_of_images(tmp_path, converted_stage1, form):
    processor = load_processor(STAGES["finetune"], converted_stage1, 128, 56, unpad=True)
    rows, exif = [], PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a tall image turned on its side
    for index, size in enumerate([(40, 40), (40, 10), (40, 10)]):
        PILImage.new("RGB", size).save(tmp_path / f"{index}.jpg", exif=exif if index == 2 else PILImage.Exif())
        rows.append({"conversations": chat("<image>\nWhat?", "Red."), "image": f"{index}.jpg"})
    path = write(tmp_path / "rows.jsonl", rows)
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
    message = f"1 of 3 rows .*\n.*row 0 .*it has {lengths[0]} tokens, more than {lengths[1]}"
    with pytest.raises(ValueError, match=message):
        load_data(path, **folder, limit=LengthLimit(processor, lengths[1]))


def test_lengths_and_kinds_are_found_without_decoding(tmp_path):
    for form, columns in DATASETS.items():
        Dataset.from_dict(columns).save_to_disk(tmp_path / form)
        lengths, has_image = get_lengths(load_data(tmp_path / form))
        assert has_image == [True, False, True, True] and len(set(lengths)) == 1
    rows = [{"conversations": chat("Hi.", "Hello." * n)} for n in (1, 3)]
    assert get_lengths(load_data(write(tmp_path / "rows.jsonl", rows))) == ([9, 21], [False, False])


def test_an_unknown_split_or_configuration_lists_the_known_ones(tmp_path):
    dataset = Dataset.from_dict(DATASETS["messages"])
    DatasetDict({"train": dataset}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'test', but train"):
        load_data(tmp_path / "saved", split="test")
    dataset.to_parquet(tmp_path / "hub" / "train-0.parquet")
    with pytest.raises(ValueError, match=r"Unknown split \"test\". Should be one of \['train'\]"):
        load_data(tmp_path / "hub", split="test")
    with pytest.raises(ValueError, match="BuilderConfig 'x' not found. Available: \\['default'\\]"):
        load_data(tmp_path / "hub", name="x")


def test_a_stream_does_not_mix_images_and_text(tmp_path):
    kinds = random.Random(0).choices([True, False], k=21)
    rows = {"messages": [QUESTION + ANSWER] * 21, "images": [[IMAGES[0]] if kind else [] for kind in kinds]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    found = [len(s["images"]) for s in load_data(tmp_path / "rows", streaming=True, batch_size=4)]
    assert len(found) == 24 and sum(kinds) <= sum(found) < sum(kinds) + 4
    assert all(len(set(found[start : start + 4])) == 1 for start in range(0, 24, 4))
