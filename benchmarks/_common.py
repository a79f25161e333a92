# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: options, timing side by side, peak memory, the command with its record."""

import contextlib
import functools
import gc
import importlib.metadata
import importlib.util
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
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg


if TYPE_CHECKING:
    from matplotlib.figure import Figure


PACKAGES = ("torch", "torchvision", "transformers", "timm", "pillow", "peft", "trl", "bitsandbytes", "matplotlib")


T = TypeVar("T")


@dataclass
class OutputArguments:
    """
    The options that every command here has.

    Args:
        output (`str`): Folder for the record and the plot.
        label (`str`, *optional*): Appended to the record's name, for a second run with other options.
        records (`str`, *optional*): `--from`: a folder with the record of an earlier run, on any machine. Its plot is
            drawn and nothing is measured.
        plot (`bool`): Whether to draw the plot of what is measured.
    """

    output: str = field(default=".cache/benchmarks", metadata={"help": "folder for the record and the plot"})
    label: str | None = field(default=None, metadata={"help": "appended to the record's name"})
    records: str | None = HfArg(default=None, aliases=["--from"], help="draw the plot of the record in this folder")
    plot: bool = field(default=True, metadata={"help": "draw the plot"})

    def get_name(self, name: str) -> str:
        """Name of the files of the benchmark `name`, without their extension."""
        return f"{name}-{self.label}" if self.label else name


@dataclass
class BenchmarkArguments(OutputArguments):
    """
    Options of what is measured. Which of several GPUs, `CUDA_VISIBLE_DEVICES` says.

    Args:
        preset (`str`): `"cpu"` (small shapes, minutes on two cores) or `"full"` (7B, one GPU). Weights are random:
            speed does not depend on them. [`benchmarks.inference`] also has `"7b-cpu"`.
        repeats (`int`): Rounds that count; in each, everything that is compared runs once.
        warmup (`int`): Rounds before them.
        device (`str`): `"cuda"` with the full preset, else `"cpu"`.
        dtype (`str`): Of weights and activations: `"float32"` with the cpu preset, else `"bfloat16"`.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("cpu", "full")

    preset: str = field(default="cpu", metadata={"help": "cpu or full"})
    repeats: int = field(default=5, metadata={"help": "rounds that count"})
    warmup: int = field(default=1, metadata={"help": "rounds before them"})
    device: str = field(init=False)
    dtype: str = field(init=False)

    def __post_init__(self):
        if self.preset not in self.PRESETS:
            raise ValueError(f"--preset must be {' or '.join(self.PRESETS)}, but got {self.preset!r}.")
        self.device = "cuda" if self.preset == "full" else "cpu"
        self.dtype = "float32" if self.preset == "cpu" else "bfloat16"
        if self.on_gpu and not self.records and not torch.cuda.is_available():
            raise ValueError("--preset full needs a GPU, and there is none here. Use --preset cpu.")
        if self.repeats < 1 or self.warmup < 0:
            raise ValueError(f"--repeats must be at least 1 and --warmup 0, but got {self.repeats} and {self.warmup}.")

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]

    def get_name(self, name: str) -> str:
        return super().get_name(f"{name}-{self.preset}")


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
    """
    How many times as long one took, in each round that both have been measured in, see [`spread`]; `None` if there is
    none.
    """
    if mine is None or its is None:
        return None
    return spread([one / other for one, other in zip(mine.seconds, its.seconds, strict=False)])


def synchronize() -> None:
    """Waits for the GPU if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def unless_out_of_memory(function: Callable[[], T]) -> T | None:
    """What a function returns, or `None` if the GPU runs out of memory; the memory is free again then."""
    try:
        return function()
    except torch.OutOfMemoryError:
        pass
    gc.collect()  # after the handler: its exception holds the function's tensors
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
    Times functions by name side by side, see [`compare_phases`]; without those that ran out of the GPU's memory.
    """
    phases = {name: functools.partial(time_phase, function) for name, function in functions.items()}
    *_, timings = compare_phases(phases, arguments, description)
    return {name: phases["seconds"] for name, phases in timings.items() if phases}


def compare_phases(
    functions: dict[str, Callable[[], dict[str, float]]], arguments: BenchmarkArguments, description: str = "rounds"
) -> Iterator[dict[str, dict[str, Timing] | None]]:
    """
    Times functions side by side: all of them once per round, so that a machine that slows down for a while slows all
    of them down.

    Args:
        functions (`dict[str, Callable]`): Each returns the seconds that its phases took, by the phase's name.
        arguments ([`BenchmarkArguments`]): How often.
        description (`str`): For the progress bar.

    Yields:
        `dict[str, dict[str, Timing] | None]`: After each run that counts, a [`Timing`] of each phase so far by the
        function's name, or `None` if it ran out of the GPU's memory.
    """
    measured: dict[str, dict[str, Timing] | None] = {}
    rounds = range(-arguments.warmup, arguments.repeats)
    with tqdm(total=len(rounds) * len(functions), desc=description, unit="run") as bar:
        for number in rounds:
            for name, function in functions.items():
                phases = None if measured.get(name, {}) is None else unless_out_of_memory(function)
                bar.update()
                if phases is None:
                    measured[name] = None
                elif number >= 0:
                    timings = measured.setdefault(name, {phase: Timing([]) for phase in phases})
                    for phase, seconds in phases.items():
                        timings[phase].seconds.append(seconds)
                if number >= 0:
                    yield measured
    yield measured


def peak_resident_bytes() -> int:
    """Peak resident memory of this process so far (CPU), in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _report_peak(pipe, function: Callable, args: tuple) -> None:
    before = peak_resident_bytes()
    result = function(*args)
    pipe.send((result, peak_resident_bytes() - before))


