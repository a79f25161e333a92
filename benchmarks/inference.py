# SPDX-License-Identifier: Apache-2.0
"""
Answers about images: LLaVA-HR against LLaVA-1.5 with the same ViT and language model, and what the towers cost in them
and in two rivals.

    python -m benchmarks.inference                    # small models on a CPU
    python -m benchmarks.inference --preset 7b-cpu    # the shapes of 7B on a CPU, 8 GB of memory
    python -m benchmarks.inference --preset full      # 7B on a GPU

An answer is one call of `generate`, which reports each token: time to the first token and to the tenth (the paper's
protocol: one image, ten new tokens, prefill included, image preparation excluded), and the median gap between tokens.
Nothing is compared across calls: each makes a new cache, and with a static one torch records its CUDA graphs again.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from ._common import (
    BenchmarkArguments,
    Timing,
    added_gpu_bytes,
    compare_phases,
    in_fresh_process,
    make_target,
    ratio,
    run_benchmark,
    synchronize,
    time_phase,
)
from ._models import (
    LLAVA_HR_SIDES,
    LLAVA_SIDES,
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
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        repeats (`int`, *optional*): See [`BenchmarkArguments`]; 3, or 1 with the 7b-cpu preset, by default.
        warmup (`int`, *optional*): See [`BenchmarkArguments`]; 1, or 0 with the 7b-cpu preset, by default.
        batch_sizes (`list[int]`, *optional*): Prompts per batch, each with an image; 1 and 2 (cpu) or 1 by default.
        new_tokens (`int`, *optional*): Length of an answer in tokens; 64 (cpu), 10 (7b-cpu) or 32 (full) by default.
        text_tokens (`int`): Length of a prompt without its image in tokens.
        variants (`list[str]`, *optional*): Other ways to run at 1024 px, beside SDPA with a growing cache: `"eager"`
            attention, `"static"` cache (with which transformers compiles decoding on a GPU), `"4bit"` language model
            (NF4), or `"none"`. Eager and 4bit (full) or none by default.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("cpu", "7b-cpu", "full")

    preset: str = field(default="cpu", metadata={"help": "cpu, 7b-cpu or full"})
    repeats: int | None = field(default=None, metadata={"help": "rounds that count"})
    warmup: int | None = field(default=None, metadata={"help": "rounds before them"})
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "prompts per batch"})
    new_tokens: int | None = field(default=None, metadata={"help": "length of an answer in tokens"})
    text_tokens: int = field(default=50, metadata={"help": "length of a prompt without its image in tokens"})
    variants: list[str] | None = field(default=None, metadata={"help": f"other ways to run: {', '.join(VARIANTS)}"})

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


def get_gaps(moments: list[float]) -> list[float]:
    """Seconds between the tokens of an answer, from those of [`answer`]."""
    return [later - earlier for earlier, later in itertools.pairwise(moments)]


def measure(
    contender: Contender, inputs: dict[str, torch.Tensor], arguments: InferenceArguments, variant: str = "sdpa"
) -> dict[str, float]:
    """Seconds of an answer: `towers` (by themselves), `first_token`, `ten_tokens`, `next_token` (the median gap)."""
    moments = answer(contender, inputs, arguments.new_tokens, variant)
    return {
        **see(contender, {name: inputs[name] for name in contender.sides}),
        "first_token": moments[0],
        "ten_tokens": moments[PAPER_TOKENS - 1],
        "next_token": statistics.median(get_gaps(moments)),
    }


@torch.no_grad()
def see(contender: Contender, pixels: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds from pixels to features in the language model's width: `towers`."""
    return {"towers": time_phase(lambda: contender.model.get_image_features(**pixels))["seconds"]}


def describe(timings: dict[str, Timing], batch_size: int) -> dict[str, Any]:
    """A contender's figures for the record: seconds of its phases, and the speeds that follow."""
    seconds = {phase: timing.to_dict() for phase, timing in timings.items()}
    if "ten_tokens" not in timings:
        return {"seconds": seconds}
    return {
        "seconds": seconds,
        "tokens_per_second": batch_size * PAPER_TOKENS / timings["ten_tokens"].median,
        "decoded_tokens_per_second": batch_size / timings["next_token"].median,
    }


def make_contenders(shapes: Shapes, arguments: InferenceArguments) -> dict[str, Contender]:
    """LLaVA-HR and LLaVA-1.5 at all resolutions (7b-cpu: at three), with one language model in all of them."""
    few = arguments.preset == "7b-cpu"
    hr_sides = {side: LLAVA_HR_SIDES[side] for side in ((384, 1024) if few else LLAVA_HR_SIDES)}
    hr = make_llava_hr(shapes, arguments.device, arguments.torch_dtype, sides=hr_sides)
    source = next(iter(hr.values())).model
    llava_sides = (1022,) if few else LLAVA_SIDES
    return {**hr, **make_llava(shapes, arguments.device, arguments.torch_dtype, llava_sides, source)}


def quantize(contenders: dict[str, Contender], arguments: InferenceArguments) -> dict[str, Contender]:
    """Copies of those of `VARIED` with one language model, in 4 bits as `from_pretrained` makes it."""
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
    """Makes a contender and generates its first token; for a fresh process."""
    contender = make_contender(shapes, name, arguments.device, arguments.torch_dtype)
    answer(contender, contender.make_inputs(batch_size, arguments.text_tokens), 1)


