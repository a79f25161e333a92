# SPDX-License-Identifier: Apache-2.0
"""A user's way on one's own data: check, split, LoRA on the tiny model, evaluation before and after, comparison."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageTextToText

from training.check_data import CheckOptions, check_data
from training.evaluate import EvaluateOptions, evaluate, run_comparison


TINY = Path(__file__).parent.parent.parent / "examples" / "tiny-llava-hr"


def make_receipts(folder: Path, num_receipts: int = 300, seed: int = 0) -> Path:
    """Receipts of 256 px as Parquet-free JSON lines: a question about the total, and one about all fields."""
    generator, rows = random.Random(seed), []
    (folder / "images").mkdir(parents=True)
    for index in range(num_receipts):
        total, table = str(generator.randrange(1000, 10000)), str(generator.randrange(10, 100))
        image = Image.new("RGB", (generator.randint(200, 256), 256), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
        for line, text in enumerate(("RECEIPT", f"TABLE {table}", "--------", f"TOTAL {total}")):
            draw.text((generator.randint(20, 60), 30 + 45 * line), text, fill="black", font=font)
        image.save(folder / "images" / f"{index}.png")
        part = [{"type": "image", "path": f"images/{index}.png"}, {"type": "text", "text": "What is the total?"}]
        turns = [("user", part), ("assistant", total), ("user", "As JSON?")]
        turns += [("assistant", json.dumps({"table": table, "total": total}))]
        messages = [
            {"role": role, "content": text if isinstance(text, list) else [{"type": "text", "text": text}]}
            for role, text in turns
        ]
        rows.append({"id": f"receipt-{index}", "type": "receipt", "messages": messages})
    split = num_receipts * 5 // 6
    for name, part in (("train", rows[:split]), ("test", rows[split:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


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
    options += ("--size", "56", "--high_res_size", "256")
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