def in_fresh_process(function: Callable, *args) -> tuple[Any, int]:
    """
    Runs a function in a new process, forked from one that has only imported the libraries.

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
    return {**machine, "versions": {"python": platform.python_version(), **get_versions()}}


@functools.cache
def get_versions() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return []


def make_target(
    name: str, measured: dict[str, float] | None, target: float, at_least: bool, applies: bool
) -> dict[str, Any]:
    """
    A target and the result.

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
    """The options of the command line; a wrong one ends the program with a message."""
    try:
        (arguments,) = HfArgumentParser(cls).parse_args_into_dataclasses()
    except ValueError as error:
        sys.exit(f"error: {error}")
    return arguments


def write_record(
    path: Path, name: str, arguments: OutputArguments, results: dict[str, Any], finished: bool = True
) -> None:
    """
    Replaces a record atomically: command, machine, options and results.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.incomplete")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def run_benchmark(
    name: str,
    cls: type[OutputArguments],
    run: Callable[[Any], Iterator[dict[str, Any]]],
    draw: Callable[["Figure", dict[str, Any], Any], None],
    describe: Callable[[dict[str, Any], Any], str] | None = None,
) -> None:
    """
    The command of a benchmark: reads the options, measures, writes the record whenever a result was added, draws the
    plot (where matplotlib is installed) and prints the results.

    Args:
        name (`str`): Its name, that of its module.
        cls (`type`): Its options.
        run (`Callable`): Takes the options and yields all results so far, in JSON's types.
        draw (`Callable`): Takes an empty figure, results and options, and draws the plot.
        describe (`Callable`, *optional*): Takes results and options, returns what is printed beside the targets.
    """
    arguments = parse_arguments(cls)
    if arguments.records:
        path = Path(arguments.records) / f"{arguments.get_name(name)}.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        arguments, results = SimpleNamespace(**{**record["arguments"], "plot": True}), record["results"]
    else:
        path = Path(arguments.output) / f"{arguments.get_name(name)}.json"
        for results in run(arguments):
            write_record(path, name, arguments, results, finished=False)
        write_record(path, name, arguments, results)
    if describe:
        print(describe(results, arguments))
    for target in results.get("targets", []):
        measured = f"{target['measured']['median']:.3g}" if target["measured"] else "not measured"
        print(f"{target['name']}: {measured} (target: {target['target']})")
    if arguments.plot and is_installed("matplotlib"):
        from matplotlib.figure import Figure

        figure = Figure(layout="constrained")
        draw(figure, results, arguments)
        figure.savefig(path.with_suffix(".png"), dpi=120)
    else:
        print("No plot: draw it with the same options and --from FOLDER where matplotlib is installed.")
    print(f"Wrote {path}")
