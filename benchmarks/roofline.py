# SPDX-License-Identifier: Apache-2.0
"""
How close the parts of LLaVA-HR come to what the machine can do: FLOPs (counted by torch) and bytes against the rates
of a large matrix product and of a large copy, measured in the same rounds.

    python -m benchmarks.roofline                  # small model on a CPU
    python -m benchmarks.roofline --preset full    # 7B on a GPU, decoding with a static cache, compiled

Bytes are those that must be moved at least: weights, inputs and outputs of a part, and the cache. The record also has
the operations that take most of the time to the first token, and what compiled towers change.
"""

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from ._common import BenchmarkArguments, Timing, compare_phases, make_target, ratio, run_benchmark, time_phase
from ._models import SHAPES, Contender, compile_towers, get_weight_bytes, make_contender
from .inference import answer, get_gaps, see


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "llava-hr-1024"


@dataclass
class RooflineArguments(BenchmarkArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        repeats (`int`): See [`BenchmarkArguments`].
        batch_size (`int`, *optional*): Images per pass of the towers, 2 (cpu) or 8 (full) by default; prefill and
            decoding take one prompt.
        text_tokens (`int`): Length of the prompt without its image in tokens.
        new_tokens (`int`): Length of the answer in tokens.
        matrix_side (`int`, *optional*): Side of the square matrices that are multiplied; 2048 or 8192 by default.
        copied_bytes (`int`, *optional*): What is copied; 256 MB or 2 GB by default.
        compiled (`bool`): Whether the whole vision tower is also compiled (`mode="reduce-overhead"`: CUDA graphs on a
            GPU) and compared, towers alone and time to the first token, with one image.
    """

    repeats: int = field(default=5, metadata={"help": "rounds that count"})
    batch_size: int | None = field(default=None, metadata={"help": "images per pass of the towers"})
    text_tokens: int = field(default=50, metadata={"help": "length of the prompt without its image in tokens"})
    new_tokens: int = field(default=64, metadata={"help": "length of the answer in tokens"})
    matrix_side: int | None = field(default=None, metadata={"help": "side of the matrices that are multiplied"})
    copied_bytes: int | None = field(default=None, metadata={"help": "what is copied"})
    compiled: bool = field(default=True, metadata={"help": "whether compiled towers are measured as well"})

    def __post_init__(self):
        super().__post_init__()
        large = self.preset == "full"
        self.batch_size = self.batch_size or (8 if large else 2)
        self.matrix_side = self.matrix_side or (8192 if large else 2048)
        self.copied_bytes = self.copied_bytes or (2 * 1024**3 if large else 256 * 1024**2)
        if self.new_tokens < 2:
            raise ValueError(f"--new_tokens must be at least 2 (the first is not decoded), but got {self.new_tokens}.")


@dataclass(frozen=True)
class Part:
    """
    A part of the model.

    Args:
        run (`Callable`): Runs it once.
        num_bytes (`int`): What has to be moved at least, in bytes.
    """

    run: Callable[[], Any]
    num_bytes: int


def get_cache_bytes(contender: Contender, num_tokens: int) -> int:
    """Keys and values of `num_tokens` tokens of one prompt, in bytes."""
    config = contender.model.config.text_config
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * num_tokens * contender.model.dtype.itemsize


def make_parts(contender: Contender, arguments: RooflineArguments) -> dict[str, Part]:
    """
    The parts of a LLaVA-HR up to the first token, each with inputs of its own; they overlap where the name says so.

    Args:
        contender ([`Contender`]): The model at a resolution, on any device.
        arguments ([`RooflineArguments`]): How many images and tokens.
    """
    model, tower = contender.model, contender.model.model.vision_tower
    language_model = model.model.language_model
    like = {"device": model.device, "dtype": model.dtype}
    batch_size, num_patches = arguments.batch_size, contender.num_image_tokens
    pixels = contender.make_pixels(batch_size)
    high, low = pixels["pixel_values"], pixels["low_res_pixel_values"]
    grid, side = int(num_patches**0.5), high.shape[-1] // tower.high_res_tower.stride
    tokens = torch.randn(batch_size, num_patches, tower.fusion.low_res_proj.in_features, **like)
    features = torch.randn(batch_size, tower.high_res_tower.num_channels, side, side, **like)
    prompt = torch.randn(1, num_patches + arguments.text_tokens, model.lm_head.in_features, **like)

    def run_vit():
        hidden = tower.pre_layernorm(tower.embeddings(low))
        for layer in tower.layers:
            hidden = layer(hidden, attention_mask=None)

    def run_adapters():
        hidden = tokens
        for adapter in tower.mr_adapters:
            hidden, _ = adapter(hidden, features, grid)
        tower.fusion(hidden, features, grid)

    def prefill():
        model.lm_head(language_model(inputs_embeds=prompt, use_cache=True).last_hidden_state[:, -1:])

    def count(*things: torch.nn.Module | torch.Tensor) -> int:
        return sum(get_weight_bytes(t) if isinstance(t, torch.nn.Module) else t.nbytes for t in things)

    projected = batch_size * num_patches * model.lm_head.in_features * model.dtype.itemsize
    vision = (tower, model.model.multi_modal_projector)
    return {
        "ConvNeXt": Part(lambda: tower.high_res_tower(high), count(tower.high_res_tower, high, features)),
        "ViT": Part(run_vit, count(tower.embeddings, tower.layers, low, tokens)),
        "adapters and fusion": Part(run_adapters, count(tower.mr_adapters, tower.fusion, tokens, features, tokens)),
        "towers and projector": Part(
            lambda: model.get_image_features(**pixels), count(*vision, low, high) + projected
        ),
        "prefill": Part(
            prefill,
            count(language_model.layers, model.lm_head, prompt) + get_cache_bytes(contender, prompt.shape[1]),
        ),
    }


def get_decoding_bytes(contender: Contender, arguments: RooflineArguments) -> int:
    """What a new token has to move on average: weights of the language model's layers and head, and the cache."""
    length = contender.num_image_tokens + arguments.text_tokens + arguments.new_tokens // 2
    weights = get_weight_bytes(contender.model.model.language_model.layers) + contender.model.lm_head.weight.nbytes
    return weights + get_cache_bytes(contender, length)


@torch.no_grad()
def count_flops(run: Callable[[], Any]) -> int:
    """FLOPs of a call on the meta device, counted by torch; attention counts without its causal mask."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def count_decoding_flops(contender: Contender, arguments: RooflineArguments) -> int:
    """FLOPs of a new token in the middle of the answer, counted on the meta device."""
    model, length = contender.model, contender.num_image_tokens + arguments.text_tokens + arguments.new_tokens // 2
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, length - 1, dtype=torch.long, device="meta"), cache=cache)
    token = torch.ones(1, 1, dtype=torch.long, device="meta")
    return count_flops(lambda: model(input_ids=token, cache=cache))


def decode(contender: Contender, inputs: dict[str, torch.Tensor], arguments: RooflineArguments) -> dict[str, float]:
    """The median gap between tokens of one answer, `seconds`; compiled where there is a GPU."""
    variant = "static" if arguments.on_gpu else "sdpa"
    return {"seconds": statistics.median(get_gaps(answer(contender, inputs, arguments.new_tokens, variant)))}


def run_first_token(contender: Contender, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of the towers alone and to the first token: `towers`, `first_token`."""
    towers = see(contender, {name: inputs[name] for name in contender.sides})
    return {**towers, "first_token": answer(contender, inputs, 1)[0]}


def compare_compiled(contender: Contender, arguments: RooflineArguments) -> Iterator[dict[str, Any]]:
    """
    Eager towers against compiled ones, one image: yields the median seconds of each, and how many times as long eager
    ones take (`speedup`).
    """
    inputs = contender.make_inputs(1, arguments.text_tokens)
    both = {"eager": contender, "compiled": compile_towers(contender)}
    functions = {name: functools.partial(run_first_token, each, inputs) for name, each in both.items()}
    for timings in compare_phases(functions, arguments, "compiled towers"):
        eager, compiled = (timings.get(name) or {} for name in both)
        yield {
            phase: {
                "seconds": {name: each[phase].to_dict() for name, each in timings.items() if each},
                "speedup": ratio(eager.get(phase), compiled.get(phase)),
            }
            for phase in ("towers", "first_token")
        }


def find_top_operations(contender: Contender, arguments: RooflineArguments) -> list[dict[str, Any]]:
    """The operations of the time to the first token by torch's profiler, see [`rank_operations`]."""
    inputs = contender.make_inputs(1, arguments.text_tokens)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if arguments.on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        answer(contender, inputs, 1)
    return rank_operations(profiler.key_averages(), arguments.on_gpu)


def rank_operations(events: Iterable[FunctionEventAvg], on_gpu: bool, number: int = 12) -> list[dict[str, Any]]:
    """
    The operations that take most of the time, with their share of it.

    Args:
        events (`Iterable`): The profiler's averages, by name.
        on_gpu (`bool`): Whether the time that counts is that of an operation's kernels. Each kernel is also an event
            of its own, which is omitted: its time is already that of the operation that launched it.
        number (`int`): How many.
    """
    durations = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in events
        if event.device_type == DeviceType.CPU
    ]
    total = sum(duration for _, duration, _ in durations)
    durations.sort(key=lambda operation: operation[1], reverse=True)
    return [{"operation": name, "share": time / total, "calls": calls} for name, time, calls in durations[:number]]


