# SPDX-License-Identifier: Apache-2.0
"""Each example runs as a user starts it, on real files; what one of them answers, the others answer too."""

import io
import json
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from chats import chat, tokenize
from converted_checkpoints import ROOT, TINY_MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from examples import draw_pictures, locate
from examples.long_document import split
from modeling_llava_hr import LlavaHrForConditionalGeneration, LlavaHrModel, LlavaHrVisionModel


IMAGES = ROOT / "examples" / "pictures"
STREET = IMAGES / "street.jpg"
SCENES = [Image.open(IMAGES / f"{name}.jpg").convert("RGB") for name in ("street", "receipt", "shelf")]
QUESTION = "What does the green sign say?"
SHORT = ("--max_new_tokens", "6")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `python -m examples.NAME --model TINY ...` in this process, in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments, model=TINY_MODEL, status=None) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--model", str(model), *map(str, arguments)])
        monkeypatch.delitem(sys.modules, f"examples.{name}", raising=False)  # runpy warns if it was imported
        capsys.readouterr()
        try:
            runpy.run_module(f"examples.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == status or (status == "error" and str(end.code).startswith("error: ")), end.code
            return str(end.code) if status == "error" else capsys.readouterr().out
        assert not status, f"should end with {status!r}"
        return capsys.readouterr().out

    return run


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("option", "file"), [("--image", "missing.png"), ("--image", __file__), ("--model", "/no-model")]
)
def test_what_cannot_be_used_is_one_sentence(run, option, file):
    assert Path(file).name in run("ask", option, file, status="error")


def note_calls(owner: type, name: str):
    """A context manager whose value has the calls of a method."""
    return patch.object(owner, name, autospec=True, side_effect=getattr(owner, name))


