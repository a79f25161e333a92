# SPDX-License-Identifier: Apache-2.0
"""
Training batches from files: LLaVA-HR's collator against TRL's with transformers' `LlavaProcessor`.

    python -m benchmarks.loader                  # on the CPU, with as many workers as there are cores
    python -m benchmarks.loader --preset full    # batches are pinned and copied to the GPU

At 256 px with the sizes of the tiny model, at 1024 px with those of 7B, and LLaVA-1.5 at 1022 px. LLaVA-HR masks all
but the answers; "transformers' masks" is LLaVA-HR without its processor's shortcut for that, and LLaVA is measured as
it is, without masks. Also: the CPU time of the main process, which limits how many workers are of use; both views of
a 12-megapixel image against LLaVA's one; the shared memory of prefetched batches; and the samples per second that keep
an H100 busy.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoProcessor, LlavaImageProcessor, LlavaProcessor
from transformers.hf_argparser import HfArg
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrProcessor
from training.tiny.fineprint import count_cores
from training.trainer import LlavaHrDataCollator

from .measure import (
    BenchmarkArguments,
    compare,
    get_phase,
    make_target,
    ratio,
    run_benchmark,
    spread,
    synchronize,
    time_phase,
)
from .plan import GPUS, SAMPLES, calibrate, get_stage_flops


if TYPE_CHECKING:
    from matplotlib.figure import Figure

TINY = Path(__file__).parent.parent / "examples" / "tiny-llava-hr"
# Arguments of the image processor: the tiny model's at 256 px, 7B's at 1024 px
SIZES = {256: {"size": 256, "low_res_size": 56, "patch_size": 7}, 1024: {"size": 1024}}
# LLaVA-1.5 as users run it: the whole image, padded to a square
LLAVA_SIDE = 1022
LLAVA_SIZES = {"size": {"shortest_edge": LLAVA_SIDE}, "crop_size": LLAVA_SIDE, "do_pad": True}
# Training on one GPU with many cores: samples per step, workers, prefetched batches per worker (torch's default)
SHARED_MEMORY_CASE = {"batch_size": 64, "workers": 12, "prefetch_factor": 2}
TURNS = [
    ("What is shown?", "A street with three signs and a blue circle at the top left."),
    ("What does the red sign say?", "4711"),
    ("Where is the circle, and what color does it have?", "It is blue and at the top left of the image."),
    ("What does the green sign say?", "0815"),
    ("Is anything else written on the signs?", "No, those are all the texts that can be read here."),
]
# Seconds per sample by number of workers, by name
Rates = dict[str, dict[int, list[float]]]


@dataclass
class LoaderArguments(BenchmarkArguments):
    """Options of this benchmark."""

    repeats: int = HfArg(default=3, help="rounds that count")
    batch_size: int = HfArg(default=8, help="samples per batch")
    num_batches: int = HfArg(default=4, help="batches per round and worker")
    workers: list[int] = HfArg(
        default_factory=lambda: [number for number in (0, 1, 2, 4, 16) if number <= count_cores()],
        help="numbers of worker processes; by default 0, 1, 2, 4 and 16 as far as there are cores",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, but got {getattr(self, name)}.")
        if min(self.workers) < 0:
            raise ValueError(f"--workers must be at least 0, but got {min(self.workers)}.")


class TransformersMasks(LlavaHrProcessor):
    """LLaVA-HR's processor without its shortcut: to mask answers, transformers iterates over a tensor."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().__call__(*args, **kwargs)
        if "offset_mapping" in inputs:
            inputs["offset_mapping"] = torch.tensor(inputs["offset_mapping"])
        return inputs


