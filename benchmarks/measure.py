# SPDX-License-Identifier: Apache-2.0
"""Options, timing side by side, peak memory, and the command that writes a record and draws its plot."""

import contextlib
import functools
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from modeling_llava_hr.utils import write_text


if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("torch", "torchvision", "transformers", "timm", "pillow", "peft", "trl", "bitsandbytes", "matplotlib")
T = TypeVar("T")
# Seconds of each counted round, by phase, by the name of what is measured; `None` if the GPU ran out of memory
Timings = dict[str, dict[str, list[float]] | None]


@dataclass
class OutputArguments:
    """Options of every command here."""

    output: str = HfArg(default=".cache/benchmarks", help="folder for the record and the plot")
    label: str | None = HfArg(default=None, help="appended to the record's name, for a second run with other options")
    records: str | None = HfArg(
        default=None, aliases=["--from"], help="measure nothing: draw the plot of the record in this folder"
    )
    plot: bool = HfArg(default=True, help="draw the plot")

    def get_name(self, name: str) -> str:
        """Name of the files of the benchmark `name`, without their extension."""
        return f"{name}-{self.label}" if self.label else name


@dataclass
class BenchmarkArguments(OutputArguments):
    """
    Options of what is measured. Device and dtype follow from the preset: a CPU and float32 (cpu), or a GPU
    (`CUDA_VISIBLE_DEVICES`) and bfloat16 (full). A CPU that only emulates bfloat16 takes float32 for every preset.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("cpu", "full")

    preset: str = HfArg(default="cpu", help="cpu (small shapes, minutes on two cores) or full (7B on one GPU)")
    repeats: int = HfArg(default=5, help="rounds that count; in each, everything that is compared runs once")
    warmup: int = HfArg(default=1, help="rounds before them")
    device: str = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self):
        if self.preset not in self.PRESETS:
            raise ValueError(f"--preset must be {' or '.join(self.PRESETS)}, but got {self.preset!r}.")
        self.device = "cuda" if self.preset == "full" else "cpu"
        in_bfloat16 = self.preset != "cpu" and (self.on_gpu or computes_bfloat16())
        self.dtype = "bfloat16" if in_bfloat16 else "float32"
        if self.on_gpu and not self.records and not torch.cuda.is_available():
            raise ValueError("--preset full needs a GPU, and there is none here. Use --preset cpu.")
        if self.repeats < 1 or self.warmup < 0:
            raise ValueError(f"--repeats must be at least 1 and --warmup 0, but got {self.repeats} and {self.warmup}.")

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def get_name(self, name: str) -> str:
        return super().get_name(f"{name}-{self.preset}")


def computes_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16. One that emulates it is about a hundred times as slow."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of some values, as `median`, `low`, `high`."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def ratio(ours: list[float] | None, theirs: list[float] | None) -> dict[str, float] | None:
    """Ratio of two timings, round by round, see [`spread`]; `None` if one of them is `None`."""
    if ours is None or theirs is None:
        return None
    return spread([one / other for one, other in zip(ours, theirs, strict=False)])


def get_phase(timings: Timings, phase: str = "seconds") -> dict[str, list[float]]:
    """The seconds of one phase, by name, of everything that has this phase."""
    return {name: phases[phase] for name, phases in timings.items() if phases and phase in phases}


def synchronize() -> None:
    """Waits for the GPU if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def unless_out_of_memory(function: Callable[[], T]) -> T | None:
    """The result of a function, or `None` if the GPU runs out of memory, which is then freed."""
    try:
        return function()
    except torch.OutOfMemoryError:
        pass
    free_memory()  # after the handler: its exception holds the function's tensors
    return None


def free_memory() -> None:
    """Returns unused cached memory to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def time_phase(function: Callable[[], Any], phase: str = "seconds") -> dict[str, float]:
    """Runs a function and returns its seconds as one phase, for [`compare`]."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return {phase: time.perf_counter() - start}


def compare(
    functions: dict[str, Callable[[], dict[str, float]]], arguments: BenchmarkArguments, description: str = "rounds"
) -> Iterator[Timings]:
    """
    Times functions side by side: all of them once per round, so that a machine that slows down for a while slows all
    of them down.

    Args:
        functions (`dict[str, Callable]`): Each returns the seconds of its phases, by the phase's name.
        arguments ([`BenchmarkArguments`]): How often.
        description (`str`): For the progress bar.

    Yields:
        `Timings`: The seconds so far, after each run that counts.
    """
    measured: Timings = {}
    rounds = range(-arguments.warmup, arguments.repeats)
    with tqdm(total=len(rounds) * len(functions), desc=description, unit="run") as bar:
        for number in rounds:
            for name, function in functions.items():
                phases = None if measured.get(name, {}) is None else unless_out_of_memory(function)
                bar.update()
                if phases is None:
                    measured[name] = None
                elif number >= 0:
                    timings = measured.setdefault(name, {phase: [] for phase in phases})
                    for phase, seconds in phases.items():
                        timings[phase].append(seconds)
                if number >= 0:
                    yield {key: measured[key] for key in functions if key in measured}


