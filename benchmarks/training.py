# SPDX-License-Identifier: Apache-2.0
"""
What a training step costs: LLaVA-HR against LLaVA-1.5 with the same ViT and language model, in both stages.

    python -m benchmarks.training                  # small models on a CPU, everything trained with AdamW
    python -m benchmarks.training --preset full    # 7B on one GPU, bfloat16 weights, stage 2 with AdamW in 8 bits

A step is forward, backward and optimizer on a generated batch. What is trained is what [`training.stages`] trains, in
LLaVA-1.5 what its recipe does: the projector, then the language model as well; its ViT is frozen in both. The language
model is one and the same in all of them. On a GPU, the largest batch that fits is looked for with each model alone.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from training.stages import LORA_TARGET_MODULES, STAGES, Stage, freeze

from ._common import (
    ModelArguments,
    Timing,
    added_gpu_bytes,
    compare,
    in_fresh_process,
    make_target,
    ratio,
    run_benchmark,
    spread,
    unless_out_of_memory,
)
from ._models import (
    LLAVA_HR_SIDES,
    LLAVA_SIDES,
    SHAPES,
    Contender,
    Shapes,
    get_weight_bytes,
    make_contender,
    make_llava,
    make_llava_hr,
    share_language_model,
)
from .plan import TEXT_TOKENS


METHODS = ("full", "full_8bit", "lora")


@dataclass
class TrainingArguments(ModelArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        repeats (`int`): See [`BenchmarkArguments`].
        method (`str`, *optional*):
            How stage 2 trains: `"full"` (everything, AdamW; cpu), `"full_8bit"` (everything, AdamW with states in 8
            bits, meant for one GPU of 80 GB; full) or `"lora"` (language model at rank 128, beside adapters, fusion
            and projector).
        batch_size (`int`): Samples of a step, each with a picture.
        max_batch_size (`int`, *optional*): Where the search for the largest batch that fits ends; 64 (full) or 0, no
            search (cpu), by default.
        gradient_checkpointing (`bool`, *optional*): Whether activations are computed again in the backward pass; with
            the full preset alone by default.
    """

    repeats: int = field(default=3, metadata={"help": "rounds that count"})
    method: str | None = field(default=None, metadata={"help": f"of stage 2: {', '.join(METHODS)}"})
    batch_size: int = field(default=1, metadata={"help": "samples of a step"})
    max_batch_size: int | None = field(default=None, metadata={"help": "end of the search for the largest batch"})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "compute activations twice"})

    def __post_init__(self):
        super().__post_init__()
        large = self.preset == "full"
        self.method = self.method or ("full_8bit" if large else "full")
        if self.max_batch_size is None:
            self.max_batch_size = 64 if large else 0
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = large
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, but got {self.method!r}.")
        if self.max_batch_size and not self.on_gpu:
            raise ValueError("--max_batch_size needs --device cuda: what a CPU's memory ends with is no error.")


def get_stage(name: str, method: str) -> Stage:
    """What is trained: a stage of [`training.stages`], with LoRA in place of the whole language model if asked for."""
    if name == "finetune" and method == "lora":
        trainable = r"model\.(multi_modal_projector|vision_tower\.(fusion|mr_adapters))\.|.*\.lora_"
        return dataclasses.replace(STAGES[name], trainable=trainable)
    return STAGES[name]


def prepare(contenders: dict[str, Contender], name: str, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """
    Makes contenders that share a language model ready for a stage.

    Args:
        contenders (`dict[str, Contender]`): All that the optimizer is for, by name; changed in place.
        name (`str`): Name of the stage.
        arguments ([`TrainingArguments`]): Options.

    Returns:
        `torch.optim.Optimizer`: One for all: it passes over parameters that a step gave no gradient.
    """
    if name == "finetune" and arguments.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        # the language model is one: what is put into the first contender's is in all
        lora = LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=LORA_TARGET_MODULES)
        inject_adapter_in_model(lora, next(iter(contenders.values())).model)
    stage = get_stage(name, arguments.method)
    for its_name, contender in contenders.items():
        freeze(contender.model, stage, [r"model\.vision_tower\."] if its_name.startswith("llava-1.5") else [])
        contender.model.train()
        if arguments.gradient_checkpointing:
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
    """Random samples of the usual length of a stage; the loss is on all tokens but the picture's."""
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


