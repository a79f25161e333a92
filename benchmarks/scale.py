# SPDX-License-Identifier: Apache-2.0
"""
How the time to the first token grows with resolution, batch size and number of pictures, and what it is made of:

    python -m benchmarks.scale

Towers and language model are measured in each case, their FLOPs are counted, and for each of the two a line is fitted
through all cases:

    seconds = overhead + FLOPs / rate
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ._common import ModelArguments, compare_phases, run_benchmark, time_phase
from ._models import LLAVA_HR_SIDES, SHAPES, Contender, make_llava_hr
from .inference import see
from .plan import count_flops


@dataclass
class ScaleArguments(ModelArguments):
    """
    What is varied. Each is varied by itself, the others being the first of their list, and 1024 px.

    Args:
        batch_sizes (`list[int]`): Prompts at a time.
        pictures (`list[int]`): Pictures in a prompt.
        text_tokens (`int`): Tokens of a prompt besides.
    """

    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "prompts at a time"})
    pictures: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "pictures in a prompt"})
    text_tokens: int = field(default=50, metadata={"help": "tokens of a prompt besides"})


@dataclass(frozen=True)
class Case:
    """
    One measurement.

    Args:
        side (`int`): Side of the high-resolution view in pixels.
        batch_size (`int`): Prompts at a time.
        pictures (`int`): Pictures in each prompt.
    """

    side: int
    batch_size: int = 1
    pictures: int = 1

    @property
    def name(self) -> str:
        return f"{self.side} px, batch {self.batch_size}, {self.pictures} pictures"


def get_cases(arguments: ScaleArguments) -> list[Case]:
    """Resolutions, batch sizes and numbers of pictures, each varied by itself."""
    cases = [Case(side) for side in LLAVA_HR_SIDES]
    cases += [Case(1024, batch_size=size) for size in arguments.batch_sizes]
    cases += [Case(1024, pictures=number) for number in arguments.pictures]
    return list(dict.fromkeys(cases))


def make_inputs(contender: Contender, case: Case, text_tokens: int) -> dict[str, torch.Tensor]:
    """Arguments of `forward`: `case.pictures` pictures and then random text in each of `case.batch_size` prompts."""
    prompt = contender.make_inputs(case.batch_size, text_tokens)["input_ids"]
    image = prompt[:, : contender.num_image_tokens]
    input_ids = torch.cat([image] * (case.pictures - 1) + [prompt], dim=1)
    return {"input_ids": input_ids, **contender.make_pixels(case.batch_size * case.pictures)}


def count_case(contender: Contender, case: Case, text_tokens: int) -> tuple[int, int]:
    """Counted FLOPs of a case: of what sees the pictures, and of the language model with the head for all tokens."""
    more_tokens = (case.pictures - 1) * contender.num_image_tokens
    vision, text = count_flops(contender, text_tokens + more_tokens)
    return case.batch_size * case.pictures * vision, case.batch_size * text


def fit(flops: list[float], seconds: list[float]) -> dict[str, float]:
    """
    A line by least squares on relative errors, so that short cases count as much as long ones.

    Args:
        flops (`list[float]`): Of each case.
        seconds (`list[float]`): Measured.

    Returns:
        `dict`: `overhead` in seconds, `rate` in FLOPs a second, and `worst`, the largest relative error.
    """
    flops, seconds = np.array(flops, dtype=float), np.array(seconds)
    per_flop, overhead = np.polyfit(flops, seconds, deg=1, w=1 / seconds)
    errors = (overhead + per_flop * flops) / seconds - 1
    return {"overhead": float(overhead), "rate": float(1 / per_flop), "worst": float(np.abs(errors).max())}


def measure(contender: Contender, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds from the call to the first token, `first_token`, and their parts, `vision` and `text`."""
    vision = see(contender, {name: inputs[name] for name in contender.sides})["towers"]
    whole = time_phase(lambda: contender.model(**inputs, logits_to_keep=1))["seconds"]
    return {"first_token": whole, "vision": vision, "text": whole - vision}


@torch.inference_mode()
def run(arguments: ScaleArguments) -> Iterator[dict[str, Any]]:
    """Measures all cases; yields seconds and FLOPs of each that memory sufficed for, and the fits of both parts."""
    torch.manual_seed(0)
    shapes, dtype = SHAPES[arguments.preset], arguments.torch_dtype
    contenders = make_llava_hr(shapes, arguments.device, dtype)
    on_meta = make_llava_hr(shapes, "meta", dtype)
    functions, counted = {}, {}
    for case in get_cases(arguments):
        name = f"llava-hr-{case.side}"
        inputs = make_inputs(contenders[name], case, arguments.text_tokens)
        functions[case.name] = partial(measure, contenders[name], inputs)
        counted[case.name] = count_case(on_meta[name], case, arguments.text_tokens)
    timings = compare_phases(functions, arguments, "cost of the first token")
    rows = [
        {
            "side": case.side,
            "batch_size": case.batch_size,
            "pictures": case.pictures,
            "seconds": {phase: timing.to_dict() for phase, timing in timings[case.name].items()},
            "flops": dict(zip(("vision", "text"), counted[case.name], strict=True)),
        }
        for case in get_cases(arguments)
        if case.name in timings
    ]
    fits = {
        part: fit([row["flops"][part] for row in rows], [row["seconds"][part]["median"] for row in rows])
        for part in ("vision", "text")
    }
    yield {"cases": rows, "fit": fits}


def draw(results: dict[str, Any], arguments: ScaleArguments) -> Figure:
    """Measured times and the fitted line, against each of what was varied."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    fitted = results["fit"]
    panels = (("side", "high-resolution side, px"), ("batch_size", "batch size"), ("pictures", "pictures in a prompt"))
    for axes, (name, label) in zip(figure.subplots(1, 3), panels, strict=True):
        others = {"side": 1024, "batch_size": 1, "pictures": 1}
        others.pop(name)
        rows = sorted(
            (row for row in results["cases"] if all(row[key] == value for key, value in others.items())),
            key=lambda row: row[name],
        )
        x = [row[name] for row in rows]
        line = [
            sum(fitted[part]["overhead"] + row["flops"][part] / fitted[part]["rate"] for part in fitted)
            for row in rows
        ]
        seconds = [row["seconds"]["first_token"] for row in rows]
        median, low, high = (np.array([entry[key] for entry in seconds]) for key in ("median", "low", "high"))
        axes.errorbar(x, median, yerr=np.stack([median - low, high - median]), fmt="o", capsize=3, label="measured")
        axes.plot(x, line, label="fitted")
        axes.set(xlabel=label, ylabel="seconds to the first token", ylim=(0, None))
        axes.legend()
    return figure


def describe(results: dict[str, Any], arguments: ScaleArguments) -> str:
    """Seconds of each case, and the fits, a line each."""
    lines = []
    for row in results["cases"]:
        case = Case(row["side"], row["batch_size"], row["pictures"])
        lines.append(f"{case.name}: {row['seconds']['first_token']['median']:.3f} s")
    for part, fitted in results["fit"].items():
        rate, worst = fitted["rate"] / 1e9, fitted["worst"]
        lines.append(f"{part}: {fitted['overhead']:.4f} s and {rate:.1f} GFLOP/s, at most {worst:.0%} off")
    return "\n".join(lines)


def main() -> None:
    run_benchmark("scale", ScaleArguments, run, draw, describe)


if __name__ == "__main__":
    main()