def add_cpu_peaks(
    entries: dict[str, Any], shapes: Shapes, names: Iterable[str], batch_size: int, arguments: InferenceArguments
) -> None:
    """Adds contenders' peak memory until the first token to the entries, each in a process of its own, in bytes."""
    names = [name for name in names if "seconds" in entries[name]]
    for name in tqdm(names, desc=f"batch {batch_size}, memory", unit="run"):
        _, entries[name]["peak_bytes"] = in_fresh_process(answer_alone, shapes, name, batch_size, arguments)


def run_contest(
    contenders: dict[str, tuple[Contender, str]],
    batch_size: int,
    arguments: InferenceArguments,
    rivals: dict[str, Contender],
) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Timing] | None]]]:
    """
    Measures contenders side by side at one batch size.

    Args:
        contenders (`dict[str, tuple]`): By name, a contender and its variant.
        batch_size (`int`): Prompts per batch.
        arguments ([`InferenceArguments`]): Options.
        rivals (`dict[str, Contender]`): Those of which the towers alone run.

    Yields:
        `tuple`: After each run, the entries of the record and the timings, see [`compare_phases`].
    """

    def run(name: str) -> dict[str, float]:
        """A run; on a GPU the first one measures the memory of the model by itself: its weights and what is added."""
        if not arguments.on_gpu or name in peaks:
            return runs[name]()
        phases: dict[str, float] = {}
        added = added_gpu_bytes(lambda: phases.update(runs[name]()))
        peaks[name] = added + get_weight_bytes(everyone[name].model)
        return phases

    everyone, runs, peaks = {}, {}, {}
    for name, (contender, variant) in contenders.items():
        everyone[name] = contender
        inputs = contender.make_inputs(batch_size, arguments.text_tokens)
        runs[name] = functools.partial(measure, contender, inputs, arguments, variant)
    for name, rival in rivals.items():
        everyone[name] = rival
        runs[name] = functools.partial(see, rival, rival.make_pixels(batch_size))

    functions = {name: functools.partial(run, name) for name in runs}
    for timings in compare_phases(functions, arguments, f"batch {batch_size}"):
        entries = {}
        for name, contender in everyone.items():
            if name not in timings:
                continue
            phases = timings[name]
            entries[name] = {"sides": contender.sides, "image_tokens": contender.num_image_tokens}
            entries[name] |= (
                {**describe(phases, batch_size), "peak_bytes": peaks.get(name)} if phases else {"out_of_memory": True}
            )
        yield entries, timings


def find_targets(timings: dict[str, dict[str, Timing] | None], arguments: InferenceArguments) -> list[dict[str, Any]]:
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
            *(sooner, 6 if arguments.preset == "cpu" else 5, True, True),
        ),
    ]


def draw(figure: "Figure", results: dict[str, Any], arguments: InferenceArguments) -> None:
    """Time to first token and tokens/s over the side of the image, and what the towers cost."""
    figure.set_size_inches(13, 4)
    left, middle, right = figure.subplots(1, 3)
    batch_size = arguments.batch_sizes[0]
    entries = {name: e for name, e in results["resolutions"][str(batch_size)].items() if "seconds" in e}
    for family in ("llava-hr", "llava-1.5"):
        mine = [entry for name, entry in entries.items() if name.startswith(family)]
        sides = [max(entry["sides"].values()) for entry in mine]
        first = [entry["seconds"]["first_token"] for entry in mine]
        error = [[abs(entry[edge] - entry["median"]) for entry in first] for edge in ("low", "high")]
        left.errorbar(sides, [entry["median"] for entry in first], yerr=error, marker="o", capsize=3, label=family)
        middle.plot(sides, [entry["tokens_per_second"] for entry in mine], marker="o", label=family)
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
    shapes = SHAPES[arguments.preset]
    contenders = make_contenders(shapes, arguments)
    in_memory_once = arguments.preset == "7b-cpu"  # no second model for peak memory, no rivals
    rivals = {} if in_memory_once else make_rivals(shapes, arguments.device, arguments.torch_dtype)
    results: dict[str, Any] = {"resolutions": {}, "variants": {}, "targets": []}
    contest = {name: (contender, "sdpa") for name, contender in contenders.items()}
    for batch_size in arguments.batch_sizes:
        for entries, timings in run_contest(contest, batch_size, arguments, rivals):
            results["resolutions"][str(batch_size)] = entries
            if batch_size == 1:
                results["targets"] = find_targets(timings, arguments)
            yield results
        if not (arguments.on_gpu or in_memory_once):
            add_cpu_peaks(entries, shapes, contenders, batch_size, arguments)
            yield results
    if arguments.variants:
        quantized = quantize(contenders, arguments) if "4bit" in arguments.variants else {}
        contest = {
            f"{name}, {variant}": ((quantized if variant == "4bit" else contenders)[name], variant)
            for variant in ("sdpa", *arguments.variants)
            for name in VARIED
        }
        for entries, _ in run_contest(contest, 1, arguments, {}):
            results["variants"] = entries
            yield results


def main() -> None:
    run_benchmark("inference", InferenceArguments, run, draw)


if __name__ == "__main__":
    main()