def make_alone(
    shapes: Shapes, name: str, stage: str, arguments: TrainingArguments
) -> tuple[Contender, torch.optim.Optimizer]:
    """A contender and its optimizer, whose states are made."""
    mr_adapters = STAGES[stage].mr_adapters
    contender = make_contender(shapes, name, arguments.device, arguments.torch_dtype, mr_adapters)
    optimizer = prepare({name: contender}, stage, arguments)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return contender, optimizer


def step_alone(shapes: Shapes, name: str, stage: str, arguments: TrainingArguments) -> None:
    """A contender's step; for a fresh process."""
    contender, optimizer = make_alone(shapes, name, stage, arguments)
    step(contender.model, make_batch(contender, stage, arguments.batch_size), optimizer)


def find_largest_batch(shapes: Shapes, name: str, arguments: TrainingArguments) -> int:
    """
    Samples of the largest step of stage 2 that the GPU's memory suffices for: 1, 2, 4 ... up to `max_batch_size`, or 0
    if it does not suffice for one. For a fresh process, which has the GPU to itself.
    """

    def take(batch_size: int) -> int:
        step(contender.model, make_batch(contender, "finetune", batch_size), optimizer)
        return batch_size

    made = unless_out_of_memory(lambda: make_alone(shapes, name, "finetune", arguments))
    if made is None:
        return 0
    contender, optimizer = made
    largest = 0
    while (size := 2 * largest or 1) <= arguments.max_batch_size:
        if unless_out_of_memory(functools.partial(take, size)) is None:
            break
        largest = size
    return largest


def run_stage(
    name: str, contenders: dict[str, Contender], shapes: Shapes, arguments: TrainingArguments
) -> tuple[dict[str, Any], dict[str, Timing]]:
    """
    Measures the steps of a stage side by side.

    Args:
        name (`str`): Name of the stage.
        contenders (`dict[str, Contender]`): By name; they share a language model.
        shapes ([`Shapes`]): Sizes of the models, for peak memory in processes of their own (CPU).
        arguments ([`TrainingArguments`]): Options.

    Returns:
        `tuple`: The entries of the record, and the timings of those that memory sufficed for.
    """

    def get_gpu_peak(its_name: str) -> int:
        """What a model that shares the GPU takes by itself: weights, optimizer states and what a step adds."""
        runs[its_name]()  # makes the optimizer's states
        added, model = added_gpu_bytes(runs[its_name]), contenders[its_name].model
        states = [optimizer.state[parameter] for parameter in model.parameters() if parameter in optimizer.state]
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return added + get_weight_bytes(model) + sum(tensor.nbytes for tensor in tensors)

    optimizer = prepare(contenders, name, arguments)
    runs = {
        its_name: functools.partial(
            step, contender.model, make_batch(contender, name, arguments.batch_size), optimizer
        )
        for its_name, contender in contenders.items()
    }
    if arguments.on_gpu:
        peaks = {its_name: unless_out_of_memory(functools.partial(get_gpu_peak, its_name)) for its_name in runs}
    else:
        bar = tqdm(contenders, desc=f"{name}, memory", unit="run")
        peaks = {its_name: in_fresh_process(step_alone, shapes, its_name, name, arguments)[1] for its_name in bar}
    timings = compare({n: run for n, run in runs.items() if peaks[n] is not None}, arguments, name)
    entries = {}
    for its_name, contender in contenders.items():
        entries[its_name] = {
            "sides": contender.sides,
            "tokens": contender.num_image_tokens + TEXT_TOKENS[name],
            "trained_parameters": sum(p.numel() for p in contender.model.parameters() if p.requires_grad),
        }
        if its_name in timings:
            entries[its_name] |= {"seconds": timings[its_name].to_dict(), "peak_bytes": peaks[its_name]}
        else:
            entries[its_name]["out_of_memory"] = True
    return entries, timings


