# SPDX-License-Identifier: Apache-2.0
"""
Answers questions about images from a file of JSON lines, in batches, into another one:

    python -m examples.ask_many --questions questions.jsonl --output answers.jsonl

Each line is {"id": ..., "image": ..., "question": ...}; images are files relative to `--questions`. Run again, it
resumes where it was stopped or killed. An image that cannot be read becomes a row with an `error`; the next run tries
it again.
"""

import argparse
import json
from pathlib import Path

from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from examples.caption_folder import HERE, read_left, write_answers
from modeling_llava_hr.utils import run_command


FIELDS = ("id", "image", "question")


def read_questions(file: Path) -> list[dict[str, str]]:
    """Rows with `FIELDS`."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row = {field: row[field] for field in FIELDS}
        except (KeyError, TypeError, ValueError):
            row = {}
        if not row or not all(isinstance(value, str) for value in row.values()):
            raise ValueError(f'{file}, line {number} must be {{"id": ..., "image": ..., "question": ...}} with texts.')
        rows.append(row)
    if len({row["id"] for row in rows}) < len(rows):
        raise ValueError(f"{file} has the same `id` more than once. Give each question its own.")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--questions", type=Path, default=HERE / "pictures" / "ask_many.jsonl", help="JSON lines")
    parser.add_argument("--output", type=Path, default=Path("answers.jsonl"), help="file that rows are appended to")
    parser.add_argument("--batch_size", type=int, default=4, help="questions per batch")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest answer")
    arguments = parser.parse_args()

    rows = read_questions(arguments.questions)
    left = read_left(arguments.output, rows)
    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    write_answers(pipe, left, len(rows) - len(left), arguments.questions.parent, arguments)


if __name__ == "__main__":
    run_command(main)
