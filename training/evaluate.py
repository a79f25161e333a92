# SPDX-License-Identifier: Apache-2.0
"""
Answers every question of a dataset and scores the answers, or compares two such evaluations:

    python -m training.evaluate --model M --data_path test.jsonl --output results/m
    python -m training.evaluate --compare results/a results/b --output results/a-b

The model may be any image-text-to-text model of transformers, the data anything that training.train takes. The same
command resumes after an interruption. It writes `answers.jsonl`, `results.json` and `report.html` to `OUTPUT`.
"""

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from anls_star import anls_score
from datasets import Dataset
from peft import PeftModel
from PIL import Image
from scipy import stats
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, PreTrainedModel, ProcessorMixin
from transformers.image_processing_utils import BatchFeature
from trl.data_utils import prepare_multimodal_messages

from modeling_llava_hr.utils import run_command, write_text

from .data import DataConfig, leave_out_broken_rows, load_table, read_images, to_messages
from .lora import find_start


METRICS = {
    "exact": "exact match",
    "anls": "ANLS*",
    "numeric": "numbers within 5 %",
    "precision": "field precision",
    "recall": "field recall",
    "f1": "field F1",
}
SHARES = ("exact", "numeric")
TEMPLATE = Path(__file__).with_name("report.html.jinja")
NUM_WORST = 20
# Numbers in memory for a bootstrap or permutation test
MAX_RESAMPLED = 2_000_000


@dataclass
class EvaluateOptions:
    """What is evaluated, and how; described in the help of each field."""

    output: str = field(metadata={"help": "folder for answers, results and report"})
    model: str | None = field(default=None, metadata={"help": "folder or Hub id of a model or a LoRA result"})
    data_path: str | None = field(default=None, metadata={"help": "file, folder or Hub id of the data"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that relative image names start from"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset with several"})
    dataset_split: str = field(default="test", metadata={"help": "split of a dataset with several"})
    dataset_revision: str | None = field(default=None, metadata={"help": "revision of a dataset on the Hub"})
    skip_broken: bool = field(default=False, metadata={"help": "leave broken rows out; listed in the output"})
    max_questions: int | None = field(default=None, metadata={"help": "only the first questions"})
    batch_size: int = field(default=8, metadata={"help": "questions per call of `generate`"})
    max_new_tokens: int = field(default=128, metadata={"help": "length of an answer"})
    processor_kwargs: str = field(default="{}", metadata={"help": 'JSON for the processor, such as {"size": 768}'})
    dtype: str = field(default="auto", metadata={"help": "such as bfloat16; by default the checkpoint's"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "where to run"})
    compare: list[str] = field(default_factory=list, metadata={"help": "outputs of two evaluations to compare"})

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, but got {self.batch_size}.")
        if len(self.compare) not in (0, 2):
            raise ValueError(f"`compare` takes two folders, but got {len(self.compare)}.")
        if not self.compare and (self.model is None or self.data_path is None):
            raise ValueError("`model` and `data_path` are needed, or `compare` with two folders.")


