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
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from training.stages import LORA_TARGET_MODULES, STAGES, Stage, freeze

from ._common import (
    BenchmarkArguments,
    Timing,
    added_gpu_bytes,
    compare_phases,
    in_fresh_process,
    make_target,
    ratio,
    run_benchmark,
    spread,
    time_phase,
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


if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("full", "full_8bit", "lora")
CONTENDERS = (*(f"llava-hr-{side}" for side in LLAVA_HR_SIDES), *(f"llava-1.5-{side}" for side in LLAVA_SIDES))
OMITTED = "float32 master weights: weights, gradients and the step are in {dtype}; the recipe keeps float32 weights"


@dataclass
class TrainingArguments(BenchmarkArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        repeats (`int`): See [`BenchmarkArguments`].
        stages (`list[str]`, *optional*): `"pretrain"` and `"finetune"` (cpu), or `"finetune"` alone (full).
        contenders (`list[str]`, *optional*): Names like `llava-hr-1024`; all sides of both families (cpu), or all of
            LLaVA-HR and LLaVA-1.5 at 1022 px (full).
        method (`str`, *optional*): How stage 2 trains: `"full"` (everything, AdamW; cpu), `"full_8bit"` (everything,
            AdamW with states in 8 bits, for one GPU of 80 GB; full) or `"lora"` (language model at rank 128, beside
            adapters, fusion and projector).
        batch_size (`int`): Samples of a step, each with an image.
        max_batch_size (`int`): If not 0, steps are not timed: the largest batch of stage 2 that fits is looked for,
            up to this one.
        gradient_checkpointing (`bool`, *optional*): Whether the backward pass recomputes activations; with the full
            preset alone by default.
    """

    repeats: int = field(default=3, metadata={"help": "rounds that count"})
    stages: list[str] | None = field(default=None, metadata={"help": ", ".join(STAGES)})
    contenders: list[str] | None = field(default=None, metadata={"help": "names like llava-hr-1024"})
    method: str | None = field(default=None, metadata={"help": f"of stage 2: {', '.join(METHODS)}"})
    batch_size: int = field(default=1, metadata={"help": "samples of a step"})
    max_batch_size: int = field(default=0, metadata={"help": "look for the largest batch instead, up to this one"})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "recompute activations"})

    def __post_init__(self):
        super().__post_init__()
        large = self.preset == "full"
        self.method = self.method or ("full_8bit" if large else "full")
        self.stages = self.stages or (["finetune"] if large else list(STAGES))
        self.contenders = self.contenders or [*(CONTENDERS[:4] if large else CONTENDERS[:-1]), CONTENDERS[-1]]
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = large
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, but got {self.method!r}.")
        for option, choices in (("stages", STAGES), ("contenders", CONTENDERS)):
            if unknown := set(getattr(self, option)) - set(choices):
                raise ValueError(f"--{option} are {', '.join(choices)}, but got {', '.join(sorted(unknown))}.")
        if self.max_batch_size and not self.on_gpu:
            raise ValueError("--max_batch_size needs --preset full: on a CPU, running out of memory is not an error.")


def get_stage(name: str, method: str) -> Stage:
    """What is trained: a stage of [`training.stages`], with LoRA instead of the whole language model if chosen."""
    if name == "finetune" and method == "lora":
        trainable = r"model\.(multi_modal_projector|vision_tower\.(fusion|mr_adapters))\.|.*\.lora_"
        return dataclasses.replace(STAGES[name], trainable=trainable)
    return STAGES[name]


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
    if name == "finetune" and arguments.method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        # the language model is shared, so LoRA layers of the first contender's are in all
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


def make_alone(
    shapes: Shapes, name: str, stage: str, arguments: TrainingArguments
) -> tuple[Contender, torch.optim.Optimizer]:
    """A contender and its optimizer, with states."""
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
    Samples of the largest step of stage 2 that fits into the GPU's memory: 1, 2, 4 ... up to `max_batch_size`, or 0 if
    not even one does. For a fresh process, which has the GPU to itself.
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
) -> Iterator[tuple[dict[str, Any], dict[str, Timing]]]:
    """
    Measures the steps of a stage side by side.

    Args:
        name (`str`): Name of the stage.
        contenders (`dict[str, Contender]`): By name; they share a language model.
        shapes ([`Shapes`]): Sizes of the models, for peak memory in processes of their own (CPU).
        arguments ([`TrainingArguments`]): Options.

    Yields:
        `tuple`: After each step, the entries of the record and the timings of those that did not run out of memory.
    """

    def run(its_name: str) -> dict[str, float]:
        """A timed step. On a GPU the first ones measure what the model takes by itself."""
        contender, batch = contenders[its_name], batches[its_name]
        one_step = functools.partial(step, contender.model, batch, optimizer)
        if arguments.on_gpu and its_name not in peaks:
            one_step()  # makes the optimizer's states
            peaks[its_name] = added_gpu_bytes(one_step) + get_state_bytes(contender.model, optimizer)
        return time_phase(one_step)

    optimizer = prepare(contenders, name, arguments)
    batches = {its_name: make_batch(each, name, arguments.batch_size) for its_name, each in contenders.items()}
    peaks: dict[str, int] = {}
    functions = {its_name: functools.partial(run, its_name) for its_name in contenders}
    for measured in compare_phases(functions, arguments, name):
        entries = {}
        for its_name, contender in contenders.items():
            if its_name not in measured:
                continue
            phases = measured[its_name]
            entries[its_name] = {
                "sides": contender.sides,
                "tokens": contender.num_image_tokens + TEXT_TOKENS[name],
                "trained_parameters": sum(p.numel() for p in contender.model.parameters() if p.requires_grad),
            }
            if phases:
                entries[its_name] |= {"seconds": phases["seconds"].to_dict(), "peak_bytes": peaks.get(its_name)}
            else:
                entries[its_name]["out_of_memory"] = True
        timings = {its_name: phases["seconds"] for its_name, phases in measured.items() if phases}
        yield entries, timings
    for its_name in tqdm([] if arguments.on_gpu else timings, desc=f"{name}, memory", unit="run"):
        _, entries[its_name]["peak_bytes"] = in_fresh_process(step_alone, shapes, its_name, name, arguments)
    yield entries, timings


def get_state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Memory of a model's weights and of its parameters' optimizer states, in bytes."""
    states = [optimizer.state[parameter] for parameter in model.parameters() if parameter in optimizer.state]
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    return get_weight_bytes(model) + sum(tensor.nbytes for tensor in tensors)


def find_targets(timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """
    The project's targets for a step of stage 2 and the results; see [`make_target`].

    Args:
        timings (`dict[str, Timing]`): Of a step, without those that ran out of memory.
    """
    base, low, llava = (timings.get(name) for name in ("llava-hr-1024", "llava-hr-384", "llava-1.5-1022"))
    name = "step of stage 2 at 1024 px over that at 384 px (paper, whole training: 1.176)"
    targets = [make_target(name, ratio(base, low), 1.15, False, True)]
    name = "step of stage 2 at 1024 px over LLaVA-1.5's at 1022 px"
    return [*targets, make_target(name, ratio(base, llava), 1 / 3, False, True)]


def compare_largest(largest: dict[str, int], max_batch_size: int) -> list[dict[str, Any]]:
    """The target for the samples of the largest steps, if both were found, see [`make_target`]."""
    ours, llava = (largest.get(name) for name in ("llava-hr-1536", "llava-1.5-1022"))
    more = None
    # a search that ended before LLaVA-1.5's memory did says nothing
    if ours is not None and llava is not None and llava * 2 <= max_batch_size:
        more = spread([ours - llava])
    name = "samples that the largest step at 1536 px has more than LLaVA-1.5's at 1022 px"
    return [make_target(name, more, 1, True, True)]


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


def search(shapes: Shapes, arguments: TrainingArguments) -> Iterator[dict[str, Any]]:
    """Looks for the largest batch of each contender; yields the results after each."""
    results: dict[str, Any] = {"omitted": OMITTED.format(dtype=arguments.dtype), "largest_batch": {}}
    for name in tqdm(arguments.contenders, desc="largest batch", unit="model"):
        results["largest_batch"][name], _ = in_fresh_process(find_largest_batch, shapes, name, arguments)
        results["targets"] = compare_largest(results["largest_batch"], arguments.max_batch_size)
        yield results


def run(arguments: TrainingArguments) -> Iterator[dict[str, Any]]:
    """Measures the stages, or looks for the largest batch; yields the results after each step or model."""
    shapes, make = SHAPES[arguments.preset], {"device": arguments.device, "dtype": arguments.torch_dtype}
    if arguments.max_batch_size:
        yield from search(shapes, arguments)
        return
    results: dict[str, Any] = {
        "omitted": None if arguments.dtype == "float32" else OMITTED.format(dtype=arguments.dtype)
    }
    sides = {
        family: [int(name.rsplit("-", 1)[1]) for name in arguments.contenders if name.startswith(family)]
        for family in ("llava-hr", "llava-1.5")
    }
    hr_sides, llava, source = {side: LLAVA_HR_SIDES[side] for side in sides["llava-hr"]}, {}, None
    for name in arguments.stages:
        llava_hr = make_llava_hr(shapes, **make, mr_adapters=STAGES[name].mr_adapters, sides=hr_sides)
        if source is None:
            source = next(iter(llava_hr.values())).model
            llava = make_llava(shapes, **make, sides=tuple(sides["llava-1.5"]), source=source)
        share_language_model(llava_hr, source)
        for entries, timings in run_stage(name, {**llava_hr, **llava}, shapes, arguments):
            results[name] = entries
            results["targets"] = find_targets(timings) if name == "finetune" else []
            yield results


def main() -> None:
    run_benchmark("training", TrainingArguments, run, draw, lambda results, _: f"Omitted: {results['omitted']}")


if __name__ == "__main__":
    main()
