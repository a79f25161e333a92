# SPDX-License-Identifier: Apache-2.0
"""Each example runs as a user starts it, on real files; what one of them answers, the others answer too."""

import io
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples import locate
from modeling_llava_hr import LlavaHrForConditionalGeneration, LlavaHrVisionModel


ROOT = Path(__file__).parent.parent.parent
IMAGES = ROOT / "examples" / "pictures"
STREET = str(IMAGES / "street.jpg")
QUESTION = "What does the green sign say?"
SHORT = ("--max_new_tokens", "6")


@pytest.fixture
def run(tiny_model, tmp_path, monkeypatch, capsys):
    """Runs `python -m examples.NAME --model TINY ...` in this process, in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments, model=tiny_model, status=None) -> str:
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


def test_ask_answers_in_short(run):
    assert len(run("ask", *SHORT).strip()) > 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--image", "missing.png", "missing.png"), ("--image", __file__, Path(__file__).name)],
)
def test_what_cannot_be_used_is_one_sentence(run, option, value, message):
    assert message in run("ask", option, value, status="error")


def test_missing_model_is_named(run, tmp_path):
    assert "no-model" in run("ask", model=tmp_path / "no-model", status="error")


def test_chat_streams_several_turns_and_begins_as_ask_does(run, monkeypatch):
    answer = run("ask", *SHORT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nWhat is shown?\n\nNever asked\n"))
    first, second, end = run("chat", *SHORT).split("You:   ")[1:]
    assert words(first) == words(f"Model: {answer}")
    assert second.startswith("Model: ") and not end


def test_a_later_turn_of_the_chat_has_the_whole_conversation(run, monkeypatch, tiny_model):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nWhat is shown?\n"))
    first, second, _ = run("chat", *SHORT).split("You:   ")[1:]
    processor = AutoProcessor.from_pretrained(tiny_model)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    turns = [(QUESTION, words(first).removeprefix("Model:").strip()), ("What is shown?", None)]
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    messages[0]["content"].insert(0, {"type": "image", "path": STREET})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert words(second) == words(f"Model: {expected}")


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


def test_heat_map_has_the_views_and_the_gates(run, tiny_model):
    gates = run("heat_map").split("\n")[0].removeprefix("gates: ").split(", ")
    with Image.open("heat_map.png") as image:
        assert image.size == (3 * 512 + 2 * 28, 512 + 28)
        assert len(image.convert("RGB").getcolors(2**24)) > 1000
    processor = AutoProcessor.from_pretrained(tiny_model)
    model = AutoModelForImageTextToText.from_pretrained(tiny_model)
    with Image.open(STREET) as image, torch.no_grad():
        expected = model.get_image_features(**processor.image_processor(image, return_tensors="pt"))
    expected = [gate.float().mean().item() for gate in expected.mr_adapter_gates]
    assert [float(gate) for gate in gates] == pytest.approx(expected, abs=1e-3) and len(expected) == 3


def test_fields_are_validated_and_the_image_is_encoded_once(run, tmp_path, monkeypatch):
    answer = words(run("ask", "--max_new_tokens", 50))
    fields = {
        "any": {"question": QUESTION, "pattern": r"[\s\S]*"},
        "never": {"question": QUESTION, "pattern": "such an answer does not come"},
    }
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    result = json.loads(run("extract_fields", "--image", STREET, "--fields", "fields.json", status=True))
    assert words(result["any"]) == answer and result["never"] is None
    calls, forward = [], LlavaHrVisionModel.forward
    monkeypatch.setattr(
        LlavaHrVisionModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    fields = {"any": fields["any"], "again": fields["any"]}
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    result = json.loads(run("extract_fields", "--image", STREET, "--fields", "fields.json", status=False))
    assert words(result["any"]) == words(result["again"]) == answer
    assert len(calls) == 1


@pytest.fixture
def folder(tmp_path):
    """Twelve images and a text file with an image's name."""
    (tmp_path / "photos").mkdir()
    for number in range(12):
        name = ("street", "shelf", "receipt", "table", "panel")[number % 5]
        shutil.copy(IMAGES / f"{name}.jpg", tmp_path / "photos" / f"{number:02}.jpg")
    (tmp_path / "photos" / "05b.png").write_text("not an image")
    (tmp_path / "photos" / "notes.txt").write_text("not an image either")
    return tmp_path / "photos"


