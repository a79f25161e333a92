# SPDX-License-Identifier: Apache-2.0
"""
Answers about images: LLaVA-HR against LLaVA-1.5 with the same ViT and language model.

    python -m benchmarks.inference                    # small models on a CPU
    python -m benchmarks.inference --preset 7b-cpu    # the shapes of 7B on a CPU, 8 GB of memory in bfloat16
    python -m benchmarks.inference --preset full      # 7B on a GPU

An answer is one call of `generate`, which reports each token: time to the first token and to the tenth (the paper's
protocol: one image, ten new tokens, prefill included, image preparation excluded), and the median gap between tokens.
Nothing is compared across calls: each makes a new cache, and with a static one torch records its CUDA graphs again.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.hf_argparser import HfArg

from modeling_llava_hr.utils import get_4bit_config

from .measure import (
    BenchmarkArguments,
    Timings,
    added_gpu_bytes,
    compare,
    make_target,
    ratio,
    run_benchmark,
    spread,
    synchronize,
    time_phase,
)
from .models import (
    CONTENDERS,
    SHAPES,
    Contender,
    copy_contender,
    get_weight_bytes,
    make_contenders,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The paper's protocol
PAPER_TOKENS = 10
VARIANTS = ("eager", "static", "4bit")
# Images that are not square, with `unpad`, and the targets for the padded square's cost over theirs
UNPADDED = {"llava-hr-1024-16:9": 1.35, "llava-hr-1024-1:3": 1.65}
# Contenders that are measured with each variant
VARIED = ("llava-hr-1024", "llava-1.5-1022")


@dataclass
class InferenceArguments(BenchmarkArguments):
    """
    Options of this benchmark. Beside SDPA with a growing cache there are other ways to run at 1024 px (`variants`):
    eager attention, a static cache (with which transformers compiles decoding on a GPU), a language model in NF4.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("cpu", "7b-cpu", "full")

    preset: str = HfArg(default="cpu", help="cpu, 7b-cpu or full")
    repeats: int | None = HfArg(default=None, help="rounds that count; 3, or 1 with 7b-cpu, by default")
    warmup: int | None = HfArg(default=None, help="rounds before them; 1, or 0 with 7b-cpu, by default")
    batch_sizes: list[int] | None = HfArg(default=None, help="prompts per batch; 1 and 2 (cpu) or 1 by default")
    new_tokens: int | None = HfArg(default=None, help="length of an answer; 64, 10 (7b-cpu) or 32 (full) by default")
    contenders: list[str] | None = HfArg(default=None, help="such as llava-hr-1024 llava-hr-1024-16:9; all by default")
    variants: list[str] | None = HfArg(
        default=None, help=f"{', '.join(VARIANTS)} or none; eager and 4bit (full) or none by default"
    )

    def __post_init__(self):
        once = self.preset == "7b-cpu"
        self.repeats = (1 if once else 3) if self.repeats is None else self.repeats
        self.warmup = (0 if once else 1) if self.warmup is None else self.warmup
        super().__post_init__()
        self.batch_sizes = self.batch_sizes or ([1, 2] if self.preset == "cpu" else [1])
        self.new_tokens = self.new_tokens or {"cpu": 64, "7b-cpu": PAPER_TOKENS, "full": 32}[self.preset]
        if self.variants is None:
            self.variants = ["eager", "4bit"] if self.preset == "full" else []
        self.variants = [variant for variant in self.variants if variant != "none"]
        if unknown := set(self.variants) - set(VARIANTS):
            raise ValueError(f"--variants are {', '.join(VARIANTS)} or none, but got {', '.join(sorted(unknown))}.")
        if self.new_tokens < PAPER_TOKENS:
            raise ValueError(f"--new_tokens must be at least {PAPER_TOKENS} (the paper's), but got {self.new_tokens}.")


