# SPDX-License-Identifier: Apache-2.0
"""Reading, checking and converting training data; labels against the recordings of the released code."""

import json
import os
import random
import re
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Image, List, Value
from filelock import FileLock
from PIL import Image as PILImage

from training.check_data import check_data
from training.data import find_problems, get_lengths, load_data, read_rows, read_table, to_chats, to_messages
from training.stages import STAGES, load_processor
from training.trainer import LlavaHrDataCollator


def write(path, rows, kind):
    text = json.dumps(rows, indent=1, ensure_ascii=False) if kind == "json" else "\n".join(map(json.dumps, rows))
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("chunk_size", [1, 7, 2**20])
def test_rows_are_read_in_pieces(tmp_path, kind, chunk_size):
    rows = [{"id": 1, "text": 'a "b", [c] }{ é 漢\n\t\\'}, {}, {"n": {"m": [1, [2]]}}, {"id": "x"}]
    path = write(tmp_path / "rows", rows, kind)
    pairs = list(read_rows(path, chunk_size=chunk_size))
    assert [row for row, _ in pairs] == rows
    assert [json.loads(text) for _, text in pairs] == rows


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


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"conversations": [human("Hi."), gpt("Hello.")]}, None),
        (
            {"image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("A cat."), human("Yes?"), gpt("Yes.")]},
            None,
        ),
        ({"image": ["a.png", "b.png"], "conversations": [human("<image> and <image>"), gpt("Cats.")]}, None),
        ({"conversations": [{"from": "system", "value": "Be brief."}, human("Hi."), gpt("Hello.")]}, None),
        ([], "it is no object"),
        ({"id": 1}, "`conversations` must be a list"),
        ({"image": 3, "conversations": [human("Hi."), gpt("Hello.")]}, "`image` must be a name or a list"),
        ({"image": "a.png", "conversations": [human("Hi."), gpt("Hello.")]}, "it has 0 <image> tags, but 1 pictures"),
        ({"conversations": [human("<image>\nHi."), gpt("Hello.")]}, "it has 1 <image> tags, but 0 pictures"),
        (
            {"conversations": [human("Hi."), {"from": "bot", "value": "Hello."}]},
            "turn 1 has the unknown speaker 'bot'",
        ),
        ({"conversations": [human("Hi."), human("Hi?"), gpt("Hello.")]}, "turns 0 and 1 are both by human"),
        ({"conversations": [human("Hi."), gpt(" \n")]}, "turn 1 is an empty answer"),
        ({"conversations": [human("Hi."), gpt(None)]}, "turn 1 has no text"),
        ({"conversations": ["Hi.", gpt("Hello.")]}, "turn 0 has the unknown speaker None"),
        ({"conversations": [human("Hi."), {"from": ["gpt"]}]}, "turn 1 has the unknown speaker ['gpt']"),
        ({"conversations": [gpt("Hello.")]}, "must begin with a human turn and end with a gpt turn, but has gpt"),
        ({"conversations": [human("Hi.")]}, "must begin with a human turn and end with a gpt turn, but has human"),
        ({"conversations": []}, "`conversations` must be a list"),
        (
            {"conversations": [human("Hi."), {"from": "system", "value": "Be brief."}, gpt("Hello.")]},
            "a system text must be the first turn",
        ),
        (
            {"image": "a.png", "conversations": [human("Hi."), gpt("<image>")]},
            "turn 1 by gpt has an <image> tag, which belongs to a human turn",
        ),
    ],
)
def test_problems_of_a_row(row, problem):
    problems = find_problems(row)
    assert problems == [] if problem is None else any(problem in text for text in problems)


def test_stage_1_takes_one_picture_and_one_caption():
    row = {"image": "a.png", "conversations": [human("<image>"), gpt("A cat.")]}
    assert find_problems(row, plain=True) == []
    more = {**row, "conversations": [*row["conversations"], human("Sure?"), gpt("Yes.")]}
    text = {"conversations": [human("Hi."), gpt("Hello.")]}
    for row in (more, text):
        assert find_problems(row) == []
        assert find_problems(row, plain=True) == ["stage 1 takes rows of one picture, one question and one answer"]


