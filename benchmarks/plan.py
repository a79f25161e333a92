# SPDX-License-Identifier: Apache-2.0
"""
Predicts how long training takes and what a GPU has to hold, from counted FLOPs:

    python -m benchmarks.plan --gpus 8 --gpu a800 --resolution 1024

FLOPs are counted on the shapes of the real models, without weights. How many of a GPU's FLOPs training uses, and what
a sample costs besides (reading pictures, communication), comes from the paper's training hours of LLaVA-1.5 alone
(`calibrate`), or from your own measurement (`--utilization`, `--overhead`). The paper's hours of LLaVA-HR, which are
not used for that, are the check; it is printed with every plan.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ._common import OutputArguments, run_benchmark
from ._models import LLAVA_HR_SIDES, SHAPES, Contender, make_llava, make_llava_hr


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Gpu:
    """
    A GPU by its data sheet.

    Args:
        flops (`float`): Dense bfloat16 FLOPs a second.
        memory (`float`): Bytes.
    """

    flops: float
    memory: float


GPUS = {
    "a100": Gpu(312e12, 80e9),
    "a800": Gpu(312e12, 80e9),
    "h100": Gpu(989e12, 80e9),
    "h200": Gpu(989e12, 141e9),
}
MODELS = {
    "7b": SHAPES["full"],
    # Vicuna-13B and the ConvNeXt-XXL of LLaVA-HR-X
    "13b-x": dataclasses.replace(
        SHAPES["full"],
        text={
            **SHAPES["full"].text,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
        high_res={"architecture": "convnext_xxlarge", "do_pooling": False},
    ),
}
# Samples of stage 1 (LCS-558K) and stage 2 (mix665k)
SAMPLES = {"pretrain": 558_128, "finetune": 665_298}
# Text tokens of a sample: a caption; an estimate for the chats, of which most are short and some are long
TEXT_TOKENS = {"pretrain": 30, "finetune": 280}
# Forward passes' worth of FLOPs. A backward pass of trained parameters is worth two, one that only passes gradients on
# is worth one, and gradient checkpointing repeats the forward pass.
TOWER_PASSES = {"pretrain": 1, "finetune": 4}
TEXT_PASSES = {"pretrain": 3, "finetune": 4}
PRETRAIN_SIDE = 384

# Training hours and memory in GB of 8 A800 (table of the paper; the hours are taken to be those of both stages)
PAPER_GPUS = 8
PAPER_LLAVA = {336: 15.6, 448: 19.4, 672: 31.8, 1022: 69.4}
PAPER_LLAVA_HR = {384: 17.6, 768: 18.2, 1024: 20.7, 1536: 29.8}
PAPER_LLAVA_HR_MEMORY = {384: 34, 768: 38, 1024: 40, 1536: 52}


@dataclass
class PlanArguments(OutputArguments):
    """
    Which training.

    Args:
        model (`str`): `"7b"` or `"13b-x"`.
        gpus (`int`): Number of GPUs.
        gpu (`str`): Their kind.
        resolution (`int`): Side of the high-resolution view in stage 2, in pixels.
        batch_size (`int`): Samples at a time on a GPU.
        utilization (`float`, *optional*): Share of the data sheet's FLOPs that training uses.
        overhead (`float`, *optional*): Seconds of one GPU that a sample costs besides.
    """

    model: str = field(default="7b", metadata={"help": "7b or 13b-x"})
    gpus: int = field(default=8, metadata={"help": "number of GPUs"})
    gpu: str = field(default="a800", metadata={"help": "a100, a800, h100 or h200"})
    resolution: int = field(default=1024, metadata={"help": "side of the high-resolution view in stage 2"})
    batch_size: int = field(default=16, metadata={"help": "samples at a time on a GPU"})
    utilization: float | None = field(default=None, metadata={"help": "share of the FLOPs; the paper's by default"})
    overhead: float | None = field(default=None, metadata={"help": "seconds of a GPU a sample costs besides"})

    def __post_init__(self):
        for name, choices in (("model", MODELS), ("gpu", GPUS), ("resolution", LLAVA_HR_SIDES)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"--{name} must be one of {', '.join(map(str, choices))}, but got {value!r}.")
        for name in ("gpus", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise ValueError(f"--utilization must be above 0 and at most 1, but got {self.utilization}.")


def count_parameters(contender: Contender) -> int:
    """Number of parameters of the model."""
    return sum(parameter.numel() for parameter in contender.model.parameters())


@torch.no_grad()
def count_flops(contender: Contender, text_tokens: int) -> tuple[int, int]:
    """
    FLOPs of a forward pass of one sample with one picture, counted by torch.

    Args:
        contender ([`Contender`]): A model on the meta device, at a resolution.
        text_tokens (`int`): Tokens besides the picture's.

    Returns:
        `tuple[int, int]`: Of what sees the picture, projector included, and of the language model with its head.
    """
    model, num_tokens = contender.model, contender.num_image_tokens + text_tokens
    with FlopCounterMode(display=False) as vision:
        model.model.get_image_features(**contender.make_pixels(1))
    embeds = torch.empty(1, num_tokens, model.lm_head.in_features, dtype=model.dtype, device="meta")
    with FlopCounterMode(display=False) as text:
        model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    return vision.get_total_flops(), text.get_total_flops()


@cache
def get_contenders(model: str) -> dict[str, Contender]:
    """LLaVA-HR and LLaVA-1.5 at all resolutions, on the meta device."""
    shapes = MODELS[model]
    llava_hr = make_llava_hr(shapes, "meta", torch.bfloat16)
    return {**llava_hr, **make_llava(shapes, "meta", torch.bfloat16, tuple(PAPER_LLAVA))}


@cache
def get_stage_flops(model: str, name: str, stage: str) -> float:
    """FLOPs of all samples of a stage, forward and backward, with gradient checkpointing."""
    vision, text = count_flops(get_contenders(model)[name], TEXT_TOKENS[stage])
    return SAMPLES[stage] * (TOWER_PASSES[stage] * vision + TEXT_PASSES[stage] * text)


def get_training_flops(model: str, name: str) -> float:
    """FLOPs of both stages; stage 1 runs at the lowest resolution always."""
    pretrain = "llava-1.5-336" if name.startswith("llava-1.5") else f"llava-hr-{PRETRAIN_SIDE}"
    return get_stage_flops(model, pretrain, "pretrain") + get_stage_flops(model, name, "finetune")


def to_hours(flops: float, gpus: int, gpu: Gpu, utilization: float, overhead: float) -> float:
    """Hours that both stages take: FLOPs at `utilization`, and `overhead` seconds of a GPU for each sample."""
    return (flops / (gpu.flops * utilization) + overhead * sum(SAMPLES.values())) / gpus / 3600


@cache
def calibrate() -> tuple[float, float]:
    """
    Utilisation and overhead with which the FLOPs of LLaVA-1.5 explain its four training times in the paper, by least
    squares. Its stage 1 is taken to run at 336 pixels always.

    Returns:
        `tuple[float, float]`: Share of the data sheet's FLOPs, and seconds of one GPU for each sample.
    """
    flops = [get_training_flops("7b", f"llava-1.5-{side}") for side in PAPER_LLAVA]
    gpu_seconds = np.array(list(PAPER_LLAVA.values())) * 3600 * PAPER_GPUS
    seconds_per_flop, fixed = np.polyfit(np.array(flops, dtype=float), gpu_seconds, deg=1)
    return float(1 / (seconds_per_flop * GPUS["a800"].flops)), float(fixed / sum(SAMPLES.values()))


def estimate_memory(contender: Contender, gpus: int, batch_size: int) -> dict[str, float]:
    """
    What a GPU holds at the peak of a step of stage 2, everything trained in mixed precision, sharded (FSDP2, ZeRO-3),
    with gradient checkpointing. Formulas, not measured.

    Args:
        contender ([`Contender`]): The model at its resolution.
        gpus (`int`): Number of GPUs.
        batch_size (`int`): Samples at a time on a GPU.

    Returns:
        `dict[str, float]`: Bytes by what takes them.
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
        # bfloat16 inputs of each layer, and what one layer keeps (34 bytes a value: Korthikanti et al., 2022)
        "language model": positions * text.hidden_size * (2 * text.num_hidden_layers + 34),
        # bfloat16, float32 and its gradient
        "logits": positions * text.vocab_size * 10,
        "ViT": batch_size * contender.num_image_tokens * vision.hidden_size * (2 * vision.num_hidden_layers + 34),
        # inputs of each block, and what the largest block keeps: its input, its norm's, four times as much twice
        "ConvNeXt": sum(2 * blocks * size for blocks, size in maps) + 2 * 11 * max(size for _, size in maps),
    }


