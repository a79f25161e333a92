# SPDX-License-Identifier: Apache-2.0
"""
Draws `examples/pictures`, which the other examples look at by default:

    python -m examples.draw_pictures

One image of each FinePrint scene, with texts that are in no training image; `questions.jsonl` with the answers in the
LLaVA format; and `receipt.fields.json` for examples.extract_fields.
"""

import itertools
import json
from pathlib import Path

from modeling_llava_hr.utils import run_command
from training.tiny.fineprint import SCENES, FinePrintConfig, draw_sample, get_questions


OUTPUT = Path(__file__).parent / "pictures"
CONFIG = FinePrintConfig(min_signs=2, max_signs=2, max_shapes=1, max_noise=8.0)
# The tiny model misreads some of the streets before; its accuracy on all of them is in docs/results.md
START = {"street": 60}


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    rows = []
    for name in SCENES:
        samples = (draw_sample(CONFIG, "test", index) for index in itertools.count(START.get(name, 0)))
        # two texts and a shape
        image, scene = next((p, s) for p, s in samples if s.name == name and len(s.signs) == 2 and s.shapes)
        (OUTPUT / f"{name}.jpg").write_bytes(image)
        turns = []
        for _, question, answer in get_questions(scene):
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        rows.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
        if name == "receipt":
            fields = {
                f"{sign.color} {sign.object}": {
                    "question": f"What does the {sign.color} {sign.object} say?",
                    "pattern": r"\d\.\d\d",
                }
                for sign in scene.signs
            }
            (OUTPUT / "receipt.fields.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (OUTPUT / "questions.jsonl").write_text(lines, encoding="utf-8")
    single = [
        {"id": f"{row['id']}-{number}", "image": row["image"], "question": turn["value"].removeprefix("<image>\n")}
        for row in rows
        for number, turn in enumerate(row["conversations"][::2])
    ]
    lines = "".join(json.dumps(row) + "\n" for row in single)
    (OUTPUT / "ask_many.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
