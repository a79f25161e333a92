# SPDX-License-Identifier: Apache-2.0
"""
FinePrint's held-out questions as tasks of lmms-eval, `fineprint` being both kinds:

    python -m training.export_fineprint --data .cache/train-tiny/fineprint-256-4 --output .cache/fineprint-tasks
    lmms-eval --include_path .cache/fineprint-tasks --tasks fineprint --model llava_hr --model_args pretrained=...

Written are a data set for `datasets.load_from_disk`, `OUTPUT/data`, with the splits `fine` and `coarse`, and a YAML
file for each task, with the data set's path. Questions, greedy answers and exact match are those of
[`training.evaluate_fineprint`].
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict, Features, Image, Value
from transformers import HfArgumentParser

from modeling_llava_hr.utils import new_folder


KINDS = ("fine", "coarse")
FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "question": Value("string"),
        "answer": Value("string"),
        "scene": Value("string"),
        "num_signs": Value("int64"),
    }
)


@dataclass
class ExportFinePrintArguments:
    """
    What is exported, and where to.

    Args:
        data (`str`): Folder that [`training.fineprint`] made.
        output (`str`): New folder.
        split (`str`): `"test"` or `"validation"`.
        max_questions (`int`, *optional*): Only so many questions, from the first on.
    """

    data: str = field(metadata={"help": "folder that training.fineprint made"})
    output: str = field(metadata={"help": "new folder"})
    split: str = field(default="test", metadata={"help": "test or validation"})
    max_questions: int | None = field(default=None, metadata={"help": "only so many questions"})


def get_task(kind: str, data: Path) -> dict:
    """
    A task in lmms-eval's form.

    Args:
        kind (`str`): `"fine"` or `"coarse"`.
        data (`Path`): Absolute path of the data set.
    """
    return {
        "task": f"fineprint_{kind}",
        "dataset_path": str(data),
        "dataset_kwargs": {"load_from_disk": True},
        "test_split": kind,
        "output_type": "generate_until",
        "doc_to_visual": "image",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 12, "do_sample": False, "until": []},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def export(arguments: ExportFinePrintArguments) -> None:
    """
    Writes the tasks. The folder appears when it is complete.

    Args:
        arguments ([`ExportFinePrintArguments`]): What and where to.

    Raises:
        ValueError: If the data are not there.
        ValueError: If the output folder exists.
    """
    file = Path(arguments.data) / f"{arguments.split}.jsonl"
    if not file.exists():
        raise ValueError(f"`data`: {file} does not exist. Make it with `python -m training.fineprint`.")
    rows: dict[str, list[dict]] = {kind: [] for kind in KINDS}
    for line in file.read_text(encoding="utf-8").splitlines()[: arguments.max_questions]:
        row = json.loads(line)
        question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
        image = str(file.parent / "images" / row["image"])
        rest = {name: row[name] for name in ("id", "scene", "num_signs")}
        rows[row["kind"]].append({**rest, "image": image, "question": question, "answer": answer})
    data = Path(arguments.output).resolve() / "data"
    with new_folder(Path(arguments.output)) as folder:
        # saving to disk copies the pictures' files into the tables
        splits = {kind: Dataset.from_list(content, features=FEATURES) for kind, content in rows.items() if content}
        DatasetDict(splits).save_to_disk(folder / "data")
        tasks = [get_task(kind, data) for kind in splits]
        group = {"group": "fineprint", "task": [task["task"] for task in tasks]}
        for name, content in [("fineprint", group), *((task["task"], task) for task in tasks)]:
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def main() -> None:
    (arguments,) = HfArgumentParser(ExportFinePrintArguments).parse_args_into_dataclasses()
    try:
        export(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