def find_targets(
    timings: dict[str, Timing], largest: dict[str, int], arguments: TrainingArguments
) -> list[dict[str, Any]]:
    """
    What the project wants of stage 2, beside what came out; see [`make_target`].

    Args:
        timings (`dict[str, Timing]`): Of a step, without those that memory did not suffice for.
        largest (`dict[str, int]`): Samples of the largest step; empty if it was not looked for.
        arguments ([`TrainingArguments`]): Options.
    """
    base, low, llava = (timings.get(name) for name in ("llava-hr-1024", "llava-hr-384", "llava-1.5-1022"))
    name = "step of stage 2 at 1024 px over that at 384 px (paper, whole training: 1.176)"
    targets = [make_target(name, ratio(base, low), 1.15, False, True)]
    name = "step of stage 2 at 1024 px over LLaVA-1.5's at 1022 px"
    targets.append(make_target(name, ratio(base, llava), 1 / 3, False, True))
    more = None
    # where the search ended before LLaVA-1.5's memory did, it says nothing
    if largest and largest["llava-1.5-1022"] * 2 <= arguments.max_batch_size:
        more = spread([largest["llava-hr-1536"] - largest["llava-1.5-1022"]])
    name = "samples that the largest step at 1536 px has more than LLaVA-1.5's at 1022 px"
    return [*targets, make_target(name, more, 1, True, True)]


def draw(results: dict[str, Any], arguments: TrainingArguments) -> Figure:
    """Time and peak memory of a step over the side of the picture, for both stages."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for stage, line in (("pretrain", "--"), ("finetune", "-")):
        for family, color in (("llava-hr", "C0"), ("llava-1.5", "C1")):
            entries = [
                entry for name, entry in results[stage].items() if name.startswith(family) and "seconds" in entry
            ]
            sides = [max(entry["sides"].values()) for entry in entries]
            style = {"linestyle": line, "color": color, "marker": "o", "label": f"{family}, {stage}"}
            left.plot(sides, [entry["seconds"]["median"] for entry in entries], **style)
            right.plot(sides, [entry["peak_bytes"] / 1e9 for entry in entries], **style)
    for axes, title in ((left, "seconds a step"), (right, "peak memory in GB")):
        axes.set(title=title, xlabel="side of the picture in pixels", ylim=(0, None))
    left.legend()
    figure.suptitle(f"Batch of {arguments.batch_size}, method {arguments.method}, {arguments.preset} preset")
    return figure


def run(arguments: TrainingArguments) -> Iterator[dict[str, Any]]:
    """Looks for the largest batches and measures both stages; yields the results after each."""
    shapes, make = SHAPES[arguments.preset], {"device": arguments.device, "dtype": arguments.torch_dtype}
    results = {"largest_batch": {}}
    if arguments.max_batch_size:
        names = [*(f"llava-hr-{side}" for side in LLAVA_HR_SIDES), *(f"llava-1.5-{side}" for side in LLAVA_SIDES)]
        for name in tqdm(names, desc="largest batch", unit="model"):
            results["largest_batch"][name], _ = in_fresh_process(find_largest_batch, shapes, name, arguments)
            yield results
    llava = make_llava(shapes, **make)
    language_model = next(iter(llava.values())).model
    for name, stage in STAGES.items():
        llava_hr = make_llava_hr(shapes, **make, mr_adapters=stage.mr_adapters)
        share_language_model(llava_hr, language_model)
        results[name], timings = run_stage(name, {**llava_hr, **llava}, shapes, arguments)
        yield results
    results["targets"] = find_targets(timings, results["largest_batch"], arguments)
    yield results


def main() -> None:
    run_benchmark("training", TrainingArguments, run, draw)


if __name__ == "__main__":
    main()