def added_gpu_bytes(function: Callable[[], Any]) -> int:
    """Peak of the GPU memory that a function allocates beyond what was allocated before, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


@functools.cache
def get_versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def get_machine() -> dict[str, Any]:
    """Processor, cores, threads, the GPU if one is in use, and versions."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    cpu = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", flags=re.MULTILINE)
    machine = {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count()}
    if torch.cuda.is_initialized():
        machine["gpu"] = torch.cuda.get_device_name()
    return {**machine, "threads": torch.get_num_threads(), "versions": get_versions()}


def make_target(
    name: str, measured: dict[str, float] | None, target: float, at_least: bool, applies: bool = True
) -> dict[str, Any]:
    """
    A target and the result.

    Args:
        name (`str`): What is measured.
        measured (`dict[str, float]`, *optional*): Median and quartiles, see [`spread`]; `None` if out of memory.
        target (`float`): Bound of the median.
        at_least (`bool`): Whether it is a lower bound, else an upper one.
        applies (`bool`): Whether it was set for this preset and machine; if not, `met` is `None`.
    """
    met = None
    if applies and measured is not None:
        met = measured["median"] >= target if at_least else measured["median"] <= target
    bound = "at least" if at_least else "at most"
    return {"name": name, "measured": measured, "target": f"{bound} {target:g}", "met": met}


def parse_arguments(cls: type[OutputArguments]) -> Any:
    """
    The options of the command line; a wrong one ends the program with a message. Errors while measuring keep their
    traceback, which the log of a rented machine may be all that is left of.
    """
    try:
        (arguments,) = HfArgumentParser(cls).parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"error: {error}")
    return arguments


def write_record(
    path: Path, name: str, arguments: OutputArguments, results: dict[str, Any], finished: bool = True
) -> None:
    """
    Writes or replaces a record atomically: command, machine, options and results.

    Args:
        path (`Path`): The file.
        name (`str`): Name of the benchmark, that of its module.
        arguments ([`OutputArguments`]): Its options.
        results (`dict`): Results, in JSON's types.
        finished (`bool`): Whether they are complete.
    """
    record = {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "finished": finished,
        "machine": get_machine(),
        "arguments": asdict(arguments),
        "results": results,
    }
    write_text(path, json.dumps(record, indent=2) + "\n")


def run_benchmark(
    name: str,
    cls: type[OutputArguments],
    run: Callable[[Any], Iterator[dict[str, Any]]],
    draw: Callable[["Figure", dict[str, Any], Any], None] | None = None,
    describe: Callable[[dict[str, Any], Any], str] | None = None,
) -> None:
    """
    The command of a benchmark: reads the options, measures, writes the record whenever a result was added, draws the
    plot (where matplotlib is installed) and prints the results.

    Args:
        name (`str`): Its name, that of its module.
        cls (`type`): Its options.
        run (`Callable`): Takes the options and yields all results so far, in JSON's types.
        draw (`Callable`, *optional*): Takes an empty figure, results and options, and draws the plot.
        describe (`Callable`, *optional*): Takes results and options, returns what is printed beside the targets.
    """
    arguments = parse_arguments(cls)
    path = Path(arguments.records or arguments.output) / f"{arguments.get_name(name)}.json"
    if arguments.records:
        record = json.loads(path.read_text(encoding="utf-8"))
        arguments, results = SimpleNamespace(**{**record["arguments"], "plot": True}), record["results"]
    else:
        for results in run(arguments):
            write_record(path, name, arguments, results, finished=False)
        write_record(path, name, arguments, results)
    if describe:
        print(describe(results, arguments))
    for target in results.get("targets", []):
        measured = f"{target['measured']['median']:.3g}" if target["measured"] else "not measured"
        print(f"{target['name']}: {measured} (target: {target['target']})")
    if draw and arguments.plot and is_installed("matplotlib"):
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        draw(figure, results, arguments)
        figure.savefig(path.with_suffix(".png"), dpi=120)
    elif draw:
        print("No plot: draw it with the same options and --from FOLDER where matplotlib is installed.")
    print(f"Wrote {path}")
