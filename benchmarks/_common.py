# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: options, timing side by side, peak memory, the command with its record."""

import functools
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import HfArgumentParser


PACKAGES = ("torch", "torchvision", "transformers", "timm", "pillow", "bitsandbytes")


T = TypeVar("T")


@dataclass
class OutputArguments:
    """
    The option that every command here has.

    Args:
        output (`str`): Folder for the record and the plot.
    """

    output: str = field(default=".cache/benchmarks", metadata={"help": "folder for the record and the plot"})

    def get_path(self, name: str) -> Path:
        """The record of the benchmark `name`; the plot lies beside it."""
        return Path(self.output) / f"{name}.json"


@dataclass
class BenchmarkArguments(OutputArguments):
    """
    Options of what is measured.

    Args:
        preset (`str`): `"cpu"` (small shapes, minutes on two cores) or `"full"` (7B, one GPU). Weights are random:
            speed does not depend on them.
        repeats (`int`): Rounds that count; in each, everything that is compared runs once.
        warmup (`int`): Rounds before them.
        device (`str`, *optional*): `"cpu"` or `"cuda"`; that of the preset by default.
    """

    preset: str = field(default="cpu", metadata={"help": "cpu or full"})
    repeats: int = field(default=5, metadata={"help": "rounds that count"})
    warmup: int = field(default=1, metadata={"help": "rounds before them"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; the preset's by default"})

    def __post_init__(self):
        if self.preset not in ("cpu", "full"):
            raise ValueError(f"--preset must be cpu or full, but got {self.preset!r}.")
        self.device = self.device or ("cuda" if self.preset == "full" else "cpu")
        if self.device not in ("cpu", "cuda"):
            hint = "CUDA_VISIBLE_DEVICES chooses one of several GPUs."
            raise ValueError(f"--device must be cpu or cuda, but got {self.device!r}. {hint}")
        if self.preset == "full" and self.device == "cpu":
            raise ValueError("--preset full must run with --device cuda, but got --device cpu. Use --preset cpu.")
        if self.on_gpu and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no GPU here. Use --preset cpu.")
        if self.repeats < 1 or self.warmup < 0:
            raise ValueError(f"--repeats must be at least 1 and --warmup 0, but got {self.repeats} and {self.warmup}.")

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def get_path(self, name: str) -> Path:
        """The record of the benchmark `name` with this preset; the plot lies beside it."""
        return super().get_path(f"{name}-{self.preset}")


@dataclass
class ModelArguments(BenchmarkArguments):
    """
    Options of what is measured with models in memory.

    Args:
        dtype (`str`, *optional*): Of weights and activations: `"float32"` (cpu) or `"bfloat16"` (cuda) by default.
    """

    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16"})

    def __post_init__(self):
        super().__post_init__()
        self.dtype = self.dtype or ("bfloat16" if self.on_gpu else "float32")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, but got {self.dtype!r}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


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

    def to_dict(self) -> dict[str, float]:
        """`median`, `low` and `high` (quartiles), in seconds."""
        return spread(self.seconds)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of some values, as `median`, `low`, `high`."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def ratio(mine: Timing | None, its: Timing | None) -> dict[str, float] | None:
    """How many times as long one took, round by round, see [`spread`]; `None` if one of them is not there."""
    if mine is None or its is None:
        return None
    return spread([one / other for one, other in zip(mine.seconds, its.seconds, strict=True)])


def synchronize() -> None:
    """Waits until the GPU, if one is in use, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def unless_out_of_memory(function: Callable[[], T]) -> T | None:
    """What a function returns, or `None` if the GPU's memory does not suffice for it; it is free again then."""
    try:
        return function()
    except torch.OutOfMemoryError:
        pass
    gc.collect()  # out of the handler, whose exception holds the function's tensors
    torch.cuda.empty_cache()
    return None


def time_phase(function: Callable[[], Any]) -> dict[str, float]:
    """The one phase, `seconds`, of a function that does not measure itself, for [`compare_phases`]."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return {"seconds": time.perf_counter() - start}


def compare(
    functions: dict[str, Callable[[], Any]], arguments: BenchmarkArguments, description: str = "rounds"
) -> dict[str, Timing]:
    """
    Times functions side by side: all of them once in each round, so that a machine that slows down for a while slows
    all of them down.

    Args:
        functions (`dict[str, Callable]`): What to time, by name.
        arguments ([`BenchmarkArguments`]): How often.
        description (`str`): For the progress bar.

    Returns:
        `dict[str, Timing]`: By the same names, without those that the GPU's memory did not suffice for.
    """
    phases = {name: functools.partial(time_phase, function) for name, function in functions.items()}
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
        `dict[str, dict[str, Timing]]`: For each function's name, a [`Timing`] for each phase; without those that the
        GPU's memory did not suffice for.
    """
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in functions}
    rounds = range(-arguments.warmup, arguments.repeats)
    with tqdm(total=len(rounds) * len(functions), desc=description, unit="run") as bar:
        for number in rounds:
            for name in list(seconds):
                phases = unless_out_of_memory(functions[name])
                if phases is None:
                    del seconds[name]
                elif number >= 0:
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


def added_gpu_bytes(function: Callable[[], Any]) -> int:
    """By how much a function raises the memory that torch has allocated on the GPU, at its peak, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def get_machine() -> dict[str, Any]:
    """Processor, cores, threads, the GPU if one is in use, and versions: what a figure depends on."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    machine = {"cpu": model, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_initialized():
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


def make_target(
    name: str, measured: dict[str, float] | None, target: float, at_least: bool, applies: bool
) -> dict[str, Any]:
    """
    A target beside what came out.

    Args:
        name (`str`): What is measured.
        measured (`dict[str, float]`, *optional*): Median and quartiles, see [`spread`]; `None` if memory did not
            suffice.
        target (`float`): What the median should be.
        at_least (`bool`): Whether the target is a lower bound, else an upper one.
        applies (`bool`): Whether it was set for this preset and machine; if not, `met` is `None`.
    """
    met = None
    if applies and measured is not None:
        met = measured["median"] >= target if at_least else measured["median"] <= target
    bound = "at least" if at_least else "at most"
    return {"name": name, "measured": measured, "target": f"{bound} {target:g}", "met": met}


def parse_arguments(cls: type[OutputArguments]) -> OutputArguments:
    """The options of the command line; what is wrong with them ends the program with a sentence."""
    try:
        (arguments,) = HfArgumentParser(cls).parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"error: {error}")
    return arguments


