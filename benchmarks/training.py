# SPDX-License-Identifier: Apache-2.0
"""
What a training step costs: LLaVA-HR against LLaVA-1.5 with the same ViT and language model.

    python -m benchmarks.training                  # small models on a CPU, both stages, everything trained with AdamW
    python -m benchmarks.training --preset full    # 7B on one GPU, bfloat16 weights, stage 2 with AdamW in 8 bits
    python -m benchmarks.training --preset full --max_batch_size 64 --contenders llava-hr-1536 llava-1.5-1022

A step is forward, backward and optimizer on a generated batch. What is trained is what [`training.stages`] trains; of
LLaVA-1.5 what its recipe does: the projector, then the language model as well, its ViT frozen in both. The language
model is one and the same in all of them. The third command looks for the largest step of stage 2 that fits, with each
model alone.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from training.stages import LORA_TARGET_MODULES, STAGES, freeze

from .measure import (
    BenchmarkArguments,
    added_gpu_bytes,
    compare,
    free_memory,
    get_phase,
    make_target,
    ratio,
    run_benchmark,
    spread,
    time_phase,
    unless_out_of_memory,
)
from .models import (
    CONTENDERS,
    SHAPES,
    Contender,
    Shapes,
    get_weight_bytes,
    make_contenders,
)
from .plan import TEXT_TOKENS


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Methods of stage 2: full training with AdamW, the same with 8-bit states (one GPU of 80 GB), or LoRA of rank 128 on
# the language model, with adapters, fusion and projector trained fully
METHODS = ("full", "full_8bit", "lora")
OMITTED = "float32 master weights: weights, gradients and the step are in {dtype}; the recipe keeps float32 weights"


@dataclass
class TrainingArguments(BenchmarkArguments):
    """Options of this benchmark."""

    repeats: int = HfArg(default=3, help="rounds that count")
    stages: list[str] | None = HfArg(default=None, help=f"{', '.join(STAGES)} (cpu) or finetune (full) by default")
    contenders: list[str] | None = HfArg(
        default=None, help="names like llava-hr-1024; all (cpu), or LLaVA-HR and llava-1.5-1022 (full) by default"
    )
    method: str | None = HfArg(
        default=None, help=f"of stage 2: {', '.join(METHODS)}; full (cpu) or full_8bit (full) by default"
    )
    batch_size: int = HfArg(default=1, help="samples of a step, each with an image")
    max_batch_size: int = HfArg(default=0, help="look for the largest batch of stage 2 instead, up to this one")

    def __post_init__(self):
        super().__post_init__()
        large = self.preset == "full"
        self.method = self.method or ("full_8bit" if large else "full")
        self.stages = self.stages or (["finetune"] if large else list(STAGES))
        self.contenders = self.contenders or [*(CONTENDERS[:4] if large else CONTENDERS[:-1]), CONTENDERS[-1]]
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, but got {self.method!r}.")
        for option, choices in (("stages", STAGES), ("contenders", CONTENDERS)):
            if unknown := set(getattr(self, option)) - set(choices):
                raise ValueError(f"--{option} are {', '.join(choices)}, but got {', '.join(sorted(unknown))}.")
        if self.max_batch_size and not self.on_gpu:
            raise ValueError("--max_batch_size needs --preset full: on a CPU, running out of memory is not an error.")


def prepare(contenders: dict[str, Contender], name: str, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """
    Prepares contenders that share a language model for a stage.

    Args:
        contenders (`dict[str, Contender]`): All that the optimizer is for, by name; changed in place.
        name (`str`): Name of the stage.
        arguments ([`TrainingArguments`]): Options.

    Returns:
        `torch.optim.Optimizer`: One for all: it skips parameters without a gradient.
    """
    stage = STAGES[name]
    if name == "finetune" and arguments.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        # the language model is shared, so LoRA layers of the first contender's are in all
        lora = LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=LORA_TARGET_MODULES)
        inject_adapter_in_model(lora, next(iter(contenders.values())).model)
        trainable = r"model\.(multi_modal_projector|vision_tower\.(fusion|mr_adapters))\.|.*\.lora_"
        stage = dataclasses.replace(stage, trainable=trainable)
    for contender_name, contender in contenders.items():
        is_llava = contender_name.startswith("llava-1.5")
        freeze(contender.model, stage, [r"model\.vision_tower\."] if is_llava else [])
        contender.model.train()
        if arguments.on_gpu:  # as in the recipe
            contender.model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = {
        id(parameter): parameter
        for contender in contenders.values()
        for parameter in contender.model.parameters()
        if parameter.requires_grad
    }
    if name == "finetune" and arguments.method == "full_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters.values(), lr=stage.learning_rate)
    return torch.optim.AdamW(parameters.values(), lr=stage.learning_rate)


def make_batch(contender: Contender, name: str, batch_size: int) -> dict[str, torch.Tensor]:
    """Random samples of the usual length of a stage; the loss is on all tokens but the image's."""
    inputs = contender.make_inputs(batch_size, TEXT_TOKENS[name])
    is_image = inputs["input_ids"] == contender.model.config.image_token_id
    return {**inputs, "labels": inputs["input_ids"].masked_fill(is_image, -100)}