def plan(arguments: PlanArguments) -> dict:
    """
    Args:
        arguments ([`PlanArguments`]): Which training.

    Returns:
        `dict`: Hours of the stages, bytes on a GPU, and the check against the paper.
    """
    utilization, overhead = calibrate()
    check = []
    for side, hours in PAPER_LLAVA_HR.items():
        flops = get_training_flops("7b", f"llava-hr-{side}")
        predicted = to_hours(flops, PAPER_GPUS, GPUS["a800"], utilization, overhead)
        memory = estimate_memory(get_contenders("7b")[f"llava-hr-{side}"], PAPER_GPUS, arguments.batch_size)
        check.append(
            {
                "resolution": side,
                "hours": predicted,
                "paper_hours": hours,
                "ratio": predicted / hours,
                "gigabytes": sum(memory.values()) / 1e9,
                "paper_gigabytes": PAPER_LLAVA_HR_MEMORY[side],
            }
        )

    used = {
        "utilization": arguments.utilization or utilization,
        "overhead": overhead if arguments.overhead is None else arguments.overhead,
    }
    gpu, name = GPUS[arguments.gpu], f"llava-hr-{arguments.resolution}"
    contender = get_contenders(arguments.model)[name]
    hours = {}
    for stage, its_name in (("pretrain", f"llava-hr-{PRETRAIN_SIDE}"), ("finetune", name)):
        flops = get_stage_flops(arguments.model, its_name, stage)
        seconds = flops / (gpu.flops * used["utilization"]) + used["overhead"] * SAMPLES[stage]
        hours[stage] = seconds / arguments.gpus / 3600
    memory = estimate_memory(contender, arguments.gpus, arguments.batch_size)
    return {
        "calibration": {"utilization": utilization, "overhead_seconds": overhead},
        "used": used,
        "check": check,
        "parameters": count_parameters(contender),
        "hours": {**hours, "total": sum(hours.values())},
        "bytes": memory,
        "fits": sum(memory.values()) < gpu.memory,
    }