def list_questions(table: Dataset) -> list[tuple[int, int]]:
    """Row and turn of every answer that training would learn, sorted by the number of images before it."""
    questions = []
    for index, row in enumerate(table.select_columns(["messages", "num_answers"])):
        answers = [turn for turn, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        for turn in answers[-row["num_answers"] :]:
            questions.append((_count_images(row["messages"][:turn]), index, turn))
    return [(index, turn) for _, index, turn in sorted(questions)]


def _count_images(messages: list[dict]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def get_text(message: dict) -> str:
    """The text of a message."""
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


@torch.inference_mode()
def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    table: Dataset,
    source: Dataset | None,
    questions: list[tuple[int, int]],
    batch_size: int = 8,
    max_new_tokens: int = 128,
    processor_kwargs: dict[str, Any] | None = None,
    prepare: Callable[[BatchFeature], dict] = dict,
) -> Iterator[dict]:
    """
    Answers questions greedily, with the preceding turns as they are in the data.

    Args:
        model, processor: Any image-text-to-text model.
        table, source, questions: See [`~training.data.load_table`] and [`list_questions`].
        batch_size, max_new_tokens, processor_kwargs: See [`EvaluateOptions`].
        prepare (`Callable`, *optional*): Converts the processor's output to the arguments of `generate`.

    Yields:
        `dict`: `row`, `turn`, `id`, `type`, `question`, `expected`, `answer`.
    """
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        rows, chats = [table[index] for index, _ in batch], []
        for row, (_, turn) in zip(rows, batch, strict=True):
            messages = to_messages(row["messages"][:turn])
            images = read_images(row, source)[: _count_images(messages)]
            chats.append(prepare_multimodal_messages(messages, images))
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", **(processor_kwargs or {})},
        ).to(model.device, dtype=model.dtype)
        length = inputs["input_ids"].shape[1]
        output = model.generate(**prepare(inputs), max_new_tokens=max_new_tokens, do_sample=False)
        answers = processor.batch_decode(output[:, length:], skip_special_tokens=True)
        for row, (index, turn), answer in zip(rows, batch, answers, strict=True):
            question, expected = get_text(row["messages"][turn - 1]), get_text(row["messages"][turn])
            place = {"row": index, "turn": turn, "id": row["id"], "type": row["type"]}
            yield {**place, "question": question, "expected": expected.strip(), "answer": answer.strip()}


