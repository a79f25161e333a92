# SPDX-License-Identifier: Apache-2.0
"""Evaluation on one's own data: metrics against hand-made counts, resuming, comparison, another model."""

import html
import json
import math
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from converted_checkpoints import ROOT, TINY_MODEL
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from small_training import chat
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from training import evaluate


def test_numbers():
    numbers = {"12": 12, "1,234.50": 1234.5, "$ 5": 5, "-3": -3, "12 %": 12, ".5": 0.5, "12 cats": None, "": None}
    assert {text: evaluate.parse_number(text) for text in numbers} == numbers


@pytest.mark.parametrize(
    ("expected", "answer", "exact", "anls", "numeric"),
    [
        ("Red", " Red\n", 1, 1, None),
        ("Red", "red", 0, 1, None),  # ANLS ignores case
        ("street", "strext", 0, 1 - 1 / 6, None),
        ("street", "x", 0, 0, None),  # below the threshold of one half
        ("100", "104.9", 0, None, 1),
        ("100", "106", 0, None, 0),
        ("100", "about 100", 0, None, 0),
        ("0", "0", 1, 1, 1),
    ],
)
def test_scores_of_text(expected, answer, exact, anls, numeric):
    result = evaluate.score(expected, answer)
    assert (result["exact"], result["numeric"], result["fields"]) == (exact, numeric, None)
    assert anls is None or result["anls"] == pytest.approx(anls)


@pytest.mark.parametrize(
    ("answer", "fields", "anls"),
    [
        ('{"shop": "Aldo", "items": [{"n": 1}, {"n": 2}]}', [3, 3, 3], 1),
        ('```json\n{"items": [{"n": 2}, {"n": 1}], "shop": "aldo"}\n```', [3, 3, 3], 1),
        ('{"shop": "Aldo", "items": [{"n": 1}], "date": "1"}', [2, 3, 3], 2 / 4),
        ('{"shop": "Aldo", "items": [{"n": 1}, {"n": 1}]}', [2, 3, 3], 2 / 3),
        ("Aldo", [0, 0, 3], 0),
    ],
)
def test_scores_of_json(answer, fields, anls):
    result = evaluate.score('{"shop": "Aldo", "items": [{"n": 1}, {"n": 2}]}', answer)
    assert result["fields"] == fields and result["anls"] == pytest.approx(anls)


def test_a_list_is_not_a_list_of_alternatives():
    assert evaluate.score('["a", "b"]', "a")["anls"] == 0 and evaluate.score('["a", "b"]', '["b", "a"]')["anls"] == 1
    assert evaluate.list_fields({"a": [1, {"b": None}]}) == [(("a", "[]"), "1"), (("a", "[]", "b"), "none")]


def make_record(exact, anls=0.0, fields=None, row=0):
    place = {"row": row, "turn": 1, "question": "?", "expected": "x"}
    return {**place, "exact": exact, "anls": anls, "numeric": None, "fields": fields}


def test_intervals():
    """Wilson's interval by its formula; the bootstrap's of a mean is close to the normal one."""
    shares = evaluate.summarize([make_record(int(index < 30), index % 10 / 10) for index in range(100)])
    n, p, z = 100, 0.3, 1.959964
    center, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(p * 0.7 / n + z**2 / 4 / n**2)
    exact = shares["exact"]
    assert (exact["value"], exact["low"], exact["high"]) == pytest.approx((p, center - half, center + half), abs=1e-4)
    error = np.std(np.arange(10) / 10) / 10
    low, high = shares["anls"]["low"], shares["anls"]["high"]
    assert (low, high) == pytest.approx((0.45 - 1.96 * error, 0.45 + 1.96 * error), abs=0.2 * error)
    assert "numeric" not in shares and "f1" not in shares

    metrics = evaluate.summarize([make_record(0, fields=[1, 2, 4]), make_record(0, fields=[2, 3, 2])])
    assert [metrics[name]["value"] for name in ("precision", "recall", "f1")] == pytest.approx(
        [3 / 5, 3 / 6, 2 * 3 / 11], abs=1e-4
    )


