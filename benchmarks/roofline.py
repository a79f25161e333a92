# SPDX-License-Identifier: Apache-2.0
"""
How close LLaVA-HR comes to what the machine can do: counted FLOPs of its parts against the rate of a large matrix
product, and then the bytes that decoding must move against the rate of a large copy, each measured in the same rounds.
And what compiled towers change.

    python -m benchmarks.roofline                  # small model on a CPU
    python -m benchmarks.roofline --preset full    # 7B on a GPU, decoding with a static cache, compiled
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.hf_argparser import HfArg

from .inference import PAPER_TOKENS, answer, get_gap, measure
from .measure import BenchmarkArguments, compare, get_phase, make_target, ratio, run_benchmark, spread, time_phase
from .models import PROMPT_TOKENS, SHAPES, Contender, compile_towers, count_flops, get_weight_bytes, make_contenders


NAME = "llava-hr-1024"
# Sizes for measuring the limits, by preset: side of the multiplied matrices, bytes of the copy
LIMITS = {"cpu": (2048, 256 * 2**20), "full": (8192, 2 * 2**30)}


@dataclass
class RooflineArguments(BenchmarkArguments):
    """Options of this benchmark. Prefill and decoding take one prompt."""

    batch_size: int | None = HfArg(default=None, help="images per pass of the towers; 2 (cpu) or 8 (full) by default")
    new_tokens: int = HfArg(default=64, help="length of the answer in tokens")
    compiled: bool = HfArg(default=True, help="compare compiled towers, with CUDA graphs on a GPU; one image")

    def __post_init__(self):
        super().__post_init__()
        self.batch_size = self.batch_size or (8 if self.preset == "full" else 2)
        if self.new_tokens < 2:
            raise ValueError(f"--new_tokens must be at least 2 (the first is not decoded), but got {self.new_tokens}.")


def make_parts(contender: Contender, arguments: RooflineArguments) -> dict[str, Callable[[], Any]]:
    """
    The parts of a LLaVA-HR up to the first token, by name, each with inputs of its own; the ConvNeXt is one of the
    towers.
    """
    model, tower = contender.model, contender.model.model.vision_tower
    pixels, width = contender.make_pixels(arguments.batch_size), model.lm_head.in_features
    num_tokens = contender.num_image_tokens + PROMPT_TOKENS
    prompt = torch.randn(1, num_tokens, width, device=model.device, dtype=model.dtype)

    def prefill() -> None:
        outputs = model.model.language_model(inputs_embeds=prompt, use_cache=True)
        model.lm_head(outputs.last_hidden_state[:, -1:])

    return {
        "ConvNeXt": lambda: tower.high_res_tower(pixels["pixel_values"]),
        "towers and projector": lambda: model.get_image_features(**pixels),
        "prefill": prefill,
    }


def get_decoding_bytes(contender: Contender, arguments: RooflineArguments) -> int:
    """Bytes that a new token reads on average: weights of the language model's layers and head, and the cache."""
    model, config = contender.model, contender.model.config.text_config
    length = contender.num_image_tokens + PROMPT_TOKENS + arguments.new_tokens // 2
    width = config.num_key_value_heads * config.head_dim
    cache = 2 * config.num_hidden_layers * width * length * model.dtype.itemsize
    return get_weight_bytes(model.model.language_model.layers) + model.lm_head.weight.nbytes + cache


def decode(contender: Contender, inputs: dict[str, torch.Tensor], arguments: RooflineArguments) -> dict[str, float]:
    """The median gap between tokens of one answer, `seconds`; compiled where there is a GPU."""
    variant = "static" if arguments.on_gpu else "sdpa"
    return {"seconds": get_gap(answer(contender, inputs, arguments.new_tokens, variant))}


def compare_compiled(contender: Contender, arguments: RooflineArguments) -> Iterator[dict[str, Any]]:
    """Eager towers against compiled ones, one image: yields the seconds of each phase, and the `speedup`."""
    inputs = contender.make_inputs(1)
    both = {"eager": contender, "compiled": compile_towers(contender)}
    functions = {name: partial(measure, each, inputs, PAPER_TOKENS) for name, each in both.items()}
    for timings in compare(functions, arguments, "compiled towers"):
        compared = {}
        for phase in ("towers", "first_token"):
            seconds = get_phase(timings, phase)
            compared[phase] = {
                "seconds": {name: spread(values) for name, values in seconds.items()},
                "speedup": ratio(seconds.get("eager"), seconds.get("compiled")),
            }
        yield compared


