# SPDX-License-Identifier: Apache-2.0
"""A user's way on one's own data: check, split, LoRA on the tiny model, evaluation before and after, comparison."""

from pathlib import Path

import pytest
from receipts import make_receipts
from transformers import AutoModelForImageTextToText

from training.check_data import CheckOptions, check_data
from training.evaluate import EvaluateOptions, evaluate, run_comparison


TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-llava-hr"


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL sets it
def test_receipts(mini, tmp_path, capsys):
    folder = make_receipts(tmp_path / "receipts", 24)
    assert check_data(CheckOptions(str(folder / "train.jsonl"))) == 0

    def run(model, name):
        output = str(tmp_path / name)
        options = EvaluateOptions(output, str(model), str(folder / "test.jsonl"), max_new_tokens=24, device="cpu")
        return evaluate(options)["metrics"]["receipt"]

    before = run(TINY, "before")
    options = ("--max_steps", "30", "--per_device_train_batch_size", "4", "--learning_rate", "5e-3", "--use_peft")
    options += ("--size", "256", "--low_res_size", "56")
    mini.train("finetune", TINY, folder / "train.jsonl", tmp_path / "lora", *options)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "lora")
    after = run(tmp_path / "lora", "after")
    assert before["f1"]["value"] == 0 and after["anls"]["questions"] == 8
    assert after["anls"]["value"] > before["anls"]["value"]  # it has learned to answer with JSON
    comparison = run_comparison(
        EvaluateOptions(str(tmp_path / "compare"), compare=[str(tmp_path / "before"), str(tmp_path / "after")])
    )
    difference = after["anls"]["value"] - before["anls"]["value"]
    assert comparison["comparison"]["anls"]["difference"] == pytest.approx(difference, abs=1e-3)
    assert (tmp_path / "after" / "report.html").read_text().count("data:image/jpeg") == 8
