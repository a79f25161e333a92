# SPDX-License-Identifier: Apache-2.0
"""
Answers about pictures: LLaVA-HR against LLaVA-1.5 with the same ViT and language model, and what seeing costs in them
and in two rivals.

    python -m benchmarks.inference                  # small models on a CPU
    python -m benchmarks.inference --preset full    # 7B on a GPU, with all variants

Every answer is measured in one call of `generate`, which reports each token when it is there: time to the first token,
to the tenth (the paper's protocol: one picture, ten new tokens, prefill included, picture preparation excluded) and to
the last.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from ._common import (
    ModelArguments,
    Timing,
    added_gpu_bytes,
    compare_phases,
    in_fresh_process,
    make_target,
    ratio,
    run_benchmark,
    synchronize,
    time_phase,
    unless_out_of_memory,
)
from ._models import (
    SHAPES,
    Contender,
    Shapes,
    copy_contender,
    get_weight_bytes,
    make_4bit_config,
    make_contender,
    make_llava,
    make_llava_hr,
    make_rivals,
    share_language_model,
)


# The paper's protocol
PAPER_TOKENS = 10
VARIANTS = ("compiled", "eager", "static", "4bit")
# Those that the variants are measured with
VARIED = ("llava-hr-1024", "llava-1.5-1022")
COMPILED = "llava-hr-1024, compiled"


@dataclass
class InferenceArguments(ModelArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        repeats (`int`): See [`BenchmarkArguments`].
        batch_sizes (`list[int]`, *optional*):
            Prompts at once, each with a picture; 1 and 2 (cpu) or 1, 8 and 32 (full) by default.
        new_tokens (`int`, *optional*): Length of an answer in tokens; 64 (cpu) or 128 (full) by default.
        text_tokens (`int`): Length of a prompt without its picture in tokens.
        variants (`list[str]`, *optional*): Other ways to run, beside SDPA with a growing cache: `"compiled"`
            high-resolution tower (seeing alone), `"eager"` attention, `"static"` cache (with which transformers
            compiles decoding on a GPU), `"4bit"` language model (NF4). The first (cpu) or all (full) by default.
    """

    repeats: int = field(default=3, metadata={"help": "rounds that count"})
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "prompts at once"})
    new_tokens: int | None = field(default=None, metadata={"help": "length of an answer in tokens"})
    text_tokens: int = field(default=50, metadata={"help": "length of a prompt without its picture in tokens"})
    variants: list[str] | None = field(default=None, metadata={"help": f"other ways to run: {', '.join(VARIANTS)}"})

    def __post_init__(self):
        super().__post_init__()
        large = self.preset == "full"
        self.batch_sizes = self.batch_sizes or ([1, 8, 32] if large else [1, 2])
        self.new_tokens = self.new_tokens or (128 if large else 64)
        self.variants = list(VARIANTS if large else VARIANTS[:1]) if self.variants is None else self.variants
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"--variants are {', '.join(VARIANTS)}, but got {', '.join(sorted(unknown))}.")
        if self.new_tokens < PAPER_TOKENS:
            raise ValueError(f"--new_tokens must be at least {PAPER_TOKENS} (the paper's), but got {self.new_tokens}.")


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
        variant (`str`): `"sdpa"` or one of `VARIANTS`; what is compiled or in 4 bits the model has to be.

    Returns:
        `list[float]`: Seconds from the call to each token, `num_tokens` of them.
    """
    model = contender.model
    model.set_attn_implementation("eager" if variant == "eager" else "sdpa")
    model.generation_config.eos_token_id = None  # random weights must not end an answer
    clock = TokenClock()
    synchronize()
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
    return {"towers": time_phase(lambda: contender.model.get_image_features(**pixels))["seconds"]}


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


def make_contenders(shapes: Shapes, arguments: InferenceArguments) -> dict[str, Contender]:
    """LLaVA-HR and LLaVA-1.5 at all resolutions, with one language model in all of them."""
    hr = make_llava_hr(shapes, arguments.device, arguments.torch_dtype)
    llava = make_llava(shapes, arguments.device, arguments.torch_dtype)
    share_language_model(llava, next(iter(hr.values())).model)
    return {**hr, **llava}


def compile_tower(contender: Contender) -> Contender:
    """The same once more, with a high-resolution tower that torch compiles at its first use."""
    compiled = copy_contender(contender, contender.model)
    compiled.model.model.vision_tower.high_res_tower.compile(dynamic=False)
    return compiled


def quantize(contenders: dict[str, Contender], arguments: InferenceArguments) -> dict[str, Contender]:
    """Those of `VARIED` once more, with one language model in both, in 4 bits as `from_pretrained` makes it."""
    hr, llava = (contenders[name] for name in VARIED)
    quantized = type(hr.model).from_pretrained(
        None,
        config=hr.model.config,
        state_dict=hr.model.state_dict(),
        dtype=arguments.torch_dtype,
        device_map=arguments.device,
        quantization_config=make_4bit_config(arguments.torch_dtype),
    )
    return {VARIED[0]: dataclasses.replace(hr, model=quantized), VARIED[1]: copy_contender(llava, quantized)}


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

    def get_gpu_peak(name: str) -> int:
        """What a model that shares the GPU takes by itself while it runs: its weights and what is added."""
        return added_gpu_bytes(runs[name]) + get_weight_bytes(everyone[name].model)

    everyone, runs = {}, {}
    for name, (contender, variant) in contenders.items():
        everyone[name] = contender
        inputs = contender.make_inputs(batch_size, arguments.text_tokens)
        runs[name] = functools.partial(measure, contender, inputs, arguments, variant)
    for name, rival in rivals.items():
        everyone[name] = rival
        runs[name] = functools.partial(see, rival, rival.make_pixels(batch_size))

    peaks = cpu_peaks
    if arguments.on_gpu:
        peaks = {name: unless_out_of_memory(functools.partial(get_gpu_peak, name)) for name in runs}
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
    of_7b = arguments.preset == "full"
    base, low, llava = (timings.get(name, {}) for name in ("llava-hr-1024", "llava-hr-384", "llava-1.5-1022"))
    slower = ratio(base.get("ten_tokens"), low.get("ten_tokens"))
    loss = {key: 1 - 1 / value for key, value in slower.items()} if slower else None
    share = ratio(base.get("towers"), base.get("first_token"))
    faster, sooner = (ratio(llava.get(name), base.get(name)) for name in ("ten_tokens", "first_token"))
    return [
        make_target("loss of LLaVA-HR's tokens/s from 384 to 1024 px (paper: 0.208)", loss, 0.10, False, of_7b),
        make_target("share of the towers in the time to the first token at 1024 px", share, 0.15, False, of_7b),
        make_target("tokens/s at 1024 px over LLaVA-1.5's at 1022 px (paper: 3.5)", faster, 5, True, of_7b),
        make_target(
            "LLaVA-1.5's time to the first token at 1022 px over LLaVA-HR's at 1024 px",
            *(sooner, 5 if of_7b else 6, True, True),
        ),
    ]


def draw(results: dict[str, Any], arguments: InferenceArguments) -> Figure:
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
    return figure


def run(arguments: InferenceArguments) -> Iterator[dict[str, Any]]:
    """Measures all batch sizes and then the variants; yields the results after each."""
    shapes = SHAPES[arguments.preset]
    contenders = make_contenders(shapes, arguments)
    watchers = make_rivals(shapes, arguments.device, arguments.torch_dtype)
    if "compiled" in arguments.variants:
        watchers[COMPILED] = compile_tower(contenders[VARIED[0]])
    results = {"resolutions": {}, "compiled_towers": {}, "variants": {}, "targets": []}
    contest = {name: (contender, "sdpa") for name, contender in contenders.items()}
    for batch_size in arguments.batch_sizes:
        peaks = {} if arguments.on_gpu else get_cpu_peaks(shapes, contenders, batch_size, arguments)
        entries, timings = run_contest(contest, batch_size, arguments, watchers, peaks)
        results["resolutions"][str(batch_size)] = entries
        if COMPILED in watchers:  # how many times as fast
            eager, compiled = (timings.get(name, {}).get("towers") for name in (VARIED[0], COMPILED))
            results["compiled_towers"][str(batch_size)] = ratio(eager, compiled)
        if batch_size == 1:
            results["targets"] = find_targets(timings, arguments)
        yield results
    if variants := [variant for variant in arguments.variants if variant != "compiled"]:
        quantized = quantize(contenders, arguments) if "4bit" in variants else {}
        contest = {
            f"{name}, {variant}": ((quantized if variant == "4bit" else contenders)[name], variant)
            for variant in ("sdpa", *variants)
            for name in VARIED
        }
        results["variants"], _ = run_contest(contest, 1, arguments, {}, {})
        yield results


def main() -> None:
    run_benchmark("inference", InferenceArguments, run, draw)


if __name__ == "__main__":
    main()