def describe(result: dict, arguments: PlanArguments) -> str:
    """The plan and its check as text."""
    memory = ", ".join(f"{name} {value / 1e9:.1f}" for name, value in result["bytes"].items())
    hours = result["hours"]
    lines = [
        f"LLaVA-HR {arguments.model} ({result['parameters'] / 1e9:.2f} G parameters) at {arguments.resolution} px on "
        f"{arguments.gpus} {arguments.gpu}:",
        f"  stage 1 {hours['pretrain']:.1f} h, stage 2 {hours['finetune']:.1f} h, together {hours['total']:.1f} h",
        f"  {sum(result['bytes'].values()) / 1e9:.0f} GB on a GPU with {arguments.batch_size} samples at a time ("
        f"{memory}): {'fits' if result['fits'] else 'does not fit: fewer samples at a time, more GPUs, or LoRA'}",
        f"  at {result['used']['utilization']:.0%} of the FLOPs and {result['used']['overhead']:.3f} s a sample",
        "Check: LLaVA-HR 7B on 8 A800, calibrated with LLaVA-1.5's hours alone",
    ]
    lines += [
        f"  {row['resolution']:>4} px: {row['hours']:.1f} h, paper {row['paper_hours']} h (x {row['ratio']:.2f}); "
        f"{row['gigabytes']:.0f} GB, paper {row['paper_gigabytes']} GB"
        for row in result["check"]
    ]
    return "\n".join(lines)


def draw(figure: "Figure", result: dict, arguments: PlanArguments) -> None:
    """Predicted and reported hours, as bars."""
    figure.set_size_inches(6, 3.5)
    axes = figure.subplots()
    places = np.arange(len(result["check"]))
    axes.bar(places - 0.2, [row["hours"] for row in result["check"]], 0.4, label="predicted")
    axes.bar(places + 0.2, [row["paper_hours"] for row in result["check"]], 0.4, label="paper")
    axes.set_xticks(places, [f"{row['resolution']} px" for row in result["check"]])
    axes.set_ylabel("hours on 8 A800")
    axes.set_title("Training LLaVA-HR 7B, both stages")
    axes.legend()


def run(arguments: PlanArguments) -> Iterator[dict[str, Any]]:
    """Yields the plan."""
    yield plan(arguments)


def main() -> None:
    run_benchmark("plan", PlanArguments, run, draw, describe)


if __name__ == "__main__":
    main()
