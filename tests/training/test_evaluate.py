# SPDX-License-Identifier: Apache-2.0
"""Evaluation on one's own data: metrics against hand-made counts, resuming, comparison, another model."""

import html
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from training.evaluate import (
    EvaluateOptions,
    compare,
    evaluate,
    list_fields,
    main,
    parse_number,
    read_answers,
    score,
    summarize,
)


ROOT = Path(__file__).parent.parent.parent
TINY = str(ROOT / "examples" / "tiny-llava-hr")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("1,234.50", 1234.5),
        ("$ 5", 5),
        ("-3", -3),
        ("12 %", 12),
        (".5", 0.5),
        ("12 cats", None),
        ("", None),
    ],
)
def test_numbers(text, number):
    assert parse_number(text) == number


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
    result = score(expected, answer)
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
    result = score('{"shop": "Aldo", "items": [{"n": 1}, {"n": 2}]}', answer)
    assert result["fields"] == fields and result["anls"] == pytest.approx(anls)


def test_a_list_is_not_a_list_of_alternatives():
    assert score('["a", "b"]', "a")["anls"] == 0 and score('["a", "b"]', '["b", "a"]')["anls"] == 1
    assert list_fields({"a": [1, {"b": None}]}) == [(("a", "[]"), "1"), (("a", "[]", "b"), "none")]


def make_record(exact, anls=0.0, fields=None, row=0):
    place = {"row": row, "turn": 1, "question": "?", "expected": "x"}
    return {**place, "exact": exact, "anls": anls, "numeric": None, "fields": fields}


def test_intervals():
    """Wilson's interval by its formula; the bootstrap's of a mean is close to the normal one."""
    shares = summarize([make_record(int(index < 30), index % 10 / 10) for index in range(100)])
    n, p, z = 100, 0.3, 1.959964
    center, half = (p + z**2 / 2 / n) / (1 + z**2 / n), z / (1 + z**2 / n) * math.sqrt(p * 0.7 / n + z**2 / 4 / n**2)
    exact = shares["exact"]
    assert (exact["value"], exact["low"], exact["high"]) == pytest.approx((p, center - half, center + half), abs=1e-4)
    error = np.std(np.arange(10) / 10) / 10
    low, high = shares["anls"]["low"], shares["anls"]["high"]
    assert (low, high) == pytest.approx((0.45 - 1.96 * error, 0.45 + 1.96 * error), abs=0.2 * error)
    assert "numeric" not in shares and "f1" not in shares

    metrics = summarize([make_record(0, fields=[1, 2, 4]), make_record(0, fields=[2, 3, 2])])
    assert [metrics[name]["value"] for name in ("precision", "recall", "f1")] == pytest.approx(
        [3 / 5, 3 / 6, 2 * 3 / 11], abs=1e-4
    )


def test_paired_tests():
    """McNemar's p-value by the binomial formula: 2 improvements of 12 changed answers."""
    first = [make_record(int(i < 10), 0.5, row=i) for i in range(20)]
    second = [make_record(int(10 <= i < 12), 0.5 + 0.01 * (i % 3), row=i) for i in range(20)]
    result = compare(first, second)
    assert result["exact"]["difference"] == pytest.approx(-0.4)
    expected = 2 * sum(math.comb(12, k) for k in range(3)) / 2**12
    assert result["exact"]["p_value"] == pytest.approx(expected, abs=1e-6)
    assert result["anls"]["p_value"] < 0.01
    assert compare(first, first)["anls"]["p_value"] == 1
    with pytest.raises(ValueError, match="only 19 of 20 and 19 questions are the same"):
        compare(first, first[1:])


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """Rows as a user has them: two turns with an image, one without, a type for some."""
    folder = tmp_path_factory.mktemp("receipts")
    rows = []
    for index in range(6):
        image = Image.new("RGB", (120, 90), "white")
        ImageDraw.Draw(image).text((10, 30), f"TOTAL {index}.50", fill="black")
        image.save(folder / f"{index}.png")
        part = [{"type": "image", "path": f"{index}.png"}, {"type": "text", "text": "Total?"}]
        turns = [("user", part), ("assistant", [{"type": "text", "text": f"{index}.50"}])]
        turns += [("user", [{"type": "text", "text": "As <b>JSON</b>?"}])]
        turns += [("assistant", [{"type": "text", "text": json.dumps({"total": f"{index}.50"})}])]
        rows.append({"id": f"r{index}", "type": "receipt", "messages": [{"role": r, "content": c} for r, c in turns]})
    text = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<script>alert(1)</script>"}]
    rows.append({"id": "text", "messages": text})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def make_options(receipts, output, **options):
    return EvaluateOptions(str(output), model=TINY, data_path=str(receipts), max_new_tokens=4, device="cpu", **options)


