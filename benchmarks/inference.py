# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Answers about pictures: LLaVA-HR against LLaVA-1.5 with the same ViT and language model, and what seeing costs in them
and in two rivals.

    python -m benchmarks.inference                   # small models on a CPU
    python -m benchmarks.inference --preset full     # 7B on a GPU, with the variants `eager`, `static` and `4bit`

Every answer is measured in one call of `generate`, which reports each token when it is there: time to the first token,
to the tenth (the paper's protocol: one picture, ten new tokens, prefill included, picture preparation excluded) and to
the last.
"""

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from ._common import (
    BenchmarkArguments,
    Timing,
    compare_phases,
    in_fresh_process,
    make_target,
    parse_arguments,
    peak_gpu_bytes,
    plot_path,
    synchronize,
    write_record,
)
from ._models import (
    SHAPES,
    Contender,
    Shapes,
    get_weight_bytes,
    make_contender,
    make_llava,
    make_llava_hr,
    make_rivals,
    share_language_model,
)


# The paper's protocol
PAPER_TOKENS = 10
VARIANTS = ("eager", "static", "4bit")
# Those that the variants are measured with
VARIED = ("llava-hr-1024", "llava-1.5-1022")


@dataclass
class InferenceArguments(BenchmarkArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        repeats (`int`): See [`BenchmarkArguments`].
        batch_sizes (`list[int]`, *optional*):
            Prompts at once, each with a picture; 1 and 2 (cpu) or 1, 8 and 32 (full) by default.
        new_tokens (`int`): Length of an answer in tokens.
        text_tokens (`int`): Length of a prompt without its picture in tokens.
        dtype (`str`, *optional*): `"float32"` (cpu) or `"bfloat16"` (full) by default.
        variants (`list[str]`, *optional*): Other ways to run, beside SDPA with a growing cache: `"eager"` attention,
            `"static"` cache (with which transformers compiles decoding on a GPU), `"4bit"` language model (NF4). None
            (cpu) or all (full) by default.
    """

    repeats: int = field(default=3, metadata={"help": "rounds that count"})
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "prompts at once"})
    new_tokens: int = field(default=128, metadata={"help": "length of an answer in tokens"})
    text_tokens: int = field(default=50, metadata={"help": "length of a prompt without its picture in tokens"})
    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16"})
    variants: list[str] | None = field(default=None, metadata={"help": f"other ways to run: {', '.join(VARIANTS)}"})

    def __post_init__(self):
        super().__post_init__()
        full = self.preset == "full"
        self.batch_sizes = self.batch_sizes or ([1, 8, 32] if full else [1, 2])
        self.dtype = self.dtype or ("bfloat16" if full else "float32")
        self.variants = (list(VARIANTS) if full else []) if self.variants is None else self.variants
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, but got {self.dtype!r}.")
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"--variants are {', '.join(VARIANTS)}, but got {', '.join(sorted(unknown))}.")
        if self.new_tokens < PAPER_TOKENS:
            raise ValueError(f"--new_tokens must be at least {PAPER_TOKENS} (the paper's), but got {self.new_tokens}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


class TokenClock(BaseStreamer):
    """Notes when the prompt (first) and then each new token of a batch were there."""

    def __init__(self):
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        # transformers has copied the tokens to the CPU: the device is done with them
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer(
    contender: Contender, inputs: dict[str, torch.Tensor], num_tokens: int, variant: str = "sdpa"
) -> list[float]:
    """
    Lets a model write an answer of a certain length, greedily.

    Args:
        contender ([`Contender`]): The model.
        inputs (`dict[str, torch.Tensor]`): Prompts with their pictures.
        num_tokens (`int`): Tokens of the answer.
        variant (`str`): `"sdpa"` or one of `VARIANTS`.

    Returns:
        `list[float]`: Seconds from the call to each token, `num_tokens` of them.
    """
    model = contender.model
    model.set_attn_implementation("eager" if variant == "eager" else "sdpa")
    model.generation_config.eos_token_id = None  # random weights must not end an answer
    clock = TokenClock()
    synchronize(str(model.device))
    start = time.perf_counter()
    model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        do_sample=False,
        streamer=clock,
        cache_implementation="static" if variant == "static" else None,
    )
    return [moment - start for moment in clock.times[1:]]


def measure(
    contender: Contender, inputs: dict[str, torch.Tensor], arguments: InferenceArguments, variant: str = "sdpa"
) -> dict[str, float]:
    """Seconds of the phases of an answer: `towers` (by themselves), `first_token`, `ten_tokens`, `all_tokens`."""
    moments = answer(contender, inputs, arguments.new_tokens, variant)
    phases = {"first_token": moments[0], "ten_tokens": moments[PAPER_TOKENS - 1], "all_tokens": moments[-1]}
    return {**see(contender, {name: inputs[name] for name in contender.sides}), **phases}