def test_captions_resume_after_a_kill_with_the_same_result(run, folder, tiny_model):
    arguments = ("--folder", folder, "--batch_size", 2, *SHORT)
    run("caption_folder", *arguments, "--output", "undisturbed.jsonl")
    expected = Path("undisturbed.jsonl").read_text()

    command = [sys.executable, "-m", "examples.caption_folder", "--model", tiny_model, *arguments]
    process = subprocess.Popen(
        [*map(str, command), "--output", str(Path("killed.jsonl").absolute())], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    killed = Path("killed.jsonl")
    while process.poll() is None and not (killed.exists() and killed.read_bytes().count(b"\n") >= 2):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    lines = killed.read_text().splitlines(keepends=True)
    assert 2 <= len(lines) < 13
    with killed.open("a") as file:  # what a kill in the middle of writing leaves
        file.write(expected.splitlines()[len(lines)][:20])

    run("caption_folder", *arguments, "--output", "killed.jsonl")
    # the broken image was tried again if its row was there before the kill: then that row is the last one now
    assert sorted(killed.read_text().splitlines()) == sorted(expected.splitlines())


def test_captions_are_those_of_ask_and_a_broken_image_is_reported(run, folder, monkeypatch):
    for file in sorted(folder.glob("*.jpg"))[3:]:
        file.unlink()
    Image.new("RGB", (1, 40_000)).save(folder / "03.png")  # can be read, but is too long for both views
    answer = run("ask", "--image", folder / "01.jpg", "--question", "What is shown?", *SHORT)
    calls, generate = [], LlavaHrForConditionalGeneration.generate
    monkeypatch.setattr(
        LlavaHrForConditionalGeneration, "generate", lambda *args, **kw: calls.append(kw) or generate(*args, **kw)
    )
    run("caption_folder", "--folder", folder, *SHORT)
    assert calls and all(call["do_sample"] is False and call["max_new_tokens"] == 6 for call in calls)
    rows = [json.loads(line) for line in Path("captions.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == ["00.jpg", "01.jpg", "02.jpg", "03.png", "05b.png"]
    assert words(rows[1]["answer"]) == words(answer)
    assert "answer" in rows[2] and "1 x 40000 pixels" in rows[3]["error"] and "answer" not in rows[3]
    assert "05b.png" in rows[4]["error"] and "answer" not in rows[4]


def test_captions_are_tried_again_where_there_was_an_error_and_nowhere_else(run, folder):
    for file in sorted(folder.glob("*.jpg"))[2:]:
        file.unlink()
    captions = Path("captions.jsonl")
    other = json.dumps({"image": "05b.png", "question": "Another one?", "error": "of another question"})
    captions.write_text(f"{other}\n")
    run("caption_folder", "--folder", folder, *SHORT)
    *kept, error = captions.read_text().splitlines()
    assert kept[0] == other and len(kept) == 3 and "05b.png" in json.loads(error)["error"]
    for file in folder.glob("*.jpg"):  # an answer stays, whatever became of its image
        file.write_text("not an image any more")
    shutil.copy(STREET, folder / "05b.png")
    run("caption_folder", "--folder", folder, *SHORT)
    assert captions.read_text().splitlines()[:-1] == kept
    row = json.loads(captions.read_text().splitlines()[-1])
    assert row["image"] == "05b.png" and "answer" in row and "error" not in row


def test_captions_do_not_touch_a_file_of_another_kind(run, folder, tmp_path):
    (tmp_path / "notes.md").write_text("my notes\nwithout an end")
    assert "notes.md" in run("caption_folder", "--folder", folder, "--output", "notes.md", status="error")
    assert (tmp_path / "notes.md").read_text() == "my notes\nwithout an end"


def test_many_questions_resume_with_the_same_answers(run, capsys):
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


def test_a_missing_package_is_named_with_its_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    message = run("export_onnx", status="error").lower()
    assert "onnxscript" in message and 'pip install ".[export]"' in message


def test_images_are_those_that_the_script_draws(tmp_path, monkeypatch):
    from examples import draw_pictures

    monkeypatch.setattr(draw_pictures, "OUTPUT", tmp_path)
    draw_pictures.main()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in IMAGES.iterdir()}
    for name in ("questions.jsonl", "ask_many.jsonl", "receipt.fields.json"):
        assert (tmp_path / name).read_text() == (IMAGES / name).read_text()


def test_every_example_is_in_the_table():
    examples = {file.stem for file in (ROOT / "examples").glob("*.py") if "__main__" in file.read_text()}
    table = (ROOT / "examples" / "README.md").read_text()
    assert {name for name in examples if f"`{name}.py`" not in table} == set()