def test_tags_move_to_the_front_of_their_message():
    """As in the released data loader: "What is this? <image>" becomes "<image>\\nWhat is this?"."""
    turns = [human("What is this? <image>"), gpt(" A cat. "), human("<image>\nAnd <image> this?"), gpt("Two.")]
    image = {"type": "image"}
    assert to_messages(turns) == [
        {"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": " A cat. "}]},
        {"role": "user", "content": [image, image, {"type": "text", "text": "And  this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
    ]


def collapse(row, image_token_id):
    """Without padding, and with the released code's placeholder for the tokens of a picture (4 x 4 patches)."""
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
        data = load_data(str(write(tmp_path / f"{stage}.jsonl", rows, "jsonl")), plain=stage == "pretrain")
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
    """Six rows, four of them broken: a missing picture, one that is cut off, text, an empty answer."""
    PILImage.new("RGB", (40, 30), "red").save(tmp_path / "good.jpg")
    PILImage.effect_noise((200, 200), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("no picture")
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
    assert lines[0].startswith("row 1 (id 'missing'): picture 'missing.jpg' is missing in ")
    assert lines[1].startswith("row 2 (id 'cut'): picture 'cut.jpg' is broken: image file is truncated")
    assert lines[2].startswith("row 3 (id 'text'): picture 'text.jpg' is broken: cannot identify image file")
    assert lines[3] == "row 4 (id '5'): turn 1 is an empty answer"
    assert lines[4].endswith("6 rows, 4 broken")
    assert "6/6" in result.stderr  # the progress bar


def test_check_data_passes_good_data(data, capsys):
    assert check_data(str(data / "train.jsonl")) == 0
    assert capsys.readouterr().out.endswith("32 rows, 0 broken\n")
    assert check_data(str(data / "train.jsonl"), plain=True) == 32  # no captions


def test_training_refuses_broken_rows_with_the_same_messages(broken, tmp_path):
    with pytest.raises(ValueError, match=f"2 of 6 rows in {broken} are broken") as error:
        load_data(str(broken), report=tmp_path / "skipped_rows.json")
    assert "row 1 (id 'missing'): picture 'missing.jpg' is missing in " in str(error.value)
    assert "row 4 (id '5'): turn 1 is an empty answer" in str(error.value)
    assert not (tmp_path / "skipped_rows.json").exists()


def test_a_broken_picture_is_named_when_its_turn_comes(broken, miniature, tmp_path):
    rows = [row for row, _ in read_rows(broken) if row.get("id") in ("good", "cut")]
    data = load_data(str(write(tmp_path / "two.json", rows, "json")))
    collator = LlavaHrDataCollator(load_processor(STAGES["finetune"], miniature, 128, 56))
    assert collator([data[0]])["pixel_values"].shape == (1, 3, 128, 128)
    with pytest.raises(ValueError, match="cannot be read as an image.*cut.jpg.*truncated"):
        collator([data[1]])


def test_broken_rows_are_left_out_and_written_down(broken, tmp_path):
    report = tmp_path / "run" / "skipped_rows.json"
    data = load_data(str(broken), skip_broken=True, report=report)
    assert [len(sample["images"]) for sample in data] == [1, 0]
    assert [(row["row"], row["id"]) for row in json.loads(report.read_text())] == [
        (1, "missing"),
        (2, "cut"),
        (3, "text"),
        (4, "5"),
    ]
    # a run that goes on sees the same rows, whatever became of the pictures
    PILImage.new("RGB", (40, 30)).save(tmp_path / "missing.jpg")
    assert len(load_data(str(broken), skip_broken=True, report=report)) == 2


def test_data_that_is_broken_throughout_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"id": 1, "conversations": [gpt("Hello.")]}], "jsonl")
    with pytest.raises(ValueError, match="All 1 rows in .*rows.jsonl are broken"):
        load_data(str(path), skip_broken=True, report=tmp_path / "skipped_rows.json")


def test_a_changed_file_is_read_again(tmp_path):
    rows = [{"id": index, "conversations": [human("Hi."), gpt("Hello.")]} for index in range(2)]
    path = write(tmp_path / "rows.jsonl", rows[:1], "jsonl")
    assert len(read_table(path)) == 1
    assert len(read_table(write(path, rows, "jsonl"))) == 2
    assert not list(Path(datasets.config.HF_DATASETS_CACHE, "llava").glob("*.incomplete"))


