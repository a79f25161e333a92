# SPDX-License-Identifier: Apache-2.0
"""
All benchmarks within a time budget, most important first:

    python3 -m benchmarks.run --preset full --minutes 12 --output DIR    # 7B on one GPU
    python3 -m benchmarks.run --preset cpu --minutes 3 --output DIR      # small models

Each step is a command of its own with a timeout. A step does not start if its estimate exceeds the rest of the budget;
one that fails or is skipped is recorded, and the next one runs. `DIR` has the records of the benchmarks, written
whenever a figure is measured, the steps (`steps.json`) and their output (`log.txt`). Plots are drawn later, such as
by `python3 -m benchmarks.inference --preset full --from DIR`.

Without bitsandbytes, 4-bit decoding is omitted and the training steps use LoRA; a step that needs another missing
package is skipped. On a GPU, torch's own FlashAttention is preferred to cuDNN's attention, which makes a new plan for
each length that it has not met.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from transformers.hf_argparser import HfArg

from modeling_llava_hr.utils import run_command

from .measure import OutputArguments, get_machine, is_installed, parse_arguments, write_record


PACKAGES = (
    "anls_star",
    "bitsandbytes",
    "peft",
    "trl",
    "datasets",
    "matplotlib",
    "open_clip",
    "pytest",
    "sentencepiece",
    "flash_attn",
)
# Files rather than the folder: others cannot be collected where packages are missing
GPU_TESTS = (
    "tests/modeling_llava_hr/test_image_processing_llava_hr.py",
    "tests/modeling_llava_hr/test_modeling_llava_hr.py",
    "tests/reliability/test_numerics.py",
)
# Whether bitsandbytes finds its library for this version of CUDA
QUANTIZE = "import torch, bitsandbytes; bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, device='cuda'))"
# A step that takes longer than its estimate gets up to this many times as long, if the budget allows
PATIENCE = 2


@dataclass
class RunArguments(OutputArguments):
    """Options of the run."""

    preset: str = HfArg(default="cpu", help="cpu or full, see the benchmarks")
    minutes: float = HfArg(default=12.0, help="budget for all steps")
    steps: list[str] | None = HfArg(default=None, help="names of the steps to run; all by default")
    parts: str = HfArg(
        default="training/parts", help="language model and towers of the tiny model, trained beforehand"
    )

    def __post_init__(self):
        if self.preset not in ("cpu", "full"):
            raise ValueError(f"--preset must be cpu or full, but got {self.preset!r}.")
        if self.minutes <= 0:
            raise ValueError(f"--minutes must be above 0, but got {self.minutes}.")


@dataclass
class Step:
    """A command and its result."""

    name: str
    command: list[str]  # module and options, run by this Python
    estimate: float  # seconds
    needs: tuple[str, ...] = ()  # packages that it needs; it is skipped if one is missing
    status: str = "pending"  # "pending", "running", "done", "failed", "timeout", "skipped" or "stopped"
    reason: str = ""  # why it was skipped
    exit_status: int | None = None  # that of the command; negative for a signal
    seconds: float | None = None


def get_steps(arguments: RunArguments, missing: set[str]) -> list[Step]:
    """
    The steps of a preset, most important first.

    Args:
        arguments ([`RunArguments`]): Options of the run.
        missing (`set[str]`): Packages that are not installed.
    """

    def benchmark(name: str, estimate: float, *options: str, step: str | None = None, needs: tuple = ()) -> Step:
        preset = [] if name == "plan" else ["--preset", arguments.preset]
        command = [f"benchmarks.{name}", *preset, "--output", arguments.output, "--no_plot", *options]
        return Step(step or name, command, estimate, needs)

    if arguments.preset == "cpu":
        quick = ("--repeats", "1", "--warmup", "0")
        return [
            benchmark("inference", 60, *quick, "--batch_sizes", "1", "--new_tokens", "10"),
            benchmark("roofline", 60, "--repeats", "1"),
            benchmark("training", 60, *quick, "--stages", "finetune"),
            benchmark("loader", 90, needs=("trl",)),
            benchmark("plan", 45),
        ]
    four_bit = "bitsandbytes" not in missing
    method = ("--method", "full_8bit" if four_bit else "lora")
    search = ("--max_batch_size", "64", "--contenders", "llava-hr-1536", "llava-1.5-1022", "--label", "largest")
    variants = ("eager", "4bit") if four_bit else ("eager",)
    # the warnings of an image's own packages are no errors
    tests = ["pytest", "-q", "-rA", "-W", "default", "-m", "gpu", *GPU_TESTS]
    eight = ("--batch_sizes", "8", "--variants", "none", "--repeats", "1", "--label", "batch-8")
    pairs = ("--contenders", "llava-hr-768", "llava-hr-1024", "llava-hr-1536", "llava-1.5-336", "llava-1.5-1022")
    tiny = ["training.tiny.train", "--preset", "gpu", "--output", ".cache/tiny", "--parts", arguments.parts]
    workers = ("--workers", "1", "4", "16", "--repeats", "2", "--num_batches", "2")
    return [
        benchmark("inference", 80, "--repeats", "2", "--variants", *variants),
        benchmark("roofline", 110, "--repeats", "3"),
        benchmark("training", 75, *method),
        Step("gpu tests", tests, 35, ("pytest",)),
        benchmark("training", 60, *method, *search, step="largest batch"),
        benchmark("inference", 50, *eight, *pairs, step="batch 8"),
        # FinePrint's fonts are matplotlib's
        Step("tiny model", tiny, 300, ("trl", "datasets", "matplotlib", "anls_star")),
        benchmark("loader", 50, *workers, needs=("trl", "datasets")),
    ]


def run_step(step: Step, timeout: float, log: TextIO) -> None:
    """
    Runs a step in a process group of its own, all of which is killed at the timeout or when this program is stopped.

    Args:
        step ([`Step`]): The step; its result is set.
        timeout (`float`): Seconds.
        log (`TextIO`): Where its output goes.
    """
    start, step.status = time.monotonic(), "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", *step.command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # one line of the log per update of a progress bar; FlashAttention before cuDNN's
        env={**os.environ, "TQDM_MININTERVAL": "10", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"},
    )
    try:
        step.status = "failed" if process.wait(timeout) else "done"
    except subprocess.TimeoutExpired:
        step.status = "timeout"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the rest of the group
        step.exit_status, step.seconds = process.wait(), round(time.monotonic() - start, 2)


def run_steps(steps: list[Step], arguments: RunArguments, missing: set[str]) -> None:
    """
    Runs steps within the budget and writes `steps.json` before and after each.

    Args:
        steps (`list[Step]`): The steps; their results are set.
        arguments ([`RunArguments`]): Budget and output folder.
        missing (`set[str]`): Packages that are not installed.
    """

    def save(finished: bool = False) -> None:
        results = {"missing": sorted(missing), "steps": [asdict(step) for step in steps]}
        write_record(Path(arguments.output) / "steps.json", "run", arguments, results, finished)

    end = time.monotonic() + 60 * arguments.minutes
    save()
    with open(Path(arguments.output) / "log.txt", "a", encoding="utf-8") as log:
        for step in steps:
            rest = end - time.monotonic()
            if absent := missing.intersection(step.needs):
                step.status, step.reason = "skipped", f"not installed: {', '.join(sorted(absent))}"
            elif step.estimate > rest:
                step.status, step.reason = "skipped", f"takes {step.estimate:.0f} s, {max(rest, 0):.0f} s are left"
            else:
                step.status = "running"
                save()
                print(f"\n=== {step.name}: python -m {' '.join(step.command)}", file=log, flush=True)
                try:
                    run_step(step, min(PATIENCE * step.estimate, rest), log)
                finally:
                    save()
            taken = "" if step.seconds is None else f", {step.seconds:.0f} s, exit status {step.exit_status}"
            print(f"{step.name:<15} {step.status}{taken}{step.reason and ': ' + step.reason}", flush=True)
    save(finished=True)


def main() -> None:
    arguments = parse_arguments(RunArguments)
    missing = {package for package in PACKAGES if not is_installed(package)}
    if arguments.preset == "full" and subprocess.run([sys.executable, "-c", QUANTIZE], capture_output=True).returncode:
        missing.add("bitsandbytes")
    print(json.dumps(get_machine()["versions"]), f"missing: {', '.join(sorted(missing)) or 'nothing'}", sep="\n")
    steps = get_steps(arguments, missing)
    if unknown := set(arguments.steps or ()).difference(step.name for step in steps):
        names = ", ".join(step.name for step in steps)
        raise ValueError(f"--steps are {names}, but got {', '.join(sorted(unknown))}.")
    run_steps([step for step in steps if step.name in (arguments.steps or step.name)], arguments, missing)
    print(f"Wrote {arguments.output}")


if __name__ == "__main__":
    run_command(main)  # SIGTERM stops the running step as Ctrl-C does