def test_chat_begins_as_ask_does_and_has_the_whole_conversation(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nWhat is shown?\n\nNever asked\n"))
    with note_calls(LlavaHrForConditionalGeneration, "generate") as generate:
        first, second, end = map(words, run("chat", *SHORT).split("You:   ")[1:])
    answer = words(run("ask", *SHORT))
    assert answer and first == f"Model: {answer}" and second.startswith("Model: ") and not end
    messages = chat(QUESTION, STREET) + [{"role": "assistant", "content": answer}] + chat("What is shown?")
    expected = tokenize(AutoProcessor.from_pretrained(TINY_MODEL), messages)["input_ids"]
    assert generate.call_args.kwargs["input_ids"].tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # ONNX's
def test_onnx_runtime_answers_as_the_model_does(run, tmp_path):
    pytest.importorskip("onnxruntime", reason="export needs the extra [export]")
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("exported models run with transformers 5.24 and later")
    question = ("--question", "What is shown?", "--max_new_tokens", 12)
    answer = run("export_onnx", "--output", "onnx", *question).strip().splitlines()[-1]
    assert words(answer) == words(run("ask", *question)) and answer
    names = {file.stem for file in (tmp_path / "onnx").glob("*.onnx")}
    assert names == {"image_encoder", "embed_tokens", "language_model"}
    assert "--output" in run("export_onnx", "--output", "onnx", status="error")  # not written over


def test_heat_map_has_the_views_and_the_gates(run):
    gates = run("heat_map").split("\n")[0].removeprefix("gates: ").split(", ")
    with Image.open("heat_map.png") as image:
        assert image.size == (3 * 512 + 2 * 28, 512 + 28)
        assert len(image.convert("RGB").getcolors(2**24)) > 1000
    views = AutoImageProcessor.from_pretrained(TINY_MODEL)(STREET, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModelForImageTextToText.from_pretrained(TINY_MODEL).get_image_features(**views)
    expected = [gate.float().mean().item() for gate in expected.mr_adapter_gates]
    assert [float(gate) for gate in gates] == pytest.approx(expected, abs=1e-3) and len(expected) == 3


def test_fields_are_validated_and_the_image_is_encoded_once(run):
    answer = words(run("ask", "--max_new_tokens", 50))
    patterns = {"any": r"[\s\S]*", "never": "such an answer does not come", "again": r"[\s\S]*"}
    fields = {name: {"question": QUESTION, "pattern": pattern} for name, pattern in patterns.items()}
    Path("fields.json").write_text(json.dumps(fields))
    with note_calls(LlavaHrVisionModel, "forward") as forward:
        result = json.loads(run("extract_fields", "--image", STREET, "--fields", "fields.json", status=True))
    assert words(result["any"]) == words(result["again"]) == answer and result["never"] is None
    assert forward.call_count == 1
    del fields["never"]
    Path("fields.json").write_text(json.dumps(fields))
    run("extract_fields", "--image", STREET, "--fields", "fields.json", status=False)


@pytest.fixture
def folder(tmp_path):
    """Three images, and two text files, one of them with an image's name."""
    (tmp_path / "photos").mkdir()
    for number, scene in enumerate(SCENES):
        scene.save(tmp_path / "photos" / f"{number:02}.png")
    (tmp_path / "photos" / "05b.png").write_text("not an image")
    (tmp_path / "photos" / "notes.txt").write_text("not an image either")
    return tmp_path / "photos"


def test_captions_are_those_of_ask_are_written_at_once_and_broken_images_are_reported(run, folder, monkeypatch):
    Image.new("RGB", (1, 40_000)).save(folder / "03.png")  # can be read, but is too long for both views
    answer = run("ask", "--image", folder / "01.png", "--question", "What is shown?", *SHORT)
    captions, calls, generate = Path("captions.jsonl"), [], LlavaHrForConditionalGeneration.generate

    def note_call(*args, **kwargs):
        calls.append((kwargs["do_sample"], kwargs["max_new_tokens"], captions.read_text().count("\n")))
        return generate(*args, **kwargs)

    monkeypatch.setattr(LlavaHrForConditionalGeneration, "generate", note_call)
    run("caption_folder", "--folder", folder, "--batch_size", 2, *SHORT)
    assert calls == [(False, 6, 0), (False, 6, 2)]
    rows = [json.loads(line) for line in captions.read_text().splitlines()]
    assert [row["image"] for row in rows] == ["00.png", "01.png", "02.png", "03.png", "05b.png"]
    assert words(rows[1]["answer"]) == words(answer)
    assert "answer" in rows[2] and "1 x 40000 pixels" in rows[3]["error"] and "answer" not in rows[3]
    assert "05b.png" in rows[4]["error"] and "answer" not in rows[4]


def test_captions_are_tried_again_where_there_was_an_error_and_nowhere_else(run, folder):
    captions = Path("captions.jsonl")
    other = json.dumps({"image": "05b.png", "question": "Another one?", "error": "of another question"})
    captions.write_text(f"{other}\n")
    run("caption_folder", "--folder", folder, *SHORT)
    *kept, error = captions.read_text().splitlines()
    assert kept[0] == other and len(kept) == 4 and "05b.png" in json.loads(error)["error"]
    for file in folder.glob("0?.png"):  # an answer stays, whatever became of its image
        file.write_text("not an image any more")
    SCENES[0].save(folder / "05b.png")
    run("caption_folder", "--folder", folder, *SHORT)
    assert captions.read_text().splitlines()[:-1] == kept
    row = json.loads(captions.read_text().splitlines()[-1])
    assert row["image"] == "05b.png" and "answer" in row and "error" not in row


def test_captions_do_not_touch_a_file_of_another_kind(run, folder, tmp_path):
    (tmp_path / "notes.md").write_text("my notes\nwithout an end")
    assert "notes.md" in run("caption_folder", "--folder", folder, "--output", "notes.md", status="error")
    assert (tmp_path / "notes.md").read_text() == "my notes\nwithout an end"


def test_many_questions_resume_with_the_same_answers(run):
    run("ask_many", *SHORT)
    whole = Path("answers.jsonl").read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    questions = [json.loads(line) for line in (IMAGES / "ask_many.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in ("id", "image", "question")} for row in rows] == questions
    expected = [json.loads(line) for line in (IMAGES / "questions.jsonl").read_text().splitlines()]
    expected = [turn["value"] for row in expected for turn in row["conversations"][1::2]]
    right = [row["answer"] == answer for row, answer in zip(rows, expected, strict=True)]
    assert rows[1]["answer"] == "1471" and sum(right) >= len(rows) - 4
    lines = whole.splitlines(keepends=True)
    failed = json.dumps({**questions[0], "error": "a disk that was away"}) + "\n"
    Path("answers.jsonl").write_text("".join([failed, *lines[1:9]]) + lines[9][:20])  # what a kill leaves
    run("ask_many", *SHORT)
    assert sorted(Path("answers.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    before = Path("answers.jsonl").read_bytes()
    run("ask_many", *SHORT)
    assert Path("answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "a", "image": "street.jpg"}'], "line 1 must be"),
        (['{"id": "a", "image": "a.jpg", "question": "?"}', "", '{"id": 1, "image": "a", "question": "?"}'], "line 3"),
        (['{"id": "a", "image": "a.jpg", "question": "?"}'] * 2, "same `id`"),
    ],
)
def test_questions_of_another_form_are_named(run, tmp_path, lines, message):
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    assert message in run("ask_many", "--questions", "questions.jsonl", status="error")
    assert not (tmp_path / "answers.jsonl").exists()


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_boxes_are_mapped_back_as_the_processor_pads(width, height, corners):
    """Against an image whose box is drawn on the square that the released code pads to."""
    side = max(width, height)
    box = [side * value for value in corners]
    box = (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
    square = Image.new("1", (side, side))
    square.paste(1, tuple(round(value) for value in box))
    left, top = (side - width) // 2, (side - height) // 2
    expected = square.crop((left, top, left + width, top + height)).getbbox()
    parts = tuple(value / side for value in box)
    if expected is None:
        with pytest.raises(ValueError, match="is in the padding"):
            locate.to_pixels(parts, width, height)
    else:
        assert locate.to_pixels(parts, width, height) == expected


@pytest.mark.parametrize("answer", ["street", "[0.1, 0.2, 0.3]", "[0.5, 0.2, 0.1, 0.4]", "[0.1, 0.2, 1.5, 0.4]"])
def test_an_answer_without_a_box_is_an_error(answer):
    with pytest.raises(
        ValueError, match=re.escape(f"has no box [x1, y1, x2, y2] with numbers from 0 to 1: {answer!r}")
    ):
        locate.parse_box(answer)


def test_the_box_of_an_answer_is_drawn(run, monkeypatch, tmp_path):
    assert locate.parse_box("It is at [0.25,0.5, 1, 0.75].") == (0.25, 0.5, 1, 0.75)
    Image.new("RGB", (200, 100), "white").save("wide.png")
    options = ("--image", "wide.png", "--phrase", "the sign")
    assert "has no box" in run("locate", *options, status="error")  # the tiny model has not learned it
    generated = []

    def answer(self, messages, **kwargs):
        generated.append(messages[0]["content"][1]["text"])
        return [{"generated_text": " [0.25, 0.5, 0.5, 0.625]"}]

    monkeypatch.setattr(transformers.ImageTextToTextPipeline, "__call__", answer)
    assert run("locate", *options).strip() == "pixels 50-100 x 50-75"
    assert generated == ["Please provide the bounding box coordinate of the region this sentence describes: the sign"]
    with Image.open("box.png") as image:
        assert image.size == (200, 100) and image.getpixel((50, 60)) == image.getpixel((100, 60)) == (255, 0, 0)
        assert image.getpixel((75, 62)) == image.getpixel((20, 20)) == (255, 255, 255)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000), overlap=st.floats(0, 0.5))
def test_squares_cover_the_image_and_overlap(width, height, overlap):
    boxes = split(Image.new("1", (width, height)), overlap)
    short, long = sorted((width, height))
    if len(boxes) == 1:
        assert boxes == [(0, 0, width, height)] and long <= 1.25 * short
        return
    assert all(right - left == bottom - top == short for left, top, right, bottom in boxes)
    starts = [max(left, top) for left, top, _, _ in boxes]
    assert starts[0] == 0 and starts[-1] == long - short
    assert all(
        second - first <= short - overlap * short + 1 for first, second in zip(starts, starts[1:], strict=False)
    )


def test_each_square_is_answered_as_by_itself(run):
    tall = Image.new("RGB", (256, 768))
    for top, scene in zip((0, 256, 512), SCENES, strict=True):
        tall.paste(scene, (0, top))
    tall.save("page.png")
    names = ("street", "receipt", "shelf")
    alone = [words(run("ask", "--image", IMAGES / f"{name}.jpg", "--question", QUESTION, *SHORT)) for name in names]
    options = ("--overlap", 0, "--batch_size", 2, "--question", QUESTION, *SHORT)
    lines = run("long_document", "page.png", *options).splitlines()
    assert alone[0] == "1471" and lines == [
        f"page.png, pixels 0-256 x {top}-{top + 256}: {answer}"
        for top, answer in zip((0, 256, 512), alone, strict=True)
    ]


def test_pages_of_a_pdf_are_named(run, converted_stage2):
    wide = Image.open(IMAGES / "table.jpg").resize((90, 256))
    SCENES[0].save("two.pdf", save_all=True, append_images=[wide])
    lines = run("long_document", "two.pdf", *SHORT, model=converted_stage2).splitlines()
    names = [re.match(r"two.pdf, page (\d), pixels", line)[1] for line in lines]
    assert names[0] == "1" and names.count("2") == len(names) - 1 >= 3
    *names, answer = run("long_document", "two.pdf", "--together", *SHORT).splitlines()
    assert len(names) == len(lines) and answer


@pytest.mark.parametrize("unpad", [False, True])
def test_frames_of_a_video_cost_144_tokens_each(run, converted_stage2, unpad, monkeypatch):
    av = pytest.importorskip("av", reason="videos need PyAV: the extra [examples]")
    with av.open("film.mp4", "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 256, 144
        for index in range(30):
            frame = SCENES[index // 10].crop((0, 56, 256, 200))
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    counts, mask = [], LlavaHrModel.get_placeholder_mask
    monkeypatch.setattr(
        LlavaHrModel, "get_placeholder_mask", lambda *args: counts.append(int(mask(*args).sum())) or mask(*args)
    )
    line = run("video", "film.mp4", "--num_frames", 3, *SHORT, *["--unpad"] * unpad, model=converted_stage2)
    assert re.match(r"frames at 0\.0, \d\.\d, 2\.\d s: .*\n$", line)
    assert counts[0] == 3 * (8 * 12 if unpad else 144)  # of 12 x 12 cells, 8 rows of a 16:9 frame show something


def test_a_missing_package_is_named_with_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = run("export_onnx", status="error").lower()
    assert "onnxscript" in message and 'pip install ".[export]"' in message


def test_images_are_those_that_the_script_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_pictures, "OUTPUT", tmp_path)
    draw_pictures.main()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in IMAGES.iterdir()}
    for name in ("questions.jsonl", "ask_many.jsonl", "receipt.fields.json"):
        assert (tmp_path / name).read_text() == (IMAGES / name).read_text()


def test_every_example_is_in_the_table():
    examples = {file.stem for file in (ROOT / "examples").glob("*.py") if "__main__" in file.read_text()}
    table = (ROOT / "examples" / "README.md").read_text()
    assert {name for name in examples if f"`{name}.py`" not in table} == set()