def describe(
    timings: dict[str, Timing], flops: dict[str, int], num_bytes: dict[str, int], arguments: RooflineArguments
) -> dict[str, Any]:
    """
    The record's entries: for each part its FLOPs, bytes and time, and the shares of the two measured limits.

    Args:
        timings (`dict[str, Timing]`): Of `"matrix product"`, `"copy"` and all parts that did not run out of memory.
        flops, num_bytes (`dict[str, int]`): Of all parts.
        arguments ([`RooflineArguments`]): Options.
    """
    most_flops, most_bytes = 2 * arguments.matrix_side**3, 2 * arguments.copied_bytes
    product, copy = timings["matrix product"], timings["copy"]
    parts = {}
    for name in flops:
        if name not in timings:
            continue
        timing = timings[name]
        of_rate = {key: value * flops[name] / most_flops for key, value in ratio(product, timing).items()}
        of_bandwidth = {key: value * num_bytes[name] / most_bytes for key, value in ratio(copy, timing).items()}
        parts[name] = {
            "flops": flops[name],
            "bytes": num_bytes[name],
            "seconds": timing.to_dict(),
            "share_of_matrix_rate": of_rate,
            "share_of_copy_bandwidth": of_bandwidth,
            # the limit is the one that allows less
            "limit": "matrix rate" if of_rate["median"] > of_bandwidth["median"] else "copy bandwidth",
        }
    return {
        "matrix_flops_per_second": most_flops / product.median,
        "copied_bytes_per_second": most_bytes / copy.median,
        "parts": parts,
    }