def test_every_question_is_answered_and_reported(receipts, tmp_path):
    results = evaluate(make_options(receipts, tmp_path / "run", batch_size=4))
    records = read_answers(tmp_path / "run")
    assert len(records) == 13 and results["metrics"]["all"]["anls"]["questions"] == 13
    assert results["metrics"]["receipt"]["numeric"]["questions"] == 6
    assert results["metrics"]["receipt"]["f1"]["questions"] == 6
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>" not in page and html.escape("<script>alert(1)</script>") in page and "&lt;b&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 12
    one = evaluate(make_options(receipts, tmp_path / "one", batch_size=1))
    assert compare(records, read_answers(tmp_path / "one"))["exact"]["questions"] == 13
    assert one["metrics"].keys() == results["metrics"].keys()
    with pytest.raises(ValueError, match="has answers for another max_questions"):
        evaluate(make_options(receipts, tmp_path / "run", max_questions=3))


KILLED = """
import os, signal, sys
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
    arguments = ["--model", TINY, "--data_path", receipts, "--output", tmp_path / "run", "--device", "cpu"]
    arguments = [*map(str, arguments), "--max_new_tokens", "4", "--batch_size", "1"]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert ended.returncode == -signal.SIGKILL and len(read_answers(tmp_path / "run")) == 7
    with (tmp_path / "run" / "answers.jsonl").open("a") as file:
        file.write('{"row": 3, "tu')
    evaluate(make_options(receipts, tmp_path / "run", batch_size=1))
    evaluate(make_options(receipts, tmp_path / "whole", batch_size=1))
    assert read_answers(tmp_path / "run") == read_answers(tmp_path / "whole")


def test_two_runs_are_compared(receipts, tmp_path, monkeypatch, capsys):
    for name, size in (("a", "{}"), ("b", '{"do_convert_rgb": true}')):
        evaluate(make_options(receipts, tmp_path / name, processor_kwargs=size))
    words = ["evaluate", "--compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "ab"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    main()
    assert re.search(
        r"exact match: [\d.]+ and [\d.]+, difference \+0.000, p = 1 \(13 questions\)", capsys.readouterr().out
    )
    assert "Largest differences" in (tmp_path / "ab" / "report.html").read_text()
    monkeypatch.setattr(sys, "argv", ["evaluate", "--compare", str(tmp_path / "a"), "--output", "x"])
    with pytest.raises(ValueError, match="`compare` takes two folders, but got 1"):
        main()


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # PEFT reads it
def test_a_dora_result_answers_as_the_merged_model(receipts, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*_proj", use_dora=True))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path / "dora")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    answers = {}
    for name in ("dora", "merged", "base"):
        options = make_options(receipts, tmp_path / "runs" / name, dtype="float32")
        if name != "base":
            AutoProcessor.from_pretrained(TINY).save_pretrained(tmp_path / name)
            options.model = str(tmp_path / name)
        evaluate(options)
        answers[name] = read_answers(tmp_path / "runs" / name)
    assert answers["dora"] == answers["merged"] != answers["base"]


def test_another_model_of_transformers(receipts, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(TINY).tokenizer
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
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
    options = make_options(receipts, tmp_path / "run", batch_size=4)
    options.model = str(tmp_path / "llava")
    assert evaluate(options)["metrics"]["all"]["exact"]["questions"] == 13
