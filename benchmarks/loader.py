# SPDX-License-Identifier: Apache-2.0
"""
Training batches from files: LLaVA-HR's collator against TRL's with transformers' `LlavaProcessor`.

    python -m benchmarks.loader                  # on the CPU, with as many workers as there are cores
    python -m benchmarks.loader --preset full    # batches are pinned and copied to the GPU

At 256 px with the sizes of the tiny model, at 1024 px with those of 7B, and LLaVA-1.5 at 1022 px. LLaVA-HR masks all
but the answers; "transformers' masks" is LLaVA-HR without its processor's shortcut for that, and LLaVA is measured as
it is, without masks. The results also say how much shared memory prefetched batches need, and how many samples per
second keep an H100 busy.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlavaImageProcessor, LlavaProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrProcessor
from training.tiny.fineprint import count_cores
from training.trainer import LlavaHrDataCollator

from ._common import BenchmarkArguments, Timing, compare, make_target, ratio, run_benchmark, synchronize
from .plan import GPUS, SAMPLES, calibrate, get_stage_flops
from .preprocessing import draw_picture, encode


if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINY = Path(__file__).parent.parent / "examples" / "tiny-llava-hr"
WORKERS = (0, 1, 2, 4, 16)
# Of the image processor: the tiny model's at 256 px, 7B's at 1024 px
SIZES = {256: {"size": 256, "low_res_size": 56, "patch_size": 7}, 1024: {"size": 1024}}
LLAVA_SIDE = 1022
# What a training on one GPU with many cores would set: samples per step, workers, and torch's default of batches that
# each worker has ready
SHARED_MEMORY_CASE = {"batch_size": 64, "workers": 12, "prefetch_factor": 2}
TURNS = [
    ("What is shown?", "A street with three signs and a blue circle at the top left."),
    ("What does the red sign say?", "4711"),
    ("Where is the circle, and what color does it have?", "It is blue and at the top left of the image."),
    ("What does the green sign say?", "0815"),
    ("Is anything else written on the signs?", "No, those are all the texts that can be read here."),
]


@dataclass
class LoaderArguments(BenchmarkArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        repeats (`int`): Rounds that count.
        batch_size (`int`): Samples per batch.
        num_batches (`int`): Batches per round and worker.
        workers (`list[int]`): Numbers of worker processes; those above the number of cores are skipped.
    """

    repeats: int = field(default=3, metadata={"help": "rounds that count"})
    batch_size: int = field(default=8, metadata={"help": "samples per batch"})
    num_batches: int = field(default=4, metadata={"help": "batches per round and worker"})
    workers: list[int] = field(default_factory=lambda: list(WORKERS), metadata={"help": "worker processes"})

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")
        cores = count_cores()
        self.workers = [number for number in self.workers if 0 <= number <= cores]
        if not self.workers:
            raise ValueError(f"--workers must have a number from 0 to {cores}, the cores of this machine.")