def find_targets(parts: dict[str, Any], arguments: RooflineArguments) -> list[dict[str, Any]]:
    """The project's targets for a GPU and the results; see [`make_target`]."""
    of_7b = arguments.preset == "full"
    towers, decoding = (parts.get(name, {}) for name in ("towers and projector", "decoding"))
    return [
        make_target(
            f"share of the matrix rate that the towers reach, {arguments.batch_size} images",
            *(towers.get("share_of_matrix_rate"), 0.45, True, of_7b and arguments.batch_size == 8),
        ),
        make_target(
            "share of the copy bandwidth that decoding reaches",
            *(decoding.get("share_of_copy_bandwidth"), 0.75, True, of_7b),
        ),
    ]


@torch.no_grad()
def run(arguments: RooflineArguments) -> Iterator[dict[str, Any]]:
    """Measures the parts, profiles the first token and compiles the towers; yields the results after each run."""
    shapes = SHAPES[arguments.preset]
    contender = make_contender(shapes, NAME, arguments.device, arguments.torch_dtype)
    on_meta = make_contender(shapes, NAME, "meta", arguments.torch_dtype)
    parts = make_parts(contender, arguments)
    flops = {name: count_flops(part.run) for name, part in make_parts(on_meta, arguments).items()}
    flops["decoding"] = count_decoding_flops(on_meta, arguments)
    num_bytes = {name: part.num_bytes for name, part in parts.items()}
    num_bytes["decoding"] = get_decoding_bytes(contender, arguments)

    like = {"device": arguments.device, "dtype": arguments.torch_dtype}
    left, right = (torch.randn(arguments.matrix_side, arguments.matrix_side, **like) for _ in range(2))
    source = torch.ones(arguments.copied_bytes, dtype=torch.uint8, device=arguments.device)
    target = torch.empty_like(source)
    limits = {"matrix product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    functions = {
        name: functools.partial(time_phase, function)
        for name, function in (*limits.items(), *((name, part.run) for name, part in parts.items()))
    }
    inputs = contender.make_inputs(1, arguments.text_tokens)
    functions["decoding"] = functools.partial(decode, contender, inputs, arguments)
    results: dict[str, Any] = {}
    for measured in compare_phases(functions, arguments):
        timings = {name: phases["seconds"] for name, phases in measured.items() if phases}
        if limits.keys() <= timings.keys():
            results = describe(timings, flops, num_bytes, arguments)
            results["targets"] = find_targets(results["parts"], arguments)
            yield results
    results["first_token_operations"] = find_top_operations(contender, arguments)
    yield results
    if arguments.compiled:
        for compared in compare_compiled(contender, arguments):
            results["compiled_towers"] = compared
            yield results