class TokenClock(BaseStreamer):
    """Records when `generate` reports the prompt (first) and then each new token of a batch."""

    def __init__(self):
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        # transformers has copied the tokens to the CPU, so the device has finished them
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer(
    contender: Contender, inputs: dict[str, torch.Tensor], num_tokens: int, variant: str = "sdpa"
) -> list[float]:
    """
    Generates an answer of a given length, greedily.

    Args:
        contender ([`Contender`]): The model.
        inputs (`dict[str, torch.Tensor]`): Prompts with their images.
        num_tokens (`int`): Tokens of the answer.
        variant (`str`): `"sdpa"` or one of `VARIANTS`; for `"4bit"`, the model is quantized already.

    Returns:
        `list[float]`: Seconds from the call to each token, `num_tokens` of them.
    """
    model = contender.model
    model.set_attn_implementation("eager" if variant == "eager" else "sdpa")
    model.generation_config.eos_token_id = None  # random weights must not end an answer
    streamer = TokenClock()
    synchronize()
    start = time.perf_counter()
    model.generate(
        **inputs,
        max_new_tokens=num_tokens,
        do_sample=False,
        streamer=streamer,
        cache_implementation="static" if variant == "static" else None,
    )
    return [moment - start for moment in streamer.times[1:]]


def get_gap(moments: list[float]) -> float:
    """Median seconds between the tokens of an answer, from those of [`answer`]."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(moments))


@torch.no_grad()
def measure(
    contender: Contender, inputs: dict[str, torch.Tensor], num_tokens: int, variant: str = "sdpa"
) -> dict[str, float]:
    """Seconds of an answer: `towers` (alone), `first_token`, `ten_tokens`, `next_token` (the median gap)."""
    moments = answer(contender, inputs, num_tokens, variant)
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    return {
        **time_phase(lambda: contender.model.get_image_features(**pixels), "towers"),
        "first_token": moments[0],
        "ten_tokens": moments[PAPER_TOKENS - 1],
        "next_token": get_gap(moments),
    }


def describe(phases: dict[str, list[float]], batch_size: int) -> dict[str, Any]:
    """A contender's figures for the record: seconds of its phases, and the speeds that follow."""
    seconds = {phase: spread(values) for phase, values in phases.items()}
    return {
        "seconds": seconds,
        "tokens_per_second": batch_size * PAPER_TOKENS / seconds["ten_tokens"]["median"],
        "decoded_tokens_per_second": batch_size / seconds["next_token"]["median"],
    }


def quantize(contenders: dict[str, Contender], arguments: InferenceArguments) -> dict[str, Contender]:
    """Copies of those of `VARIED` with one language model, in 4 bits as `from_pretrained` makes it."""
    hr, llava = (contenders[name] for name in VARIED)
    quantized = type(hr.model).from_pretrained(
        None,
        config=hr.model.config,
        state_dict=hr.model.state_dict(),
        dtype=arguments.torch_dtype,
        device_map=arguments.device,
        quantization_config=get_4bit_config(arguments.torch_dtype),
    )
    return {VARIED[0]: dataclasses.replace(hr, model=quantized), VARIED[1]: copy_contender(llava, quantized)}


def run_contest(
    contest: dict[str, tuple[Contender, str]], batch_size: int, arguments: InferenceArguments
) -> Iterator[tuple[dict[str, Any], Timings]]:
    """
    Measures contenders side by side at one batch size.

    Args:
        contest (`dict[str, tuple]`): By name, a contender and its variant.
        batch_size (`int`): Prompts per batch.
        arguments ([`InferenceArguments`]): Options.

    Yields:
        `tuple`: After each run, the entries of the record and the timings, see [`compare`].
    """

    def run(name: str) -> dict[str, float]:
        """One run. On a GPU the first one measures the memory of this model alone: its weights and what a run adds."""
        if not arguments.on_gpu or name in peaks:
            return runs[name]()
        phases: dict[str, float] = {}
        added = added_gpu_bytes(lambda: phases.update(runs[name]()))
        peaks[name] = added + get_weight_bytes(contest[name][0].model)
        return phases

    peaks: dict[str, int] = {}
    runs = {
        name: partial(measure, contender, contender.make_inputs(batch_size), arguments.new_tokens, variant)
        for name, (contender, variant) in contest.items()
    }
    for timings in compare({name: partial(run, name) for name in runs}, arguments, f"batch {batch_size}"):
        entries = {}
        for name, phases in timings.items():
            contender, _ = contest[name]
            entries[name] = {"sides": contender.sides, "image_tokens": contender.num_image_tokens}
            entries[name] |= describe(phases, batch_size) if phases else {"out_of_memory": True}
            if name in peaks:
                entries[name]["peak_bytes"] = peaks[name]
        yield entries, timings