def test_what_a_killed_run_left_of_a_table_is_written_over(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"id": index, "conversations": [human("Hi."), gpt("Hello.")]} for index in range(2)]
    path = write(tmp_path / "rows.jsonl", rows, "jsonl")
    read_table(path)
    (table,) = (tmp_path / "cache" / "llava").glob("*.arrow")
    table.rename(table.with_suffix(".incomplete"))
    table.with_suffix(".incomplete").write_bytes(b"half")
    assert len(read_table(path)) == 2
    assert not table.with_suffix(".incomplete").exists()


def test_only_one_process_writes_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "rows.jsonl", [{"id": 1, "conversations": [human("Hi."), gpt("Hello.")]}], "jsonl")
    read_table(path)
    (table,) = (tmp_path / "cache" / "llava").glob("*.arrow")
    content = table.read_bytes()
    table.unlink()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(table.with_suffix(".lock")):
            waiting = pool.submit(read_table, path)
            time.sleep(0.3)
            assert not waiting.done() and not table.with_suffix(".incomplete").exists()
            table.write_bytes(content)
            written = table.stat().st_mtime_ns
        assert len(waiting.result()) == 1 and table.stat().st_mtime_ns == written


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_pictures_are_found_beside_the_file_that_names_them(miniature, tmp_path, form):
    IMAGES[0].save(tmp_path / "red.png")
    turns = QUESTION + ANSWER if form == "messages" else [human("<image>\nWhat is this?"), gpt("Red.")]
    name = ["red.png"] if form == "messages" else "red.png"
    rows = [{form: turns, "images" if form == "messages" else "image": name}]
    path = write(tmp_path / "rows.jsonl", rows, "jsonl")
    collator = LlavaHrDataCollator(load_processor(STAGES["finetune"], miniature, 128, 56))
    assert collator(list(load_data(str(path))))["pixel_values"].shape == (1, 3, 128, 128)


@pytest.mark.parametrize("name", ["https://example.com/street.png", "../street.png"])
def test_names_that_lead_elsewhere_are_refused_in_data_of_any_form(tmp_path, name):
    path = write(tmp_path / "rows.jsonl", [{"messages": QUESTION + ANSWER, "images": [name]}], "jsonl")
    with pytest.raises(ValueError, match=f"Picture '{re.escape(name)}' lies outside of `image_folder`"):
        list(load_data(str(path)))
    path = write(
        tmp_path / "llava.jsonl", [{"image": name, "conversations": [human("<image>"), gpt("Red.")]}], "jsonl"
    )
    with pytest.raises(ValueError, match=f"picture '{re.escape(name)}' lies outside of"):
        load_data(str(path))


@pytest.mark.parametrize("end", ["", "]]"])
def test_an_array_whose_brackets_do_not_match_is_refused(tmp_path, end):
    (tmp_path / "rows.json").write_text('[{"conversations": []}' + end)
    with pytest.raises(ValueError, match="an array whose brackets do not match"):
        list(read_rows(tmp_path / "rows.json"))


IMAGES = [PILImage.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
QUESTION = [{"role": "user", "content": "What is this?"}]
ANSWER = [{"role": "assistant", "content": "Red."}]
MESSAGE = List({"role": Value("string"), "content": Value("string")})


def make_dataset(form):
    if form == "messages":
        features = Features({"messages": MESSAGE, "images": List(Image()), "source": Value("string")})
        rows = {"messages": [QUESTION + ANSWER] * 4, "images": [[IMAGES[0]], [], [IMAGES[1]], [IMAGES[2]]]}
        return Dataset.from_dict({**rows, "source": ["x"] * 4}, features=features)
    if form == "prompt-completion":
        features = Features({"prompt": MESSAGE, "completion": MESSAGE, "image": Image()})
        rows = {"prompt": [QUESTION] * 4, "completion": [ANSWER] * 4, "image": [IMAGES[0], None, IMAGES[1], IMAGES[2]]}
        return Dataset.from_dict(rows, features=features)
    if form == "text":
        rows = {
            "prompt": ["What is <image> this?"] * 4,
            "completion": ["Red."] * 4,
            "images": [[i] for i in IMAGES * 2][:4],
        }
        features = Features({"prompt": Value("string"), "completion": Value("string"), "images": List(Image())})
        return Dataset.from_dict(rows, features=features)
    turns = [[human("<image>\nWhat is this?"), gpt("Red.")]] * 4
    features = Features({"conversations": List({"from": Value("string"), "value": Value("string")}), "image": Image()})
    return Dataset.from_dict({"conversations": turns, "image": [*IMAGES, IMAGES[0]]}, features=features)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["messages", "prompt-completion", "text", "conversations"])