def draw(figure: "Figure", results: dict[str, Any], arguments: RooflineArguments) -> None:
    """The roofline: FLOPs per second over FLOPs per byte, double logarithmic."""
    figure.set_size_inches(7, 4.5)
    axes = figure.subplots()
    rate, bandwidth = results["matrix_flops_per_second"], results["copied_bytes_per_second"]
    places = [rate / bandwidth]
    for number, (name, part) in enumerate(results["parts"].items()):
        places.append(part["flops"] / part["bytes"])
        speed = part["flops"] / part["seconds"]["median"] / 1e9
        axes.plot(places[-1], speed, "o", color=f"C{number}", label=name)
    edges = [min(places) / 2, rate / bandwidth, max(places) * 2]
    axes.plot(edges, [min(rate, edge * bandwidth) / 1e9 for edge in edges], color="black", label="measured limits")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="GFLOPs per second")
    axes.set_title(f"LLaVA-HR at 1024 px, {arguments.dtype}, {arguments.preset} preset")
    axes.legend(fontsize="small")


def summarize(results: dict[str, Any], arguments: RooflineArguments) -> str:
    """The shares of each part and the effect of compiled towers, a line each."""
    lines = []
    for name, part in results["parts"].items():
        rate, bandwidth = (part[f"share_of_{limit}"]["median"] for limit in ("matrix_rate", "copy_bandwidth"))
        lines.append(f"{name}: {rate:.0%} of the matrix rate, {bandwidth:.0%} of the copy bandwidth")
    for phase, entry in results.get("compiled_towers", {}).items():
        if entry["speedup"]:
            lines.append(f"{phase}: {entry['speedup']['median']:.2f} times as fast with compiled towers")
    return "\n".join(lines)


def main() -> None:
    run_benchmark("roofline", RooflineArguments, run, draw, summarize)


if __name__ == "__main__":
    main()