def test_paired_tests():
    """McNemar's p-value by the binomial formula: 2 improvements of 12 changed answers."""
    first = [make_record(int(i < 10), 0.5, row=i) for i in range(20)]
    second = [make_record(int(10 <= i < 12), 0.5 + 0.01 * (i % 3), row=i) for i in range(20)]
    result = evaluate.compare(first, second)
    assert result["exact"]["difference"] == pytest.approx(-0.4)
    expected = 2 * sum(math.comb(12, k) for k in range(3)) / 2**12
    assert result["exact"]["p_value"] == pytest.approx(expected, abs=1e-6)
    assert result["anls"]["p_value"] < 0.01
    assert evaluate.compare(first, first)["anls"]["p_value"] == 1
    with pytest.raises(ValueError, match="only 19 of 20 and 19 questions are the same"):
        evaluate.compare(first, first[1:])


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """Rows as a user has them: two turns with an image, one without, a type for some."""
    folder = tmp_path_factory.mktemp("receipts")
    rows = []
    for index in range(6):
        image = Image.new("RGB", (120, 90), "white")
        ImageDraw.Draw(image).text((10, 30), f"TOTAL {index}.50", fill="black")
        image.save(folder / f"{index}.png")
        turns = chat("<image>\nTotal?", f"{index}.50") + chat("As <b>JSON</b>?", json.dumps({"total": f"{index}.50"}))
        rows.append({"id": f"r{index}", "type": "receipt", "image": f"{index}.png", "conversations": turns})
    rows.append({"id": "text", "conversations": chat("Who?", "<script>alert(1)</script>")})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def run(receipts, output, model=TINY_MODEL, **options):
    options |= {"model": str(model), "data_path": str(receipts), "max_new_tokens": 4, "device": "cpu"}
    return evaluate.evaluate(evaluate.EvaluateOptions(str(output), **options))


def test_every_question_is_answered_and_reported(receipts, tmp_path):
    results = run(receipts, tmp_path / "run", batch_size=4)
    records = evaluate.read_answers(tmp_path / "run")
    assert len(records) == 13 and results["metrics"]["all"]["anls"]["questions"] == 13
    assert results["metrics"]["receipt"]["numeric"]["questions"] == 6
    assert results["metrics"]["receipt"]["f1"]["questions"] == 6
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page and html.escape("<script>alert(1)</script>") in page and "&lt;b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 12
    one = run(receipts, tmp_path / "one", batch_size=1)
    assert evaluate.compare(records, evaluate.read_answers(tmp_path / "one"))["exact"]["questions"] == 13
    assert one["metrics"].keys() == results["metrics"].keys()
    with pytest.raises(ValueError, match="has answers for another max_questions"):
        run(receipts, tmp_path / "run", max_questions=3)


KILLED = """
import os, signal
from training import evaluate
answer = evaluate.answer_questions
def killed(*args):
    for number, record in enumerate(answer(*args)):
        if number == 7: os.kill(os.getpid(), signal.SIGKILL)
        yield record
evaluate.answer_questions = killed
evaluate.main()
"""


def test_a_killed_evaluation_resumes(receipts, tmp_path):
    words = ["--model", TINY_MODEL, "--data_path", receipts, "--output", tmp_path / "run", "--device", "cpu"]
    words = [sys.executable, "-c", KILLED, *map(str, words), "--max_new_tokens", "4", "--batch_size", "1"]
    ended = subprocess.run(words, cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL and len(evaluate.read_answers(tmp_path / "run")) == 7
    with (tmp_path / "run" / "answers.jsonl").open("a") as file:
        file.write('{"row": 3, "tu')
    run(receipts, tmp_path / "run", batch_size=1)
    run(receipts, tmp_path / "whole", batch_size=1)
    assert evaluate.read_answers(tmp_path / "run") == evaluate.read_answers(tmp_path / "whole")


def test_two_runs_are_compared(receipts, tmp_path, monkeypatch, capsys):
    for name, processor_kwargs in (("a", "{}"), ("b", '{"do_convert_rgb": true}')):
        run(receipts, tmp_path / name, processor_kwargs=processor_kwargs)
    words = ["evaluate", "--compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    evaluate.main()
    line = r"exact match: [\d.]+ and [\d.]+, difference \+0.000, p = 1 \(13 questions\)"
    assert re.search(line, capsys.readouterr().out)
    assert "Largest differences" in (tmp_path / "ab" / "report.html").read_text()
    with pytest.raises(ValueError, match="`compare` takes two folders, but got 1"):
        evaluate.EvaluateOptions("x", compare=[str(tmp_path / "a")])


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # PEFT reads it
def test_a_dora_result_answers_as_the_merged_model(receipts, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*_proj", use_dora=True))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path / "dora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    answers = {}
    for name, folder in (("dora", tmp_path / "dora"), ("merged", tmp_path / "merged"), ("base", TINY_MODEL)):
        if name != "base":
            AutoProcessor.from_pretrained(TINY_MODEL).save_pretrained(folder)
        run(receipts, tmp_path / "runs" / name, model=folder, dtype="float32")
        answers[name] = evaluate.read_answers(tmp_path / "runs" / name)
    assert answers["dora"] == answers["merged"] != answers["base"]


def test_another_model_of_transformers(receipts, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(TINY_MODEL).tokenizer
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 14}
    text = {"model_type": "llama", **sizes, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_token_id)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %} {% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessor(size=28, crop_size=28), tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=template,
    ).save_pretrained(tmp_path / "llava")  # fmt: skip
    results = run(receipts, tmp_path / "run", model=tmp_path / "llava", batch_size=4)
    assert results["metrics"]["all"]["exact"]["questions"] == 13