class TransformersMasks(LlavaHrProcessor):
    """LLaVA-HR's processor with transformers' own way of masking: it iterates over a tensor of offsets."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().__call__(*args, **kwargs)
        if "offset_mapping" in inputs:
            inputs["offset_mapping"] = torch.tensor(inputs["offset_mapping"])
        return inputs


def make_collators(side: int) -> dict[str, DataCollatorForVisionLanguageModeling]:
    """What is compared at a side of the image, by name."""
    processor = AutoProcessor.from_pretrained(TINY)
    tokenizer, template = processor.tokenizer, processor.chat_template
    image_processor = LlavaHrImageProcessor(**SIZES[side])
    parts = {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": template}
    collators = {"llava-hr": LlavaHrDataCollator(LlavaHrProcessor(**parts), assistant_only_loss=True)}
    if side == 256:
        masks = LlavaHrDataCollator(TransformersMasks(**parts), assistant_only_loss=True)
        collators["llava-hr, transformers' masks"] = masks
    else:
        collators["llava-hr, bfloat16"] = dataclasses.replace(collators["llava-hr"], pixel_dtype=torch.bfloat16)
        # as LLaVA-1.5 is used: the whole image, padded to a square
        sizes = {"size": {"shortest_edge": LLAVA_SIDE}, "crop_size": LLAVA_SIDE, "do_pad": True}
        llava = LlavaProcessor(
            LlavaImageProcessor(**sizes),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            chat_template=template,
            num_additional_image_tokens=1,
        )
        collators["llava"] = DataCollatorForVisionLanguageModeling(llava)
    return collators


def make_samples(folder: Path, side: int, number: int) -> list[dict[str, Any]]:
    """Chats about a JPEG file a quarter wider than the image side, as TRL's collator takes them."""
    file = folder / f"{side}.jpg"
    file.write_bytes(encode(draw_picture(side * 5 // 4, side * 15 // 16)))
    messages = []
    for question, answer in TURNS:
        images = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return [{"messages": messages, "images": [str(file)]} for _ in range(number)]


def load(loader: DataLoader, device: str) -> None:
    """Takes all batches to the device."""
    for batch in loader:
        for tensor in batch.values():
            tensor.to(device, non_blocking=True)
    synchronize()


def measure(side: int, folder: Path, arguments: LoaderArguments) -> dict[str, dict[int, Timing]]:
    """
    Loads samples in each way and with each number of workers.

    Returns:
        `dict[str, dict[int, Timing]]`: For each name, by the number of workers, seconds per sample.
    """
    collators = make_collators(side)
    timings: dict[str, dict[int, Timing]] = {name: {} for name in collators}
    for workers in arguments.workers:
        samples = make_samples(folder, side, arguments.batch_size * arguments.num_batches * max(workers, 1))
        loaders = {
            name: DataLoader(
                samples,
                arguments.batch_size,
                collate_fn=collator,
                num_workers=workers,
                pin_memory=arguments.on_gpu,
                persistent_workers=workers > 0,
            )
            for name, collator in collators.items()
        }
        functions = {name: partial(load, loader, arguments.device) for name, loader in loaders.items()}
        for name, timing in compare(functions, arguments, f"{side} px, {workers} workers").items():
            timings[name][workers] = Timing([seconds / len(samples) for seconds in timing.seconds])
    return timings


def count_bytes(side: int, folder: Path) -> dict[str, float]:
    """Bytes per sample of a batch of each collator."""
    batches = {name: collator(make_samples(folder, side, 2)) for name, collator in make_collators(side).items()}
    return {name: sum(tensor.nbytes for tensor in batch.values()) / 2 for name, batch in batches.items()}


def get_needs(bytes_per_sample: float) -> dict[str, float]:
    """What a training of 7B asks of its loader: shared memory in bytes, and samples per second for an H100."""
    utilization, _ = calibrate()
    flops = get_stage_flops("7b", "llava-hr-1024", "finetune") / SAMPLES["finetune"]
    case = SHARED_MEMORY_CASE
    return {
        **case,
        "shared_memory_bytes": bytes_per_sample * case["batch_size"] * case["workers"] * case["prefetch_factor"],
        "flops_per_sample": flops,
        "utilization": utilization,
        "h100_samples_per_second": GPUS["h100"].flops * utilization / flops,
    }


def find_targets(
    timings: dict[int, dict[str, dict[int, Timing]]], needs: dict[str, float], arguments: LoaderArguments
) -> list[dict]:
    """What the project wants, beside what came out; see [`make_target`]."""
    first, most, (small, large) = min(arguments.workers), max(arguments.workers), timings.values()
    busy = Timing([1 / needs["h100_samples_per_second"]] * arguments.repeats)
    ratios = {
        f"samples/s at 256 px over those with transformers' masks, {first} workers": (
            ratio(small["llava-hr, transformers' masks"][first], small["llava-hr"][first]),
            3,
        )
    }
    for workers in arguments.workers:
        name = f"samples/s at 1024 px over LLaVA's at {LLAVA_SIDE} px, {workers} workers"
        ratios[name] = (ratio(large["llava"][workers], large["llava-hr"][workers]), 1)
    name = f"samples/s at 1024 px over what keeps an H100 busy in stage 2 of 7B, {most} workers"
    ratios[name] = (ratio(busy, large["llava-hr"][most]), 1)
    return [make_target(name, measured, target, True, True) for name, (measured, target) in ratios.items()]


def draw(figure: "Figure", results: dict[str, Any], arguments: LoaderArguments) -> None:
    """Samples per second over the number of workers."""
    figure.set_size_inches(9, 3.5)
    for axes, (side, entries) in zip(figure.subplots(1, len(results["sides"])), results["sides"].items(), strict=True):
        for name, entry in entries.items():
            axes.plot(list(entry["samples_per_second"]), list(entry["samples_per_second"].values()), "o-", label=name)
        axes.set(title=f"{side} px", xlabel="worker processes", ylabel="samples per second", ylim=(0, None))
        axes.legend(fontsize="small")


def describe(results: dict[str, Any], arguments: LoaderArguments) -> str:
    """Megabytes and rates of everything, and what a training needs."""
    lines = []
    for side, entries in results["sides"].items():
        for name, entry in entries.items():
            rates = ", ".join(f"{rate:.1f} ({workers})" for workers, rate in entry["samples_per_second"].items())
            megabytes = entry["bytes_per_sample"] / 1e6
            lines.append(f"{side} px, {name}: {megabytes:.2f} MB per sample; samples/s (workers): {rates}")
    needs = results["needs"]
    lines.append(
        "{batch_size} samples of 1024 px, {workers} workers, {prefetch_factor} batches each: ".format(**needs)
        + f"{needs['shared_memory_bytes'] / 1e9:.1f} GB of shared memory"
    )
    lines.append(
        f"An H100 in stage 2 of 7B: {needs['flops_per_sample'] / 1e12:.0f} TFLOP per sample, at "
        f"{needs['utilization']:.0%} of its rate {needs['h100_samples_per_second']:.1f} samples/s"
    )
    return "\n".join(lines)


def run(arguments: LoaderArguments) -> Iterator[dict[str, Any]]:
    """Measures one side after the other; yields the results after each."""
    torch.set_num_threads(1)  # as in a worker
    timings: dict[int, dict[str, dict[int, Timing]]] = {}
    results: dict[str, Any] = {"sides": {}}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIZES:
            num_bytes, timings[side] = count_bytes(side, Path(folder)), measure(side, Path(folder), arguments)
            results["sides"][str(side)] = {
                name: {
                    "bytes_per_sample": num_bytes[name],
                    "seconds_per_sample": {str(workers): timing.to_dict() for workers, timing in entry.items()},
                    "samples_per_second": {str(workers): 1 / timing.median for workers, timing in entry.items()},
                }
                for name, entry in timings[side].items()
            }
            yield results
    results["needs"] = get_needs(results["sides"]["1024"]["llava-hr"]["bytes_per_sample"])
    results["targets"] = find_targets(timings, results["needs"], arguments)
    yield results


def main() -> None:
    run_benchmark("loader", LoaderArguments, run, draw, describe)


if __name__ == "__main__":
    main()