def write_record(
    path: Path, name: str, arguments: OutputArguments, results: dict[str, Any], finished: bool = True
) -> None:
    """
    Writes a record at once, in place of one that is there: command, machine, options and results.

    Args:
        path (`Path`): The file.
        name (`str`): Name of the benchmark, that of its module.
        arguments ([`OutputArguments`]): Its options.
        results (`dict`): What came out, in JSON's types.
        finished (`bool`): Whether that is all.
    """
    record = {
        "command": " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "finished": finished,
        "machine": get_machine(),
        "arguments": asdict(arguments),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.incomplete")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def run_benchmark(
    name: str,
    cls: type[OutputArguments],
    run: Callable[[Any], Iterator[dict[str, Any]]],
    draw: Callable[[dict[str, Any], Any], Figure],
    describe: Callable[[dict[str, Any], Any], str] | None = None,
) -> None:
    """
    The command of a benchmark: reads the options, measures, writes the record whenever something was added, draws the
    plot beside it and prints what came out.

    Args:
        name (`str`): Its name, that of its module.
        cls (`type`): Its options.
        run (`Callable`): Takes the options and yields all results so far, in JSON's types.
        draw (`Callable`): Takes results and options, returns the plot.
        describe (`Callable`, *optional*): Takes the same, returns what is printed beside the targets.
    """
    arguments = parse_arguments(cls)
    path = arguments.get_path(name)
    for results in run(arguments):
        write_record(path, name, arguments, results, finished=False)
    write_record(path, name, arguments, results)
    draw(results, arguments).savefig(path.with_suffix(".png"), dpi=120)
    if describe:
        print(describe(results, arguments))
    for target in results.get("targets", []):
        measured = f"{target['measured']['median']:.3g}" if target["measured"] else "not measured"
        print(f"{target['name']}: {measured} (target: {target['target']})")
    print(f"Wrote {path}")