@torch.no_grad()
def see(contender: Contender, pixels: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds from pixels to features in the language model's width: `towers`."""
    device = str(contender.model.device)
    synchronize(device)
    start = time.perf_counter()
    contender.model.get_image_features(**pixels)
    synchronize(device)
    return {"towers": time.perf_counter() - start}


def describe(timings: dict[str, Timing], batch_size: int, arguments: InferenceArguments) -> dict[str, Any]:
    """A contender's figures for the record: how long its phases took, and the speeds that follow."""
    seconds = {phase: timing.to_dict() for phase, timing in timings.items()}
    if "ten_tokens" not in timings:
        return {"seconds": seconds}
    first, ten, last = (timings[name].median for name in ("first_token", "ten_tokens", "all_tokens"))
    return {
        "seconds": seconds,
        "tokens_per_second": batch_size * PAPER_TOKENS / ten,
        "decoded_tokens_per_second": batch_size * (arguments.new_tokens - 1) / (last - first),
    }


def quantize(contender: Contender) -> None:
    """Puts the linear layers of a language model into 4 bits (NF4), as `BitsAndBytesConfig` does on loading."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in contender.model.model.language_model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                dtype, device = linear.weight.dtype, linear.weight.device
                packed = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
                packed.weight = Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                layer.set_submodule(name, packed.to(device))


def make_contenders(shapes: Shapes, arguments: InferenceArguments) -> dict[str, Contender]:
    """LLaVA-HR and LLaVA-1.5 at all resolutions, with one language model in all of them."""
    hr = make_llava_hr(shapes, arguments.device, arguments.torch_dtype)
    llava = make_llava(shapes, arguments.device, arguments.torch_dtype)
    share_language_model(llava, next(iter(hr.values())).model)
    return {**hr, **llava}


def make_quantized(shapes: Shapes, arguments: InferenceArguments) -> dict[str, Contender]:
    """Those of `VARIED` once more, with one language model in 4 bits in both."""
    make = {"device": arguments.device, "dtype": arguments.torch_dtype}
    hr = make_llava_hr(shapes, **make)
    quantize(hr[VARIED[0]])
    llava = make_llava(shapes, **make, sides=(1022,))
    share_language_model(llava, hr[VARIED[0]].model)
    return {VARIED[0]: hr[VARIED[0]], **llava}


def answer_alone(shapes: Shapes, name: str, batch_size: int, arguments: InferenceArguments) -> None:
    """Makes a contender and lets it write its first token; for a fresh process."""
    contender = make_contender(shapes, name, arguments.device, arguments.torch_dtype)
    answer(contender, contender.make_inputs(batch_size, arguments.text_tokens), 1)


def get_cpu_peaks(
    shapes: Shapes, names: Iterable[str], batch_size: int, arguments: InferenceArguments
) -> dict[str, int]:
    """Peak memory of contenders on a CPU until the first token, each in a process of its own, in bytes."""
    bar = tqdm(list(names), desc=f"batch {batch_size}, memory", unit="run")
    return {name: in_fresh_process(answer_alone, shapes, name, batch_size, arguments)[1] for name in bar}


def get_gpu_peak(contender: Contender, run: Callable[[], Any]) -> int | None:
    """
    Peak memory of a model on a GPU that it shares with others while it runs, in bytes: its weights and what is added.

    Returns:
        `int`, or `None` if the memory does not suffice.
    """
    before = torch.cuda.memory_allocated()
    try:
        return peak_gpu_bytes(run) - before + get_weight_bytes(contender.model)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def run_contest(
    contenders: dict[str, tuple[Contender, str]],
    batch_size: int,
    arguments: InferenceArguments,
    rivals: dict[str, Contender],
    cpu_peaks: dict[str, int],
) -> tuple[dict[str, Any], dict[str, dict[str, Timing]]]:
    """
    Measures contenders side by side at one batch size.

    Args:
        contenders (`dict[str, tuple]`): By name, a contender and its variant.
        batch_size (`int`): Prompts at once.
        arguments ([`InferenceArguments`]): Options.
        rivals (`dict[str, Contender]`): Those that only see.
        cpu_peaks (`dict[str, int]`): Peak memory in bytes of those for which it was measured; on a GPU it is measured
            here.

    Returns:
        `tuple`: The entries of the record, and the timings of those that memory sufficed for.
    """
    everyone, runs = {}, {}
    for name, (contender, variant) in contenders.items():
        everyone[name] = contender
        inputs = contender.make_inputs(batch_size, arguments.text_tokens)
        runs[name] = functools.partial(measure, contender, inputs, arguments, variant)
    for name, rival in rivals.items():
        everyone[name] = rival
        runs[name] = functools.partial(see, rival, rival.make_pixels(batch_size))

    peaks = cpu_peaks
    if arguments.device.startswith("cuda"):
        peaks = {name: get_gpu_peak(everyone[name], run) for name, run in runs.items()}
        runs = {name: run for name, run in runs.items() if peaks[name] is not None}

    timings = compare_phases(runs, arguments, f"batch {batch_size}")
    entries = {}
    for name, contender in everyone.items():
        entries[name] = {"sides": contender.sides, "image_tokens": contender.num_image_tokens}
        if name in timings:
            entries[name] |= describe(timings[name], batch_size, arguments) | {"peak_bytes": peaks.get(name)}
        else:
            entries[name]["out_of_memory"] = True
    return entries, timings


def find_targets(timings: dict[str, dict[str, Timing]], arguments: InferenceArguments) -> list[dict[str, Any]]:
    """What the project wants of one prompt at a time, beside what came out; see [`make_target`]."""
    on_gpu, base = arguments.preset == "full", timings["llava-hr-1024"]
    slower = base["ten_tokens"].ratio(timings["llava-hr-384"]["ten_tokens"])
    share = base["towers"].ratio(base["first_token"])
    targets = [
        make_target(
            "loss of LLaVA-HR's tokens/s from 384 to 1024 px (paper: 0.208)",
            {key: 1 - 1 / value for key, value in slower.items()},
            *(0.10, False, on_gpu),
        ),
        make_target("share of the towers in the time to the first token at 1024 px", share, 0.15, False, on_gpu),
    ]
    if "llava-1.5-1022" in timings:
        other = timings["llava-1.5-1022"]
        faster, sooner = (other[name].ratio(base[name]) for name in ("ten_tokens", "first_token"))
        targets += [
            make_target("tokens/s at 1024 px over LLaVA-1.5's at 1022 px (paper: 3.5)", faster, 5, True, on_gpu),
            make_target(
                "LLaVA-1.5's time to the first token at 1022 px over LLaVA-HR's at 1024 px",
                sooner,
                *(5 if on_gpu else 6, True, True),
            ),
        ]
    return targets


def draw(results: dict[str, Any], arguments: InferenceArguments) -> None:
    """Time to first token and tokens/s over the side of the picture, and what seeing costs."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    batch_size = arguments.batch_sizes[0]
    entries = results["resolutions"][str(batch_size)]
    for family in ("llava-hr", "llava-1.5"):
        mine = [e for name, e in entries.items() if name.startswith(family) and "tokens_per_second" in e]
        sides = [max(entry["sides"].values()) for entry in mine]
        first = [entry["seconds"]["first_token"] for entry in mine]
        error = [[abs(entry[edge] - entry["median"]) for entry in first] for edge in ("low", "high")]
        left.errorbar(sides, [entry["median"] for entry in first], yerr=error, marker="o", capsize=3, label=family)
        middle.plot(sides, [entry["tokens_per_second"] for entry in mine], marker="o", label=family)
    for axes, title in ((left, "seconds to the first token"), (middle, f"tokens/s, {PAPER_TOKENS} new tokens")):
        axes.set(title=title, xlabel="side of the picture in pixels", ylim=(0, None))
        axes.legend()
    seen = {name: entry for name, entry in entries.items() if "seconds" in entry}
    bars = right.barh(list(seen), [entry["seconds"]["towers"]["median"] for entry in seen.values()])
    right.bar_label(bars, [f"{entry['image_tokens']} tokens" for entry in seen.values()], padding=3, fontsize="small")
    right.set(title="seconds to see a picture")
    right.margins(x=0.35)
    figure.suptitle(f"Batch of {batch_size}, {arguments.dtype}, {arguments.preset} preset")
    figure.savefig(plot_path("inference", arguments), dpi=120)


def main() -> None:
    arguments = parse_arguments(InferenceArguments)
    shapes = SHAPES[arguments.preset]
    contenders = make_contenders(shapes, arguments)
    rivals = make_rivals(shapes, arguments.device, arguments.torch_dtype)
    results = {"resolutions": {}, "variants": {}, "targets": []}
    contest = {name: (contender, "sdpa") for name, contender in contenders.items()}
    for batch_size in arguments.batch_sizes:
        peaks = get_cpu_peaks(shapes, contenders, batch_size, arguments) if arguments.device == "cpu" else {}
        entries, timings = run_contest(contest, batch_size, arguments, rivals, peaks)
        results["resolutions"][str(batch_size)] = entries
        if batch_size == 1:
            results["targets"] = find_targets(timings, arguments)
    if arguments.variants:
        quantized = make_quantized(shapes, arguments) if "4bit" in arguments.variants else {}
        contest = {
            f"{name}, {variant}": ((quantized if variant == "4bit" else contenders)[name], variant)
            for variant in ("sdpa", *arguments.variants)
            for name in VARIED
        }
        results["variants"], _ = run_contest(contest, 1, arguments, {}, {})
    write_record("inference", arguments, results)
    draw(results, arguments)
    for target in results["targets"]:
        print(f"{target['name']}: {target['measured']['median']:.3g} (target: {target['target']})")


if __name__ == "__main__":
    main()