def find_targets(timings: Timings, arguments: InferenceArguments) -> list[dict[str, Any]]:
    """The project's targets for one prompt per batch and the results; see [`make_target`]."""
    of_7b = arguments.preset == "full"
    base, low, llava = (timings.get(name) or {} for name in ("llava-hr-1024", "llava-hr-384", "llava-1.5-1022"))
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
            *(sooner, 6 if arguments.preset == "cpu" else 5, True),
        ),
        *(
            make_target(
                f"time to the first token at 1024 px, padded over unpadded, {name.rpartition('-')[2]}",
                ratio(base.get("first_token"), (timings.get(name) or {}).get("first_token")),
                *(target, True, arguments.preset == "cpu"),
            )
            for name, target in UNPADDED.items()
        ),
    ]


def draw(figure: "Figure", results: dict[str, Any], arguments: InferenceArguments) -> None:
    """Time to first token and tokens/s over the side of the image, and the cost of the towers."""
    figure.set_size_inches(13, 4)
    left, middle, right = figure.subplots(1, 3)
    batch_size = arguments.batch_sizes[0]
    entries = {name: e for name, e in results["resolutions"][str(batch_size)].items() if "seconds" in e}
    for family in ("llava-hr", "llava-1.5"):
        ours = [entry for name, entry in entries.items() if name.startswith(family) and ":" not in name]
        sides = [max(entry["sides"].values()) for entry in ours]
        left.plot(sides, [entry["seconds"]["first_token"]["median"] for entry in ours], "o-", label=family)
        middle.plot(sides, [entry["tokens_per_second"] for entry in ours], "o-", label=family)
    for axes, title in ((left, "seconds to the first token"), (middle, f"tokens/s, {PAPER_TOKENS} new tokens")):
        axes.set(title=title, xlabel="side of the image in pixels", ylim=(0, None))
        axes.legend()
    bars = right.barh(list(entries), [entry["seconds"]["towers"]["median"] for entry in entries.values()])
    labels = [f"{entry['image_tokens']} tokens" for entry in entries.values()]
    right.bar_label(bars, labels, padding=3, fontsize="small")
    right.set(title="seconds of the towers per image")
    right.margins(x=0.35)
    figure.suptitle(f"Batch of {batch_size}, {arguments.dtype}, {arguments.preset} preset")


def run(arguments: InferenceArguments) -> Iterator[dict[str, Any]]:
    """Measures all batch sizes and then the variants; yields the results after each run."""
    names = (*(("llava-hr-384", *VARIED) if arguments.preset == "7b-cpu" else CONTENDERS), *UNPADDED)
    names = arguments.contenders or names
    contenders = make_contenders(SHAPES[arguments.preset], names, arguments.device, arguments.torch_dtype)
    contest = {name: (contender, "sdpa") for name, contender in contenders.items()}
    results: dict[str, Any] = {"resolutions": {}, "variants": {}, "targets": []}
    for batch_size in arguments.batch_sizes:
        for entries, timings in run_contest(contest, batch_size, arguments):
            results["resolutions"][str(batch_size)] = entries
            if batch_size == 1:
                results["targets"] = find_targets(timings, arguments)
            yield results
    if arguments.variants:
        quantized = quantize(contenders, arguments) if "4bit" in arguments.variants else {}
        contest = {
            f"{name}, {variant}": ((quantized if variant == "4bit" else contenders)[name], variant)
            for variant in ("sdpa", *arguments.variants)
            for name in VARIED
        }
        for results["variants"], _ in run_contest(contest, 1, arguments):
            yield results


def main() -> None:
    run_benchmark("inference", InferenceArguments, run, draw)


if __name__ == "__main__":
    main()
