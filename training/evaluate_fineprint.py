# SPDX-License-Identifier: Apache-2.0
"""
Exact-match accuracy on FinePrint's held-out questions, fine and coarse:

    python -m training.evaluate_fineprint --model .cache/train-tiny/model --data .cache/train-tiny/fineprint-256-4

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
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from modeling_llava_hr import LlavaHrForConditionalGeneration, LlavaHrProcessor


@dataclass
class EvaluateArguments:
    """
    What is evaluated, and how.

    Args:
        model (`str`): Folder or Hub id of a model with its processor.
        data (`str`): Folder that [`training.fineprint`] made.
        split (`str`): `"test"` or `"validation"`.
        max_questions (`int`, *optional*): Only so many questions, from the first on.
        size, low_res_size (`int`, *optional*): Sides of the image and of its low-resolution view in pixels, if not
            the processor's.
        zero_high_res (`bool`): Replace the high-resolution view by zeros, to see what depends on it.
        batch_size (`int`): Questions at a time.
        device (`str`): Where to run.
        output (`str`, *optional*): File for the result.
    """

    model: str = field(metadata={"help": "folder or Hub id"})
    data: str = field(metadata={"help": "folder that training.fineprint made"})
    split: str = field(default="test", metadata={"help": "test or validation"})
    max_questions: int | None = field(default=None, metadata={"help": "only so many questions"})
    size: int | None = field(default=None, metadata={"help": "side of the image in pixels"})
    low_res_size: int | None = field(default=None, metadata={"help": "side of the low-resolution view in pixels"})
    zero_high_res: bool = field(default=False, metadata={"help": "replace the high-resolution view by zeros"})
    batch_size: int = field(default=32, metadata={"help": "questions at a time"})
    device: str = field(default="cpu", metadata={"help": "where to run"})
    output: str | None = field(default=None, metadata={"help": "file for the result"})


def get_standard_error(right: int, total: int) -> float:
    """Standard error of a share `right / total`, from the binomial distribution."""
    share = right / total
    return math.sqrt(share * (1 - share) / total)


def summarize(results: list[dict]) -> dict:
    """
    Accuracy by kind of question and, for fine questions, by scene and number of texts.

    Args:
        results (`list[dict]`): Each has `kind`, `scene`, `num_signs`, `right`.

    Returns:
        `dict`: By kind and group: `accuracy`, `standard_error`, `num_questions`.
    """
    groups = defaultdict(list)
    for result in results:
        groups[result["kind"]].append(result["right"])
        if result["kind"] == "fine":
            groups[f"fine, scene {result['scene']}"].append(result["right"])
            groups[f"fine, {result['num_signs']} texts"].append(result["right"])
    return {
        name: {
            "accuracy": round(sum(rights) / len(rights), 4),
            "standard_error": round(get_standard_error(sum(rights), len(rights)), 4),
            "num_questions": len(rights),
        }
        for name, rights in sorted(groups.items())
    }


def read_image(path: Path) -> Image.Image:
    """A picture in memory, its file closed."""
    with Image.open(path) as image:
        return image.convert("RGB")


@torch.inference_mode()
def get_answers(
    model: LlavaHrForConditionalGeneration,
    processor: LlavaHrProcessor,
    rows: list[dict],
    images: list[Image.Image],
    zero_high_res: bool,
    sizes: dict[str, int],
) -> tuple[list[str], list[list[float]]]:
    """
    Answers questions in one batch, greedily.

    Args:
        model, processor: The model.
        rows (`list[dict]`): One question each.
        images (`list[Image.Image]`): Their pictures.
        zero_high_res (`bool`): Whether the high-resolution view is replaced by zeros.
        sizes (`dict[str, int]`): `size` and `low_res_size` in pixels, as far as they are not the processor's.

    Returns:
        `tuple[list[str], list[list[float]]]`: Answers, and for each the mean gate of every MR-Adapter.
    """
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "text", "text": row["conversations"][0]["value"].removeprefix("<image>\n")},
                ],
            }
        ]
        for row, image in zip(rows, images, strict=True)
    ]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "return_low_res": True, **sizes},
    ).to(model.device)
    if zero_high_res:
        inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    views = {name: inputs.pop(name) for name in ("pixel_values", "low_res_pixel_values")}
    encoded = model.model.get_image_features(**views, return_dict=True)
    output = model.generate(**inputs, mm_encoder_outputs={"image": encoded}, max_new_tokens=12, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    gates = [gate.float().mean(dim=-1) for gate in encoded.mr_adapter_gates or ()]
    return [answer.strip() for answer in answers], torch.stack(gates, 1).tolist() if gates else [[]] * len(rows)


def evaluate(arguments: EvaluateArguments) -> dict:
    """
    Evaluates a model on FinePrint.

    Args:
        arguments ([`EvaluateArguments`]): What and how.

    Returns:
        `dict`: Accuracies, mean gates by kind of question, some answers, how long it took.

    Raises:
        ValueError: If the data are not there, or `batch_size` is no number of questions.
    """
    if arguments.batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, but got {arguments.batch_size}.")
    file = Path(arguments.data) / f"{arguments.split}.jsonl"
    if not file.exists():
        raise ValueError(f"`data`: {file} does not exist. Make it with `python -m training.fineprint`.")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][: arguments.max_questions]
    model = AutoModelForImageTextToText.from_pretrained(arguments.model).to(arguments.device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    given = {"size": arguments.size, "low_res_size": arguments.low_res_size}
    sizes = {name: value for name, value in given.items() if value is not None}
    results, start = [], time.time()
    for first in tqdm(range(0, len(rows), arguments.batch_size), desc="evaluation", unit="batch"):
        batch = rows[first : first + arguments.batch_size]
        images = [read_image(file.parent / "images" / row["image"]) for row in batch]
        answers, gates = get_answers(model, processor, batch, images, arguments.zero_high_res, sizes)
        for row, answer, gate in zip(batch, answers, gates, strict=True):
            question, expected = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
            row = {name: row[name] for name in ("kind", "scene", "num_signs")}
            new = {"question": question, "expected": expected, "answer": answer, "right": answer == expected}
            results.append({**row, **new, "gates": gate})
    return {
        "command": " ".join(["python", "-m", "training.evaluate_fineprint", *sys.argv[1:]]),
        "accuracy": summarize(results),
        "mean_gates": {
            kind: torch.tensor([result["gates"] for result in results if result["kind"] == kind]).mean(0).tolist()
            for kind in sorted({result["kind"] for result in results})
        },
        "samples": [{name: result[name] for name in ("question", "expected", "answer")} for result in results[:12]],
        "seconds": round(time.time() - start),
    }


def main() -> None:
    (arguments,) = HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses()
    try:
        result = json.dumps(evaluate(arguments), indent=2)
        print(result)
        if arguments.output:
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            Path(arguments.output).write_text(result + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
