# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest
from converted_checkpoints import TINY_MODEL

from training.tiny.evaluate import EvaluateArguments, evaluate, main, summarize


TINY = str(TINY_MODEL)


def test_summary_counts_by_kind_scene_and_number_of_texts():
    results = [
        {"kind": "fine", "scene": "street", "num_signs": 1, "right": True},
        {"kind": "fine", "scene": "street", "num_signs": 2, "right": False},
        {"kind": "fine", "scene": "table", "num_signs": 2, "right": True},
        {"kind": "coarse", "scene": "table", "num_signs": 2, "right": False},
    ]
    assert {name: tuple(group.values()) for name, group in summarize(results).items()} == {
        "coarse": (0.0, 0.0, 1),
        "fine": (0.6667, 0.2722, 3),  # the square root of (2 / 3) (1 / 3) / 3
        "fine, 1 texts": (1.0, 0.0, 1),
        "fine, 2 texts": (0.5, 0.3536, 2),
        "fine, scene street": (0.5, 0.3536, 2),
        "fine, scene table": (1.0, 0.0, 1),
    }


def test_the_trained_model_reads_with_its_sharp_view_alone(fineprint):
    rows = [json.loads(line) for line in (fineprint / "test.jsonl").read_text().splitlines()]
    result = evaluate(EvaluateArguments(model=TINY, data=str(fineprint), batch_size=5))
    assert sum(result["accuracy"][kind]["num_questions"] for kind in ("fine", "coarse")) == len(rows)
    assert result["accuracy"]["fine"]["accuracy"] >= 0.5
    assert {kind: len(gates) for kind, gates in result["mean_gates"].items()} == {"coarse": 3, "fine": 3}
    expected = [row["conversations"][1]["value"] for row in rows]
    assert [sample["expected"] for sample in result["samples"]] == expected[: len(result["samples"])]
    blind = evaluate(EvaluateArguments(model=TINY, data=str(fineprint), zero_high_res=True))
    assert blind["accuracy"]["fine"]["accuracy"] == 0


def test_the_command_writes_what_it_prints(fineprint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "evaluation.json"
    options = [f"--model={TINY}", f"--data={fineprint}", "--max_questions=3", "--size=256", "--low_res_size=56"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *options, f"--output={output}"])
    main()
    assert capsys.readouterr().out == output.read_text()
    result = json.loads(output.read_text())
    assert len(result["samples"]) == 3
    assert result["command"].startswith(f"python -m training.tiny.evaluate --model={TINY}")


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl .* does not exist"):
        evaluate(EvaluateArguments(model=TINY, data=str(tmp_path)))