def parse_json(text: str) -> Any:
    """Parses a text that is a JSON object or list, possibly in a code block; `None` if it is neither."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) else None


def parse_number(text: str) -> float | None:
    """Parses a text that is a number: `1,234.50`, `-3`, `12 %`, `$ 5`; `None` if it is not."""
    match = re.fullmatch(r"[^\w.,-]*(-?\d[\d,]*\.?\d*|-?\.\d+)\s*[^\w\s]?", text.strip())
    return float(match.group(1).replace(",", "")) if match else None


def list_fields(value: Any, keys: tuple = ()) -> list[tuple]:
    """Keys and values of all fields of a JSON value, values as text. The order of lists does not matter."""
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in list_fields(item, (*keys, key))]
    if isinstance(value, list):
        return [pair for item in value for pair in list_fields(item, (*keys, "[]"))]
    return [(keys, " ".join(str(value).lower().split()))]


def score(expected: str, answer: str) -> dict[str, Any]:
    """
    Scores of an answer: `exact` (0 or 1, ignoring spaces around it), `anls` (0 to 1, ANLS*, field by field for JSON),
    `numeric` (0 or 1, within 5 %; `None` unless a number is expected), and `fields`: the numbers of right, answered
    and expected fields (`None` unless JSON is expected).
    """
    structure, number = parse_json(expected), parse_number(expected)
    found = parse_json(answer) if structure is not None else None
    result: dict[str, Any] = {"exact": int(answer.strip() == expected.strip()), "numeric": None, "fields": None}
    # anls_score takes a list for alternatives if a text is expected
    truth, given = (expected, answer) if structure is None else (structure, {"": answer} if found is None else found)
    result["anls"] = anls_score(truth, given)
    if number is not None:
        answered = parse_number(answer)
        result["numeric"] = int(answered is not None and abs(answered - number) <= 0.05 * abs(number))
    if structure is not None:
        fields, guesses = Counter(list_fields(structure)), Counter([] if found is None else list_fields(found))
        result["fields"] = [(fields & guesses).total(), guesses.total(), fields.total()]
    return result


def get_ratio(record: dict, name: str) -> tuple[float, float] | None:
    """A metric of an answer as numerator and denominator; `None` if it does not apply to the question."""
    if name in ("precision", "recall", "f1"):
        if record["fields"] is None:
            return None
        right, answered, expected = record["fields"]
        return right, {"precision": answered, "recall": expected, "f1": (answered + expected) / 2}[name]
    return None if record[name] is None else (record[name], 1)


def _divide_sums(right: Any, total: Any, axis: int = -1) -> Any:
    return np.sum(right, axis) / np.maximum(np.sum(total, axis), 1)


def summarize(records: list[dict]) -> dict[str, dict]:
    """
    Metrics of answers with scores, by name: `value`, its 95 % confidence interval `low` to `high` (Wilson's for
    shares, the bootstrap's for others), and the number of `questions`. Omits metrics that no answer has.
    """
    result = {}
    for name in METRICS:
        ratios = [ratio for record in records if (ratio := get_ratio(record, name)) is not None]
        if not ratios:
            continue
        right, total = np.array(ratios, dtype=float).T
        if name in SHARES:
            interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
        elif len(right) > 1:
            options: dict[str, Any] = {"n_resamples": 1000, "method": "percentile", "rng": 0, "vectorized": True}
            options["batch"] = max(1, MAX_RESAMPLED // len(right))
            interval = stats.bootstrap((right, total), _divide_sums, paired=True, **options).confidence_interval
        else:
            interval = (math.nan, math.nan)
        numbers = dict(zip(("value", "low", "high"), (_divide_sums(right, total), *interval), strict=True))
        result[name] = {**{k: round(float(v), 4) for k, v in numbers.items()}, "questions": len(right)}
    return result


def compare(first: list[dict], second: list[dict]) -> dict[str, dict]:
    """
    Compares scored answers to the same questions, by metric: the means `first` and `second` and their `difference`,
    the `p_value` (McNemar's exact test for shares, a permutation test for others), and the number of `questions`.
    """
    keys = ("row", "turn", "question", "expected")
    a, b = ({tuple(record[key] for key in keys): record for record in records} for records in (first, second))
    if a.keys() != b.keys():
        raise ValueError(
            f"`compare`: only {len(a.keys() & b.keys())} of {len(a)} and {len(b)} questions are the same."
        )
    result = {}
    for name in ("exact", "anls", "numeric", "f1"):
        ratios = [(get_ratio(a[key], name), get_ratio(b[key], name)) for key in a]
        values = np.array([pair for pair in ratios if None not in pair], dtype=float)  # (questions, 2 runs, 2)
        if not len(values):
            continue
        values = values[..., 0] / np.maximum(values[..., 1], 1)
        difference = values[:, 1] - values[:, 0]
        better, worse = int((difference > 0).sum()), int((difference < 0).sum())
        if better + worse == 0:
            p_value = 1.0
        elif name in SHARES:
            p_value = stats.binomtest(better, better + worse).pvalue
        else:
            options: dict[str, Any] = {"n_resamples": 9999, "rng": 0, "vectorized": True}
            p_value = stats.permutation_test((difference,), np.mean, permutation_type="samples", **options).pvalue
        means = {"first": values[:, 0].mean(), "second": values[:, 1].mean(), "difference": difference.mean()}
        rounded = {key: round(float(value), 6) for key, value in means.items()}
        result[name] = {**rounded, "p_value": float(p_value), "questions": len(values)}
    return result


def read_answers(folder: Path) -> list[dict]:
    """The answers of an evaluation with their scores; ignores an incomplete last line of a killed run."""
    file = folder / "answers.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [{**record, **score(record["expected"], record["answer"])} for record in map(json.loads, lines)]


def evaluate(options: EvaluateOptions) -> dict:
    """
    Answers all questions that have no answer in `output` yet, and writes results and report. Raises a `ValueError` if
    the data cannot be read, or if `output` has answers of another evaluation.
    """
    output = Path(options.output)
    settings = {k: v for k, v in asdict(options).items() if k not in ("output", "compare", "batch_size", "device")}
    file, answers = output / "settings.json", output / "answers.jsonl"
    if file.exists() and (earlier := json.loads(file.read_text())) != settings:
        different = [name for name in settings if settings[name] != earlier.get(name)]
        raise ValueError(f"`output` ({output}) has answers for another {', '.join(different)}. Name another folder.")
    place = (options.image_folder, options.dataset_config, options.dataset_split, options.dataset_revision)
    report = output / "skipped_rows.jsonl"
    config = DataConfig(str(options.data_path), *place, skip_broken=options.skip_broken, report=report)
    table, source = load_table(config)
    table = leave_out_broken_rows(table, source, config, None)
    write_text(file, json.dumps(settings, indent=2))
    questions = list_questions(table)[: options.max_questions]
    done = {(record["row"], record["turn"]) for record in read_answers(output)}
    if todo := [question for question in questions if question not in done]:
        if answers.exists():  # remove an incomplete last line
            text = answers.read_text(encoding="utf-8")
            write_text(answers, text[: text.rfind("\n") + 1])
        start = find_start(str(options.model))
        model = AutoModelForImageTextToText.from_pretrained(start.base, dtype=options.dtype)
        if start.adapter is not None:
            model = PeftModel.from_pretrained(model, start.adapter)  # transformers drops the magnitudes of DoRA
        model, processor = model.to(options.device).eval(), AutoProcessor.from_pretrained(options.model)
        arguments = (options.batch_size, options.max_new_tokens, json.loads(options.processor_kwargs))
        found = answer_questions(model, processor, table, source, todo, *arguments)
        with answers.open("a", encoding="utf-8") as stream:
            for record in tqdm(found, "Answering", len(questions), initial=len(done), unit=" questions"):
                stream.write(json.dumps(record) + "\n")
                stream.flush()
    records = read_answers(output)
    types = sorted({record["type"] for record in records if record["type"] is not None})
    groups = {"all": records, **{name: [r for r in records if r["type"] == name] for name in types}}
    results = {**settings, "metrics": {name: summarize(group) for name, group in groups.items()}}
    worst = sorted(records, key=lambda record: (record["anls"], record["exact"], record["row"]))[:NUM_WORST]
    images = [[_to_data_uri(image) for image in read_images(table[record["row"]], source)] for record in worst]
    write_results(output, results, list(zip(worst, images, strict=True)))
    return results


def _to_data_uri(image: Image.Image) -> str:
    """A small JPEG for the report."""
    buffer = io.BytesIO()
    image.thumbnail((640, 640))
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def run_comparison(options: EvaluateOptions) -> dict:
    """Compares two evaluations, and writes results and report."""
    first, second = (read_answers(Path(folder)) for folder in options.compare)
    results = {"compare": options.compare, "comparison": compare(first, second)}
    others = {(record["row"], record["turn"]): record for record in second}
    pairs = [{**record, "other": others[record["row"], record["turn"]]} for record in first]
    pairs.sort(key=lambda pair: -abs(pair["anls"] - pair["other"]["anls"]))
    write_results(Path(options.output), results, [(pair, []) for pair in pairs[:NUM_WORST]])
    return results


def write_results(output: Path, results: dict, answers: list[tuple[dict, list[str]]]) -> None:
    """Writes `results.json` and `report.html`, in which the text of models and data is escaped."""
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    write_text(output / "report.html", template.render(results=results, answers=answers, names=METRICS))


def main() -> None:
    """Evaluates or compares, and prints the metrics."""
    (options,) = HfArgumentParser(EvaluateOptions).parse_args_into_dataclasses()
    results = run_comparison(options) if options.compare else evaluate(options)
    for group, metrics in results.get("metrics", {}).items():
        for name, m in metrics.items():
            print(f"{group}: {METRICS[name]} {m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f}, {m['questions']})")
    for name, m in results.get("comparison", {}).items():
        numbers = f"{m['first']:.3f} and {m['second']:.3f}, difference {m['difference']:+.3f}"
        print(f"{METRICS[name]}: {numbers}, p = {m['p_value']:.2g} ({m['questions']} questions)")
    print(f"{options.output}/report.html")


if __name__ == "__main__":
    run_command(main)