@pytest.mark.parametrize("place", ["parquet", "folder"])
def test_any_data_set_gives_the_same_labels(miniature, tmp_path, form, place, streaming):
    """Whatever its form, a question about a picture becomes the same tokens; only the answer is learnt."""
    dataset = make_dataset(form)
    path = tmp_path / ("rows.parquet" if place == "parquet" else "rows")
    dataset.to_parquet(path) if place == "parquet" else dataset.save_to_disk(path)
    data = load_data(str(path), streaming=streaming, batch_size=1)
    processor = load_processor(STAGES["finetune"], miniature, 128, 56)
    batch = LlavaHrDataCollator(processor, assistant_only_loss=True)(list(data))
    assert len(batch["pixel_values"]) == (3 if form in ("messages", "prompt-completion") else 4)
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
    data = load_data(str(tmp_path / "rows"), streaming=streaming, batch_size=1)
    processor = load_processor(STAGES["finetune"], miniature, 128, 56)
    batch = LlavaHrDataCollator(processor, assistant_only_loss=True)(list(data))
    answer = processor.tokenizer("Red.</s>", add_special_tokens=False)["input_ids"]
    learned = [labels[labels != -100].tolist() for labels in batch["labels"]]
    assert learned == [answer, answer * 2, answer]


def test_lengths_and_kinds_are_found_without_decoding(tmp_path):
    for form, kinds in (("messages", [True, False, True, True]), ("prompt-completion", [True, False, True, True])):
        make_dataset(form).save_to_disk(tmp_path / form)
        lengths, has_picture = get_lengths(load_data(str(tmp_path / form)))
        assert has_picture == kinds and len(set(lengths)) == 1
    rows = [{"conversations": [human("Hi."), gpt("Hello." * n)]} for n in (1, 3)]
    data = load_data(str(write(tmp_path / "rows.jsonl", rows, "jsonl")))
    assert get_lengths(data) == ([9, 21], [False, False])


def test_a_data_set_without_chats_is_refused(tmp_path):
    Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="must have a column `messages` or `conversations`.* but has text"):
        load_data(str(tmp_path / "rows"))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.parquet"])
def test_a_missing_data_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} .* does not exist"):
        load_data(str(tmp_path / name))


def test_a_stream_does_not_mix_pictures_and_text(tmp_path):
    kinds = random.Random(0).choices([True, False], k=21)
    rows = {"messages": [QUESTION + ANSWER] * 21, "images": [[IMAGES[0]] if kind else [] for kind in kinds]}
    features = Features({"messages": MESSAGE, "images": List(Image())})
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    found = [len(s["images"]) for s in load_data(str(tmp_path / "rows"), streaming=True, batch_size=4)]
    assert len(found) == 24 and sum(kinds) <= sum(found) < sum(kinds) + 4
    assert all(len(set(found[start : start + 4])) == 1 for start in range(0, 24, 4))


def test_pictures_are_read_when_their_turn_comes(data):
    """A sample of a LLaVA file holds the path of its picture, so memory does not grow with pictures."""
    samples = load_data(str(data / "train.jsonl"))
    assert [image for sample in samples for image in sample["images"] if not isinstance(image, Path)] == []
    tracemalloc.start()
    for sample in samples:
        del sample
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_strings_with_tags_become_parts():
    batch = {"messages": [[{"role": "user", "content": "What is <image> this?"}, *ANSWER]], "images": [[IMAGES[0]]]}
    messages = to_chats(batch)["messages"][0]
    assert messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What is  this?"}]
    assert messages[1]["content"] == [{"type": "text", "text": "Red."}]