def make_collators(side: int) -> dict[str, DataCollatorForVisionLanguageModeling]:
    """The collators to compare at one image side, by name."""
    processor = AutoProcessor.from_pretrained(TINY)
    parts = {"tokenizer": processor.tokenizer, "chat_template": processor.chat_template}
    ours = {"image_processor": LlavaHrImageProcessor(**SIZES[side]), **parts}
    collators = {"llava-hr": LlavaHrDataCollator(LlavaHrProcessor(**ours), assistant_only_loss=True)}
    if side == 256:
        masks = LlavaHrDataCollator(TransformersMasks(**ours), assistant_only_loss=True)
        collators["llava-hr, transformers' masks"] = masks
    else:
        collators["llava-hr, bfloat16"] = dataclasses.replace(collators["llava-hr"], pixel_dtype=torch.bfloat16)
        llava = LlavaProcessor(
            LlavaImageProcessor(**LLAVA_SIZES),
            **parts,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        collators["llava"] = DataCollatorForVisionLanguageModeling(llava)
    return collators


def draw_image(width: int, height: int) -> Image.Image:
    """An image of random blobs about 8 pixels wide, deterministic."""
    blobs = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def make_samples(folder: Path, side: int, number: int) -> list[dict[str, Any]]:
    """Chats about a JPEG file a quarter wider than the image side, as TRL's collator takes them."""
    file = folder / f"{side}.jpg"
    draw_image(side * 5 // 4, side * 15 // 16).save(file, quality=90)
    messages = []
    for question, answer in TURNS:
        images = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return [{"messages": messages, "images": [str(file)]} for _ in range(number)]


def load(loader: DataLoader, device: str) -> dict[str, float]:
    """Copies all batches to the device; returns the seconds, and the CPU seconds of the main process."""
    start, start_cpu = time.perf_counter(), time.process_time()
    for batch in loader:
        for tensor in batch.values():
            tensor.to(device, non_blocking=True)
    synchronize()
    return {"seconds": time.perf_counter() - start, "main_process": time.process_time() - start_cpu}


def measure(side: int, folder: Path, arguments: LoaderArguments) -> Iterator[tuple[Rates, Rates]]:
    """
    Seconds per sample of each collator at a side of the image, all of them and those of the main process' CPU. Yields
    those so far after each number of workers.
    """
    collators = make_collators(side)
    rates, main_process = ({name: {} for name in collators} for _ in range(2))
    for workers in arguments.workers:
        samples = make_samples(folder, side, arguments.batch_size * arguments.num_batches * max(workers, 1))
        functions = {}
        for name, collator in collators.items():
            loader = DataLoader(
                samples,
                arguments.batch_size,
                collate_fn=collator,
                num_workers=workers,
                pin_memory=arguments.on_gpu,
                persistent_workers=workers > 0,
            )
            functions[name] = partial(load, loader, arguments.device)
        *_, timings = compare(functions, arguments, f"{side} px, {workers} workers")
        for phase, found in (("seconds", rates), ("main_process", main_process)):
            for name, seconds in get_phase(timings, phase).items():
                found[name][workers] = [value / len(samples) for value in seconds]
        yield rates, main_process


def measure_views(arguments: LoaderArguments) -> dict[str, list[float]]:
    """Seconds to compute both views of a 4000 x 3000 image in memory, and LLaVA's single view."""
    image = draw_image(4000, 3000)
    processors = {"llava-hr": LlavaHrImageProcessor(**SIZES[1024]), "llava": LlavaImageProcessor(**LLAVA_SIZES)}
    options = {"return_tensors": "pt", "device": arguments.device}
    views = {name: partial(time_phase, partial(each, image, **options)) for name, each in processors.items()}
    *_, timings = compare(views, arguments, "views")
    return get_phase(timings)


def count_bytes(side: int, folder: Path) -> dict[str, float]:
    """Bytes per sample of a batch of each collator."""
    batches = {name: collator(make_samples(folder, side, 2)) for name, collator in make_collators(side).items()}
    return {name: sum(tensor.nbytes for tensor in batch.values()) / 2 for name, batch in batches.items()}


def get_needs(bytes_per_sample: float) -> dict[str, float]:
    """Requirements of a 7B training: shared memory in bytes, and samples per second that keep an H100 busy."""
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
    rates: dict[int, Rates], views: dict[str, list[float]], needs: dict[str, float], arguments: LoaderArguments
) -> list[dict[str, Any]]:
    """The project's targets and the results; see [`make_target`]."""
    first, most, (small, large) = min(arguments.workers), max(arguments.workers), rates.values()
    busy = [1 / needs["h100_samples_per_second"]] * arguments.repeats
    masks = ratio(small["llava-hr, transformers' masks"][first], small["llava-hr"][first])
    named = [(f"samples/s at 256 px over those with transformers' masks, {first} workers", masks, 3)]
    for workers in arguments.workers:
        name = f"samples/s at 1024 px over LLaVA's at {LLAVA_SIDE} px, {workers} workers"
        named.append((name, ratio(large["llava"][workers], large["llava-hr"][workers]), 1))
    name = f"samples/s at 1024 px over the rate that keeps an H100 busy in stage 2 of 7B, {most} workers"
    named.append((name, ratio(busy, large["llava-hr"][most]), 1))
    named.append(
        ("LLaVA's time for its view over ours for both, 4000 x 3000", ratio(views["llava"], views["llava-hr"]), 1.3)
    )
    return [make_target(name, measured, target, True) for name, measured, target in named]


def draw(figure: "Figure", results: dict[str, Any], arguments: LoaderArguments) -> None:
    """Samples per second over the number of workers."""
    figure.set_size_inches(9, 3.5)
    for axes, (side, entries) in zip(figure.subplots(1, len(results["sides"])), results["sides"].items(), strict=True):
        for name, entry in entries.items():
            axes.plot(list(entry["samples_per_second"]), list(entry["samples_per_second"].values()), "o-", label=name)
        axes.set(title=f"{side} px", xlabel="worker processes", ylabel="samples per second", ylim=(0, None))
        axes.legend(fontsize="small")


def run(arguments: LoaderArguments) -> Iterator[dict[str, Any]]:
    """Measures each side in turn; yields the results after each number of workers."""
    torch.set_num_threads(1)  # as in a worker
    rates: dict[int, Rates] = {}
    results: dict[str, Any] = {"sides": {}}
    with tempfile.TemporaryDirectory() as folder:
        for side in SIZES:
            num_bytes = count_bytes(side, Path(folder))
            for found, main_process in measure(side, Path(folder), arguments):
                rates[side] = found
                results["sides"][str(side)] = {
                    name: {
                        "bytes_per_sample": num_bytes[name],
                        "samples_per_second": {str(n): 1 / spread(seconds)["median"] for n, seconds in entry.items()},
                        "main_process_seconds": {
                            str(n): spread(seconds)["median"] for n, seconds in main_process[name].items()
                        },
                    }
                    for name, entry in found.items()
                }
                yield results
    views = measure_views(arguments)
    results["views"] = {name: spread(seconds) for name, seconds in views.items()}
    results["needs"] = get_needs(results["sides"]["1024"]["llava-hr"]["bytes_per_sample"])
    results["targets"] = find_targets(rates, views, results["needs"], arguments)
    yield results


def main() -> None:
    run_benchmark("loader", LoaderArguments, run, draw)


if __name__ == "__main__":
    main()
