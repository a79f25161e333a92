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
"""What the benchmarks share: options, timing side by side, peak memory, the record of a run."""

import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import HfArgumentParser


PACKAGES = ("torch", "torchvision", "transformers", "timm", "pillow", "bitsandbytes")


@dataclass
class BenchmarkArguments:
    """
    Options that every benchmark has.

    Args:
        preset (`str`): `"cpu"` (small shapes, minutes on two cores) or `"full"` (7B, one GPU). Weights are random:
            speed does not depend on them.
        output (`str`): Folder for the record and the plot.
        repeats (`int`): Rounds that count; in each, everything that is compared runs once.
        warmup (`int`): Rounds before them.
        device (`str`, *optional*): `"cuda"` with the full preset and `"cpu"` with the other one by default.
    """

    preset: str = field(default="cpu", metadata={"help": "cpu or full"})
    output: str = field(default=".cache/benchmarks", metadata={"help": "folder for the record and the plot"})
    repeats: int = field(default=5, metadata={"help": "rounds that count"})
    warmup: int = field(default=1, metadata={"help": "rounds before them"})
    device: str | None = field(default=None, metadata={"help": "where to run; the preset's by default"})

    def __post_init__(self):
        if self.preset not in ("cpu", "full"):
            raise ValueError(f"--preset must be cpu or full, but got {self.preset!r}.")
        self.device = self.device or ("cpu" if self.preset == "cpu" else "cuda")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: there is no GPU here. Use --preset cpu.")
        if self.repeats < 1 or self.warmup < 0:
            raise ValueError(f"--repeats must be at least 1 and --warmup 0, but got {self.repeats} and {self.warmup}.")


@dataclass(frozen=True)
class Timing:
    """
    Durations of one thing in the rounds of [`compare`].

    Args:
        seconds (`list[float]`): One duration for each round.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: "Timing") -> dict[str, float]:
        """How many times as long as `other`, round by round: `median`, `low` and `high` (quartiles)."""
        return spread([mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)])

    def to_dict(self) -> dict[str, float]:
        """`median`, `low` and `high` (quartiles), in seconds."""
        return spread(self.seconds)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of some values, as `median`, `low`, `high`."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def synchronize(device: str) -> None:
    """Waits until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def time_phase(function: Callable[[], Any], device: str) -> dict[str, float]:
    """The one phase, `seconds`, of a function that does not measure itself, for [`compare_phases`]."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return {"seconds": time.perf_counter() - start}


def compare(
    functions: dict[str, Callable[[], Any]], arguments: BenchmarkArguments, description: str = "rounds"
) -> dict[str, Timing]:
    """
    Times functions side by side: all of them once in each round, so that a machine that slows down for a while slows
    all of them down.

    Args:
        functions (`dict[str, Callable]`): What to time, by name.
        arguments ([`BenchmarkArguments`]): How often, and on which device.
        description (`str`): For the progress bar.

    Returns:
        `dict[str, Timing]`: By the same names.
    """
    phases = {name: functools.partial(time_phase, function, arguments.device) for name, function in functions.items()}
    return {name: timings["seconds"] for name, timings in compare_phases(phases, arguments, description).items()}


def compare_phases(
    functions: dict[str, Callable[[], dict[str, float]]], arguments: BenchmarkArguments, description: str = "rounds"
) -> dict[str, dict[str, Timing]]:
    """
    Like [`compare`], for functions that measure themselves.

    Args:
        functions (`dict[str, Callable]`): Each returns the seconds that its phases took, by the phase's name.
        arguments ([`BenchmarkArguments`]): How often.
        description (`str`): For the progress bar.

    Returns:
        `dict[str, dict[str, Timing]]`: For each function's name, a [`Timing`] for each phase.
    """
    seconds = {name: [] for name in functions}
    rounds = range(-arguments.warmup, arguments.repeats)
    with tqdm(total=len(rounds) * len(functions), desc=description, unit="run") as bar:
        for number in rounds:
            for name, function in functions.items():
                phases = function()
                if number >= 0:
                    seconds[name].append(phases)
                bar.update()
    return {
        name: {phase: Timing([phases[phase] for phases in measured]) for phase in measured[0]}
        for name, measured in seconds.items()
    }


def peak_resident_bytes() -> int:
    """The most memory that this process has had so far (CPU, resident), in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report_peak(pipe, function: Callable, args: tuple) -> None:
    before = peak_resident_bytes()
    result = function(*args)
    pipe.send((result, peak_resident_bytes() - before))


def in_fresh_process(function: Callable, *args) -> tuple[Any, int]:
    """
    Runs a function in a new process, forked from one that has the libraries imported and has done nothing else.

    Args:
        function (`Callable`): A function of a module's top level.
        args: Its arguments.

    Returns:
        `tuple`: What it returned, and by how many bytes it raised the process's peak memory (CPU, resident).

    Raises:
        RuntimeError: If the process ended without a result.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks._models"])  # torch, transformers and the model, for every benchmark
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}, see above.") from None
    finally:
        process.join()


def peak_gpu_bytes(function: Callable[[], Any]) -> int:
    """Peak of the memory that torch allocates on the GPU while a function runs, in bytes, what was there included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def get_machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, GPU and versions: what a figure depends on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    machine = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**machine, "versions": versions}


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return []


def write_record(name: str, arguments: BenchmarkArguments, results: dict[str, Any]) -> Path:
    """
    Writes `OUTPUT/NAME-PRESET.json`: the command, the machine, the options and the results.

    Args:
        name (`str`): Name of the benchmark, that of its module.
        arguments ([`BenchmarkArguments`]): Its options.
        results (`dict`): What came out, in JSON's types.

    Returns:
        `Path`: The file. [`plot_path`] is beside it.
    """
    path = Path(arguments.output) / f"{name}-{arguments.preset}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": get_machine(arguments.device),
        "arguments": asdict(arguments),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"Wrote {path}")
    return path


def make_target(name: str, measured: dict[str, float], target: float, at_least: bool, applies: bool) -> dict[str, Any]:
    """
    A target beside what came out.

    Args:
        name (`str`): What is measured.
        measured (`dict[str, float]`): Median and quartiles, see [`spread`].
        target (`float`): What the median should be.
        at_least (`bool`): Whether the target is a lower bound, else an upper one.
        applies (`bool`): Whether it was set for this preset and machine; if not, `met` is `None`.
    """
    met = measured["median"] >= target if at_least else measured["median"] <= target
    bound = "at least" if at_least else "at most"
    return {"name": name, "measured": measured, "target": f"{bound} {target:g}", "met": met if applies else None}


def plot_path(name: str, arguments: BenchmarkArguments) -> Path:
    """Where the plot of a benchmark goes: beside its record."""
    return Path(arguments.output) / f"{name}-{arguments.preset}.png"


def parse_arguments(cls: type[BenchmarkArguments]) -> BenchmarkArguments:
    """The options of the command line; what is wrong with them ends the program with a sentence."""
    try:
        (arguments,) = HfArgumentParser(cls).parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"error: {error}")
    return arguments
