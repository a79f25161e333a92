# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
What a training step costs: LLaVA-HR against LLaVA-1.5 with the same ViT and language model, in both stages.

    python -m benchmarks.training                   # small models on a CPU, everything trained with AdamW
    python -m benchmarks.training --preset full     # 7B on one GPU, bfloat16 weights with AdamW in 8 bits

A step is forward, backward and optimizer on a generated batch; what is trained is what [`training.stages`] trains
(LLaVA-1.5: the projector, then everything as well). The language model is one and the same in all of them.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from training.stages import LORA_TARGET_MODULES, STAGES, Stage, freeze

from ._common import (
    BenchmarkArguments,
    Timing,
    compare,
    in_fresh_process,
    make_target,
    parse_arguments,
    peak_gpu_bytes,
    plot_path,
    write_record,
)
from ._models import (
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
class TrainingArguments(BenchmarkArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        repeats (`int`): See [`BenchmarkArguments`].
        method (`str`, *optional*):
            How stage 2 trains: `"full"` (everything, AdamW; cpu), `"full_8bit"` (everything, AdamW with states in 8
            bits, meant for one GPU of 80 GB; full) or `"lora"` (language model at rank 128, beside adapters, fusion
            and projector).
        batch_size (`int`): Samples of a step, each with a picture.
        gradient_checkpointing (`bool`, *optional*): Whether activations are computed again in the backward pass; with
            the full preset alone by default.
        dtype (`str`, *optional*): Of weights and gradients: `"float32"` (cpu) or `"bfloat16"` (full) by default.
    """

    repeats: int = field(default=3, metadata={"help": "rounds that count"})
    method: str | None = field(default=None, metadata={"help": f"of stage 2: {', '.join(METHODS)}"})
    batch_size: int = field(default=1, metadata={"help": "samples of a step"})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "compute activations twice"})
    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16"})

    def __post_init__(self):
        super().__post_init__()
        full = self.preset == "full"
        self.method = self.method or ("full_8bit" if full else "full")
        self.dtype = self.dtype or ("bfloat16" if full else "float32")
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = full
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, but got {self.method!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, but got {self.dtype!r}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


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
        contenders (`dict[str, Contender]`): All that the optimizer is for; changed in place.
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
    for contender in contenders.values():
        freeze(contender.model, stage, [])
        contender.model.train()
        if arguments.gradient_checkpointing:
            contender.model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = {
        id(parameter): parameter
        for contender in contenders.values()
        for parameter in contender.model.parameters()
        if parameter.requires_grad
    }
    if arguments.method == "full_8bit":
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


def step_alone(shapes: Shapes, name: str, stage: str, arguments: TrainingArguments) -> None:
    """Makes a contender, its optimizer's states and then a step; for a fresh process."""
    mr_adapters = STAGES[stage].mr_adapters
    contender = make_contender(shapes, name, arguments.device, arguments.torch_dtype, mr_adapters)
    optimizer = prepare({name: contender}, stage, arguments)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    step(contender.model, make_batch(contender, stage, arguments.batch_size), optimizer)


def get_gpu_peak(contender: Contender, optimizer: torch.optim.Optimizer, run) -> int | None:
    """
    Peak memory of a step on a GPU that the model shares with others, in bytes: its weights, its optimizer states and
    what a step adds. `None` if the memory does not suffice.
    """
    try:
        run()  # makes the optimizer's states
        before = torch.cuda.memory_allocated()
        added = peak_gpu_bytes(run) - before
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    states = [optimizer.state[parameter] for parameter in contender.model.parameters() if parameter in optimizer.state]
    state_bytes = sum(value.nbytes for state in states for value in state.values() if isinstance(value, torch.Tensor))
    return added + get_weight_bytes(contender.model) + state_bytes


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
    optimizer = prepare(contenders, name, arguments)
    runs = {
        its_name: functools.partial(
            step, contender.model, make_batch(contender, name, arguments.batch_size), optimizer
        )
        for its_name, contender in contenders.items()
    }
    if arguments.device.startswith("cuda"):
        peaks = {its_name: get_gpu_peak(contenders[its_name], optimizer, run) for its_name, run in runs.items()}
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


def find_targets(timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """What the project wants of a step of stage 2, beside what came out; see [`make_target`]."""
    base = timings["llava-hr-1024"]
    name = "step of stage 2 at 1024 px over that at 384 px (paper, whole training: 1.176)"
    targets = [make_target(name, base.ratio(timings["llava-hr-384"]), 1.15, False, True)]
    if "llava-1.5-1022" in timings:
        name = "step of stage 2 at 1024 px over LLaVA-1.5's at 1022 px"
        targets.append(make_target(name, base.ratio(timings["llava-1.5-1022"]), 1 / 3, False, True))
    return targets


def draw(results: dict[str, Any], arguments: TrainingArguments) -> None:
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
    figure.savefig(plot_path("training", arguments), dpi=120)


def main() -> None:
    arguments = parse_arguments(TrainingArguments)
    shapes, make = SHAPES[arguments.preset], {"device": arguments.device, "dtype": arguments.torch_dtype}
    llava = make_llava(shapes, **make)
    language_model = next(iter(llava.values())).model
    results = {}
    for name, stage in STAGES.items():
        llava_hr = make_llava_hr(shapes, **make, mr_adapters=stage.mr_adapters)
        share_language_model(llava_hr, language_model)
        results[name], timings = run_stage(name, {**llava_hr, **llava}, shapes, arguments)
    results["targets"] = find_targets(timings)
    write_record("training", arguments, results)
    draw(results, arguments)
    for target in results["targets"]:
        print(f"{target['name']}: {target['measured']['median']:.3g} (target: {target['target']})")


if __name__ == "__main__":
    main()
