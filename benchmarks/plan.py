# SPDX-License-Identifier: Apache-2.0
"""
Predicts how long training takes and how much memory a GPU needs, from counted FLOPs:

    python -m benchmarks.plan --gpus 8 --gpu a800 --resolution 1024

FLOPs are counted on the shapes of the real models, without weights. How many of a GPU's FLOPs training uses, and what
a sample costs besides (reading images, communication), is fitted to the paper's training hours of LLaVA-1.5 alone
(`calibrate`), or is your own measurement (`--utilization`, `--overhead`). The paper's hours of LLaVA-HR, which the fit
does not use, are the check; it is printed with every plan.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.hf_argparser import HfArg

from .measure import OutputArguments, run_benchmark
from .models import CONTENDERS, LLAVA_HR_SIDES, SHAPES, Contender, count_flops, make_contenders


class Gpu(NamedTuple):
    """A GPU by its data sheet."""

    flops: float  # dense bfloat16 FLOPs per second
    memory: float  # bytes


GPUS = {
    "a100": Gpu(312e12, 80e9),
    "a800": Gpu(312e12, 80e9),
    "h100": Gpu(989e12, 80e9),
    "h200": Gpu(989e12, 141e9),
}
VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
MODELS = {
    "7b": SHAPES["full"],
    # Vicuna-13B and the ConvNeXt-XXL of LLaVA-HR-X
    "13b-x": dataclasses.replace(
        SHAPES["full"],
        text={**SHAPES["full"].text, **VICUNA_13B},
        high_res={"architecture": "convnext_xxlarge", "do_pooling": False},
    ),
}
# Samples of stage 1 (LCS-558K) and stage 2 (mix665k)
SAMPLES = {"pretrain": 558_128, "finetune": 665_298}
# Text tokens of a sample: a caption; an estimate for the chats, of which most are short and some are long
TEXT_TOKENS = {"pretrain": 30, "finetune": 280}
# FLOPs in units of a forward pass. A backward pass counts as two, or as one where parameters are frozen and gradients
# only pass through; gradient checkpointing repeats the forward pass.
TOWER_PASSES = {"pretrain": 1, "finetune": 4}
TEXT_PASSES = {"pretrain": 3, "finetune": 4}
PRETRAIN_SIDE = 384
LORA_RANK = 128  # of training/configs

# Training hours and memory in GB of 8 A800 (table of the paper; the hours are taken to be those of both stages)
PAPER_GPUS = 8
PAPER_LLAVA = {336: 15.6, 448: 19.4, 672: 31.8, 1022: 69.4}
PAPER_LLAVA_HR = {384: 17.6, 768: 18.2, 1024: 20.7, 1536: 29.8}
PAPER_LLAVA_HR_MEMORY = {384: 34, 768: 38, 1024: 40, 1536: 52}


@dataclass
class PlanArguments(OutputArguments):
    """Options: the training to plan."""

    model: str = HfArg(default="7b", help="7b or 13b-x")
    gpus: int = HfArg(default=8, help="number of GPUs")
    gpu: str = HfArg(default="a800", help=", ".join(GPUS))
    resolution: int = HfArg(default=1024, help="side of the high-resolution view in stage 2, in pixels")
    aspect_ratio: str = HfArg(default="1:1", help="of images whose padding is dropped (unpad), such as 16:9")
    batch_size: int = HfArg(default=16, help="samples per pass on a GPU")
    utilization: float | None = HfArg(default=None, help="share of the data sheet's FLOPs; the paper's by default")
    overhead: float | None = HfArg(default=None, help="seconds of one GPU that a sample costs besides")

    def __post_init__(self):
        for name, choices in (("model", MODELS), ("gpu", GPUS), ("resolution", LLAVA_HR_SIDES)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(map(str, choices))}, but got {value!r}.")
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?:[1-9]\d*(\.\d+)?", self.aspect_ratio):
            raise ValueError(f"--aspect_ratio must be width:height, such as 16:9, but got {self.aspect_ratio!r}.")
        for name in ("gpus", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise ValueError(f"--utilization must be above 0 and at most 1, but got {self.utilization}.")


def count_parameters(contender: Contender) -> int:
    return sum(parameter.numel() for parameter in contender.model.parameters())


def count_sample_flops(contender: Contender, text_tokens: int) -> tuple[int, int]:
    """
    FLOPs of a forward pass of one sample with one image.

    Args:
        contender ([`Contender`]): A model on the meta device, at a resolution.
        text_tokens (`int`): Tokens besides the image's.

    Returns:
        `tuple[int, int]`: Of the towers with the projector, and of the language model with its head.
    """
    model, num_tokens = contender.model, contender.num_image_tokens + text_tokens
    pixels = contender.make_pixels(1)
    embeds = torch.empty(1, num_tokens, model.lm_head.in_features, dtype=model.dtype, device="meta")
    return (
        count_flops(lambda: model.model.get_image_features(**pixels)),
        count_flops(lambda: model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)),
    )


@cache
def get_contenders(model: str) -> dict[str, Contender]:
    """LLaVA-HR and LLaVA-1.5 at all resolutions, on the meta device."""
    return make_contenders(MODELS[model], CONTENDERS, "meta", torch.bfloat16)


@cache
def get_contender(model: str, name: str) -> Contender:
    """One of [`get_contenders`], or with unpadded images, such as `"llava-hr-1024-16:9"`."""
    if name in CONTENDERS:
        return get_contenders(model)[name]
    return make_contenders(MODELS[model], [name], "meta", torch.bfloat16)[name]


@cache
def get_stage_flops(model: str, name: str, stage: str) -> float:
    """FLOPs of all samples of a stage, forward and backward, with gradient checkpointing."""
    vision, text = count_sample_flops(get_contender(model, name), TEXT_TOKENS[stage])
    return SAMPLES[stage] * (TOWER_PASSES[stage] * vision + TEXT_PASSES[stage] * text)


def get_training_flops(model: str, name: str) -> float:
    """FLOPs of both stages; stage 1 always runs at the lowest resolution."""
    pretrain = "llava-1.5-336" if name.startswith("llava-1.5") else f"llava-hr-{PRETRAIN_SIDE}"
    return get_stage_flops(model, pretrain, "pretrain") + get_stage_flops(model, name, "finetune")


def to_hours(flops: float, samples: int, gpus: int, gpu: Gpu, utilization: float, overhead: float) -> float:
    """Hours of a training: its FLOPs at `utilization`, and `overhead` seconds of one GPU for each sample."""
    return (flops / (gpu.flops * utilization) + overhead * samples) / gpus / 3600


@cache
def calibrate() -> tuple[float, float]:
    """
    Utilization (share of the data sheet's FLOPs) and overhead (seconds of one GPU per sample) with which the FLOPs of
    LLaVA-1.5 explain its four training times in the paper, by least squares. Its stage 1 is assumed at 336 px.
    """
    flops = [get_training_flops("7b", f"llava-1.5-{side}") for side in PAPER_LLAVA]
    gpu_seconds = np.array(list(PAPER_LLAVA.values())) * 3600 * PAPER_GPUS
    seconds_per_flop, fixed = np.polyfit(np.array(flops, dtype=float), gpu_seconds, deg=1)
    return float(1 / (seconds_per_flop * GPUS["a800"].flops)), float(fixed / sum(SAMPLES.values()))


def estimate_memory(contender: Contender, gpus: int, batch_size: int) -> dict[str, float]:
    """
    Bytes on a GPU at the peak of a step of stage 2, by their use: everything trained in mixed precision, sharded over
    `gpus` (FSDP2, ZeRO-3), with gradient checkpointing, `batch_size` samples per pass. Formulas, not measured.
    """
    model, side = contender.model, contender.sides["pixel_values"]
    text, vision = model.config.text_config, model.config.vision_config
    positions = batch_size * (contender.num_image_tokens + TEXT_TOKENS["finetune"])
    # the ConvNeXt's number of blocks at each stride, and the values of a map there
    maps = [
        (len(stage.blocks), batch_size * stage.blocks[0].mlp.fc1.in_features * (side // 2 ** (2 + index)) ** 2)
        for index, stage in enumerate(model.model.vision_tower.high_res_tower.timm_model.stages)
    ]
    return {
        # float32 weights, gradients and two moments of AdamW
        "weights, gradients, optimizer": 16 * count_parameters(contender) / gpus,
        # bfloat16 inputs of each layer, and all of one layer (34 bytes per value: Korthikanti et al., 2022)
        "language model": positions * text.hidden_size * (2 * text.num_hidden_layers + 34),
        # bfloat16, float32 and its gradient
        "logits": positions * text.vocab_size * 10,
        "ViT": batch_size
        * (min(contender.sides.values()) // vision.patch_size) ** 2
        * vision.hidden_size
        * (2 * vision.num_hidden_layers + 34),
        # inputs of each block; the largest block keeps its input, its norm's, and twice four times as much
        "ConvNeXt": sum(2 * blocks * size for blocks, size in maps) + 2 * 11 * max(size for _, size in maps),
    }


def estimate_single_gpu(contender: Contender) -> dict[str, float]:
    """
    Bytes on one GPU by use, for one sample at a time: weights, what training keeps for each of them, and activations.
    Formulas, not measured; without CUDA's own context and the allocator's fragments.
    """
    model, text = contender.model, contender.model.config.text_config
    linear = [module for module in model.model.language_model.layers.modules() if isinstance(module, torch.nn.Linear)]
    quantized = sum(module.weight.numel() for module in linear)
    others = count_parameters(contender) - quantized
    weights = {"bfloat16": 2 * (quantized + others)}
    # one byte and a scale per row; half a byte and a float32 scale per 64 weights, which QLoRA quantizes too
    weights["8-bit"] = quantized + 4 * sum(module.out_features for module in linear) + 2 * others
    weights["4-bit"] = (0.5 + 4 / 64) * quantized + 2 * others
    weights["4-bit, double quantization"] = (0.5 + 1 / 64 + 4 / (64 * 256)) * quantized + 2 * others
    positions = contender.num_image_tokens + TEXT_TOKENS["finetune"]
    # keys and values in bfloat16, all of one layer, and the high-resolution tower's largest block
    blocks = estimate_memory(contender, gpus=1, batch_size=1)
    cache = 4 * text.num_hidden_layers * positions * text.hidden_size + positions * text.hidden_size * 34
    inference = cache + blocks["ConvNeXt"] / 2
    activations = sum(size for name, size in blocks.items() if not name.startswith("weights"))
    # float32 weights, gradients and two moments of what LoRA trains: rank 128, adapters, fusion and projector
    vision = model.model.vision_tower
    trained = [vision.mr_adapters, vision.fusion, model.model.multi_modal_projector]
    num_trained = sum(parameter.numel() for module in trained for parameter in module.parameters())
    num_trained += LORA_RANK * sum(module.in_features + module.out_features for module in linear)
    return {
        **{f"inference, {name}": weights[name] + inference for name in ("bfloat16", "8-bit", "4-bit")},
        "LoRA": weights["bfloat16"] + 16 * num_trained + activations,
        "QLoRA": weights["4-bit, double quantization"] + 16 * num_trained + activations,
        "full training": blocks["weights, gradients, optimizer"] + activations,
    }


def plan(arguments: PlanArguments) -> dict[str, Any]:
    """Hours of the stages, bytes on a GPU, and the check against the paper."""
    utilization, overhead = calibrate()
    check = []
    for side, paper_hours in PAPER_LLAVA_HR.items():
        name = f"llava-hr-{side}"
        flops = get_training_flops("7b", name)
        hours = to_hours(flops, sum(SAMPLES.values()), PAPER_GPUS, GPUS["a800"], utilization, overhead)
        memory = estimate_memory(get_contenders("7b")[name], PAPER_GPUS, arguments.batch_size)
        row = {"resolution": side, "hours": hours, "paper_hours": paper_hours, "ratio": hours / paper_hours}
        row |= {"gigabytes": sum(memory.values()) / 1e9, "paper_gigabytes": PAPER_LLAVA_HR_MEMORY[side]}
        check.append(row)

    used = {
        "utilization": arguments.utilization or utilization,
        "overhead": overhead if arguments.overhead is None else arguments.overhead,
    }
    gpu, name = GPUS[arguments.gpu], f"llava-hr-{arguments.resolution}"
    name += "" if arguments.aspect_ratio == "1:1" else f"-{arguments.aspect_ratio}"
    hours = {}
    for stage, stage_name in (("pretrain", f"llava-hr-{PRETRAIN_SIDE}"), ("finetune", name)):
        flops = get_stage_flops(arguments.model, stage_name, stage)
        hours[stage] = to_hours(flops, SAMPLES[stage], arguments.gpus, gpu, **used)
    contender = get_contender(arguments.model, name)
    memory = estimate_memory(contender, arguments.gpus, arguments.batch_size)
    return {
        "calibration": {"utilization": utilization, "overhead_seconds": overhead},
        "used": used,
        "check": check,
        "parameters": count_parameters(contender),
        "image_tokens": contender.num_image_tokens,
        "hours": {**hours, "total": sum(hours.values())},
        "bytes": memory,
        "single_gpu_bytes": estimate_single_gpu(contender),
        "fits": sum(memory.values()) < gpu.memory,
    }


def describe(result: dict, arguments: PlanArguments) -> str:
    """The plan and its check as text."""
    memory = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in result["bytes"].items())
    hours = result["hours"]
    lines = [
        f"LLaVA-HR {arguments.model} ({result['parameters'] / 1e9:.2f} G parameters) at {arguments.resolution} px on "
        f"{arguments.gpus} {arguments.gpu}, {result['image_tokens']} tokens per image:",
        f"  stage 1 {hours['pretrain']:.1f} h, stage 2 {hours['finetune']:.1f} h, total {hours['total']:.1f} h",
        f"  {sum(result['bytes'].values()) / 1e9:.0f} GB on a GPU with {arguments.batch_size} samples per pass ("
        f"{memory}): {'fits' if result['fits'] else 'does not fit: fewer samples per pass, more GPUs, or LoRA'}",
        f"  at {result['used']['utilization']:.0%} of the FLOPs and {result['used']['overhead']:.3f} s per sample",
        "  one GPU, one sample at a time: "
        + ", ".join(f"{name} {value / 1e9:.0f} GB" for name, value in result["single_gpu_bytes"].items()),
        "Check: LLaVA-HR 7B on 8 A800, calibrated with LLaVA-1.5's hours alone",
    ]
    lines += [
        f"  {row['resolution']:>4} px: {row['hours']:.1f} h, paper {row['paper_hours']} h (x {row['ratio']:.2f}); "
        f"{row['gigabytes']:.0f} GB, paper {row['paper_gigabytes']} GB"
        for row in result["check"]
    ]
    return "\n".join(lines)


def run(arguments: PlanArguments) -> Iterator[dict[str, Any]]:
    """Yields the plan."""
    yield plan(arguments)


def main() -> None:
    run_benchmark("plan", PlanArguments, run, describe=describe)


if __name__ == "__main__":
    main()