def describe(seconds: dict[str, list[float]], limit: str, most: int, work: dict[str, int]) -> dict[str, Any]:
    """
    The record's entries of the parts that are measured against a limit: time and share.

    Args:
        seconds (`dict[str, list[float]]`): Of the limit and of all parts that did not run out of memory.
        limit (`str`): `"matrix product"` or `"copy"`.
        most (`int`): FLOPs or bytes of the limit.
        work (`dict[str, int]`): FLOPs or bytes of the parts.
    """
    parts = {}
    for name in (name for name in work if name in seconds):
        share = {key: value * work[name] / most for key, value in ratio(seconds[limit], seconds[name]).items()}
        parts[name] = {"work": work[name], "seconds": spread(seconds[name]), "limit": limit, "share": share}
    return parts


def find_targets(parts: dict[str, Any], arguments: RooflineArguments) -> list[dict[str, Any]]:
    """The project's targets for a GPU and the results; see [`make_target`]."""
    of_7b = arguments.preset == "full"
    towers, decoding = (parts.get(name, {}).get("share") for name in ("towers and projector", "decoding"))
    name = f"share of the matrix rate that the towers reach, {arguments.batch_size} images"
    return [
        make_target(name, towers, 0.45, True, of_7b and arguments.batch_size == 8),
        make_target("share of the copy bandwidth that decoding reaches", decoding, 0.75, True, of_7b),
    ]


@torch.no_grad()
def run(arguments: RooflineArguments) -> Iterator[dict[str, Any]]:
    """Measures the parts, then decoding, then compiled towers; yields the results after each run."""
    shapes = SHAPES[arguments.preset]
    contender = make_contenders(shapes, [NAME], arguments.device, arguments.torch_dtype)[NAME]
    on_meta = make_contenders(shapes, [NAME], "meta", arguments.torch_dtype)[NAME]
    flops = {name: count_flops(part) for name, part in make_parts(on_meta, arguments).items()}
    num_bytes = {"decoding": get_decoding_bytes(contender, arguments)}

    like = {"device": arguments.device, "dtype": arguments.torch_dtype}
    side, copied = LIMITS[arguments.preset]
    left, right = (torch.randn(side, side, **like) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=arguments.device)
    target = torch.empty_like(source)
    parts = {"matrix product": lambda: left @ right, **make_parts(contender, arguments)}
    computing = {name: partial(time_phase, part) for name, part in parts.items()}
    decoding = partial(decode, contender, contender.make_inputs(1), arguments)
    moving = {"copy": partial(time_phase, lambda: target.copy_(source)), "decoding": decoding}
    results: dict[str, Any] = {"parts": {}}
    # decoding after the others: on a GPU it is compiled first, and their figures are on disk by then
    for contest, unit, most, work in (
        (computing, "flops", 2 * side**3, flops),
        (moving, "bytes", 2 * copied, num_bytes),
    ):
        limit = next(iter(contest))
        for timings in compare(contest, arguments, limit):
            seconds = get_phase(timings)
            if limit in seconds:
                results[f"{unit}_per_second"] = most / spread(seconds[limit])["median"]
                results["parts"] |= describe(seconds, limit, most, work)
                results["targets"] = find_targets(results["parts"], arguments)
                yield results
    if arguments.compiled:
        for results["compiled_towers"] in compare_compiled(contender, arguments):
            yield results


def summarize(results: dict[str, Any], arguments: RooflineArguments) -> str:
    """The share of each part and the effect of compiled towers, a line each."""
    lines = []
    for name, part in results["parts"].items():
        lines.append(f"{name}: {part['share']['median']:.0%} of the rate of a {part['limit']}")
    for phase, entry in results.get("compiled_towers", {}).items():
        if entry["speedup"]:
            lines.append(f"{phase}: {entry['speedup']['median']:.2f} times as fast with compiled towers")
    return "\n".join(lines)


def main() -> None:
    run_benchmark("roofline", RooflineArguments, run, describe=summarize)


if __name__ == "__main__":
    main()