def step(model: nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Forward, backward, optimizer."""
    try:
        model(**batch).loss.backward()
        optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)


def find_largest_batch(shapes: Shapes, name: str, arguments: TrainingArguments) -> Iterator[int]:
    """
    Samples of the largest step of stage 2 that fits into the GPU's memory beside the model and the optimizer's states:
    yields 0 and then 1, 2, 4 ... up to `max_batch_size`, as long as they fit.
    """

    def prepare_alone() -> tuple[Contender, torch.optim.Optimizer]:
        alone = make_contenders(shapes, [name], arguments.device, arguments.torch_dtype)
        optimizer = prepare(alone, "finetune", arguments)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # creates the states
        optimizer.zero_grad(set_to_none=True)
        return alone[name], optimizer

    def take(batch_size: int) -> int:
        step(contender.model, make_batch(contender, "finetune", batch_size), optimizer)
        return batch_size

    yield 0
    prepared = unless_out_of_memory(prepare_alone)
    if prepared is None:
        return
    contender, optimizer = prepared
    size = 1
    while size <= arguments.max_batch_size and unless_out_of_memory(partial(take, size)) is not None:
        yield size
        size *= 2


def run_stage(
    stage: str, contenders: dict[str, Contender], arguments: TrainingArguments
) -> Iterator[tuple[dict[str, Any], dict[str, list[float]]]]:
    """
    Measures the steps of a stage side by side.

    Args:
        stage (`str`): Name of the stage.
        contenders (`dict[str, Contender]`): By name; they share a language model.
        arguments ([`TrainingArguments`]): Options.

    Yields:
        `tuple`: After each step, the entries of the record, and the seconds of those that did not run out of memory.
    """

    def run(name: str) -> dict[str, float]:
        """A timed step. On a GPU the first ones measure the memory of the model by itself."""
        one_step = partial(step, contenders[name].model, batches[name], optimizer)
        if arguments.on_gpu and name not in peaks:
            one_step()  # creates the optimizer's states
            peaks[name] = added_gpu_bytes(one_step) + get_state_bytes(contenders[name].model, optimizer)
        return time_phase(one_step)

    optimizer = prepare(contenders, stage, arguments)
    batches = {name: make_batch(each, stage, arguments.batch_size) for name, each in contenders.items()}
    peaks: dict[str, int] = {}
    for measured in compare({name: partial(run, name) for name in contenders}, arguments, stage):
        entries = {}
        seconds = get_phase(measured)
        for name in measured:
            contender = contenders[name]
            entries[name] = {
                "sides": contender.sides,
                "tokens": contender.num_image_tokens + TEXT_TOKENS[stage],
                "trained_parameters": sum(p.numel() for p in contender.model.parameters() if p.requires_grad),
            }
            if name in seconds:
                entries[name] |= {"seconds": spread(seconds[name]), "peak_bytes": peaks.get(name)}
            else:
                entries[name]["out_of_memory"] = True
        yield entries, seconds


def get_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Memory of a model's weights and of its parameters' optimizer states, in bytes."""
    states = [optimizer.state[parameter] for parameter in model.parameters() if parameter in optimizer.state]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return get_weight_bytes(model) + sum(tensor.nbytes for tensor in tensors)


def find_targets(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The project's targets for the seconds of a step of stage 2 and the results; see [`make_target`]."""
    base, low, llava = (seconds.get(name) for name in ("llava-hr-1024", "llava-hr-384", "llava-1.5-1022"))
    name = "step of stage 2 at 1024 px over that at 384 px (paper, whole training: 1.176)"
    targets = [make_target(name, ratio(base, low), 1.15, False)]
    name = "step of stage 2 at 1024 px over LLaVA-1.5's at 1022 px"
    return [*targets, make_target(name, ratio(base, llava), 1 / 3, False)]


def compare_largest(largest: dict[str, int], max_batch_size: int) -> dict[str, Any]:
    """The target for the samples of the largest steps; see [`make_target`]."""
    ours, llava = (largest.get(name) for name in ("llava-hr-1536", "llava-1.5-1022"))
    # both were found, and LLaVA-1.5's memory ended before the search did
    is_known = ours is not None and llava is not None and llava * 2 <= max_batch_size
    name = "samples that the largest step at 1536 px has more than LLaVA-1.5's at 1022 px"
    return make_target(name, spread([ours - llava]) if is_known else None, 1, True)


def draw(figure: "Figure", results: dict[str, Any], arguments: TrainingArguments) -> None:
    """Time and peak memory of a step over the side of the image, or the largest batches."""
    figure.set_size_inches(11, 4)
    if largest := results.get("largest_batch"):
        axes = figure.subplots()
        axes.bar_label(axes.barh(list(largest), list(largest.values())))
        axes.set(title=f"samples of the largest step of stage 2, method {arguments.method}")
        return
    left, right = figure.subplots(1, 2)
    for stage, line in (("pretrain", "--"), ("finetune", "-")):
        for family, color in (("llava-hr", "C0"), ("llava-1.5", "C1")):
            entries = [e for name, e in results.get(stage, {}).items() if name.startswith(family) and "seconds" in e]
            sides = [max(entry["sides"].values()) for entry in entries]
            style = {"linestyle": line, "color": color, "marker": "o", "label": f"{family}, {stage}"}
            left.plot(sides, [entry["seconds"]["median"] for entry in entries], **style)
            right.plot(sides, [(entry["peak_bytes"] or float("nan")) / 1e9 for entry in entries], **style)
    for axes, title in ((left, "seconds per step"), (right, "peak memory in GB")):
        axes.set(title=title, xlabel="side of the image in pixels", ylim=(0, None))
    left.legend()
    figure.suptitle(f"Batch of {arguments.batch_size}, method {arguments.method}, {arguments.preset} preset")


def run(arguments: TrainingArguments) -> Iterator[dict[str, Any]]:
    """Measures the stages, or looks for the largest batch; yields the results after each step or model."""
    shapes, make = SHAPES[arguments.preset], {"device": arguments.device, "dtype": arguments.torch_dtype}
    omitted = None if arguments.dtype == "float32" else OMITTED.format(dtype=arguments.dtype)
    results: dict[str, Any] = {"omitted": omitted}
    if arguments.max_batch_size:
        if torch.cuda.is_available():  # the rest is for kernels that are loaded late, whose lack is another error
            torch.cuda.set_per_process_memory_fraction(0.95)
        largest = results["largest_batch"] = {}
        for name in tqdm(arguments.contenders, desc="largest batch", unit="model"):
            for size in find_largest_batch(shapes, name, arguments):
                largest[name] = size
                yield results
            free_memory()  # the next model has the GPU to itself
        results["targets"] = [compare_largest(largest, arguments.max_batch_size)]
        yield results
        return
    for name in arguments.stages:
        contenders = make_contenders(shapes, arguments.contenders, **make, mr_adapters=STAGES[name].mr_adapters)
        for entries, seconds in run_stage(name, contenders, arguments):
            results[name] = entries
            results["targets"] = find_targets(seconds) if name == "finetune" else []
            yield results


def main() -> None:
    run_benchmark("training", TrainingArguments, run, draw, lambda results, _: f"Omitted: {results['omitted']}")


if __name__ == "__main__":
    main()
