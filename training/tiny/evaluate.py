# SPDX-License-Identifier: Apache-2.0
"""
Exact-match accuracy on FinePrint's held-out questions, fine and coarse:

    python -m training.tiny.evaluate --model .cache/train-tiny/model --data .cache/train-tiny/fineprint-256-4

prints a JSON object. An answer counts if it is the expected one, character by character.
"""

import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from transformers.image_processing_utils import BatchFeature

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command, write_text

from ..data import DataConfig, load_table
from ..evaluate import answer_questions, list_questions


@dataclass
class EvaluateArguments:
    """Options of the command; the help describes each field."""

    model: str = field(metadata={"help": "folder or Hub id"})
    data: str = field(metadata={"help": "folder that training.tiny.fineprint made"})
    split: str = field(default="test", metadata={"help": "test or validation"})
    max_questions: int | None = field(default=None, metadata={"help": "only the first questions"})
    size: int | None = field(default=None, metadata={"help": "side of the image in pixels"})
    low_res_size: int | None = field(default=None, metadata={"help": "side of the low-resolution view in pixels"})
    zero_high_res: bool = field(default=False, metadata={"help": "replace the high-resolution view by zeros"})
    batch_size: int = field(default=32, metadata={"help": "questions per call of `generate`"})
    device: str = field(default="cpu", metadata={"help": "where to run"})
    output: str | None = field(default=None, metadata={"help": "file for the result"})


def summarize(results: list[dict]) -> dict:
    """
    Accuracy by kind of question and, for fine questions, by scene and number of texts.

    Args:
        results (`list[dict]`): Each has `kind`, `scene`, `num_signs`, `right`.

    Returns:
        `dict`: By kind and group: `accuracy`, `standard_error` (of the binomial distribution), `num_questions`.
    """
    groups = defaultdict(list)
    for result in results:
        groups[result["kind"]].append(result["right"])
        if result["kind"] == "fine":
            groups[f"fine, scene {result['scene']}"].append(result["right"])
            groups[f"fine, {result['num_signs']} texts"].append(result["right"])
    summary = {}
    for name, rights in sorted(groups.items()):
        share, number = sum(rights) / len(rights), len(rights)
        error = math.sqrt(share * (1 - share) / number)
        figures = {"accuracy": round(share, 4), "standard_error": round(error, 4)}
        summary[name] = {**figures, "num_questions": number}
    return summary


def evaluate(arguments: EvaluateArguments) -> dict:
    """
    Evaluates a model on FinePrint: accuracies, mean gates by kind of question, some answers, how long it took.

    Raises:
        ValueError: If the data is not there.
    """
    file = Path(arguments.data) / f"{arguments.split}.jsonl"
    table, source = load_table(DataConfig(str(file), str(file.parent / "images")))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(arguments.device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    given = {"size": arguments.size, "low_res_size": arguments.low_res_size}
    sizes = {"return_low_res": True, **{name: value for name, value in given.items() if value is not None}}
    gates: list[list[float]] = []

    def encode(inputs: BatchFeature) -> dict:
        """Encodes the images first, to keep the mean gate of every MR-Adapter for each."""
        names = ("pixel_values", "low_res_pixel_values", "image_sizes")
        views = {name: inputs.pop(name) for name in names if name in inputs}
        if arguments.zero_high_res:
            views["pixel_values"] = torch.zeros_like(views["pixel_values"])
        encoded = model.model.get_image_features(**views, return_dict=True)
        means = [gate.float().mean(dim=-1) for gate in encoded.mr_adapter_gates or ()]
        gates.extend(torch.stack(means, 1).tolist() if means else [[]] * len(inputs["input_ids"]))
        return {**inputs, "mm_encoder_outputs": {"image": encoded}}

    questions, start = list_questions(table)[: arguments.max_questions], time.time()
    answers = answer_questions(
        model, processor, table, source, questions, arguments.batch_size, 12, sizes, prepare=encode
    )
    results = []
    for number, record in enumerate(tqdm(answers, "Answering", len(questions), unit=" questions")):
        row = {name: rows[record["row"]][name] for name in ("kind", "scene", "num_signs")}
        new = {name: record[name] for name in ("question", "expected", "answer")}
        # one call of `generate` answers and encodes a batch before its first answer arrives
        results.append({**row, **new, "right": record["answer"] == record["expected"], "gates": gates[number]})
    return {
        "command": " ".join(["python", "-m", "training.tiny.evaluate", *sys.argv[1:]]),
        "accuracy": summarize(results),
        "mean_gates": {
            kind: torch.tensor([result["gates"] for result in results if result["kind"] == kind]).mean(0).tolist()
            for kind in sorted({result["kind"] for result in results})
        },
        "samples": [{name: result[name] for name in ("question", "expected", "answer")} for result in results[:12]],
        "seconds": round(time.time() - start),
    }


def main() -> None:
    """Prints the result, and writes it to `output`."""
    (arguments,) = HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses()
    result = json.dumps(evaluate(arguments), indent=2)
    print(result)
    if arguments.output:
        write_text(Path(arguments.output), result + "\n")


if __name__ == "__main__":
    run_command(main)
