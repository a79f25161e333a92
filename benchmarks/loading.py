# SPDX-License-Identifier: Apache-2.0
"""
Importing and loading: LLaVA-HR against transformers' LLaVA with the same ViT and language model.

    python -m benchmarks.loading                  # a model of about 0.8 GB, into a CPU's memory
    python -m benchmarks.loading --preset full    # 7B, onto a GPU

Imports and loads run in processes of their own. Checkpoints are bfloat16 with random weights in a temporary folder,
just written, so that the file cache has them; 4-bit models are quantized while they are loaded. On a CPU bfloat16
weights stay in the file, mapped into memory, until they are needed: the time to first read all of them is measured
too, and the peak of the memory includes them.
"""

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForImageTextToText

from ._common import (
    BenchmarkArguments,
    Timing,
    added_gpu_bytes,
    compare,
    compare_phases,
    in_fresh_process,
    make_target,
    ratio,
    run_benchmark,
    spread,
    synchronize,
)
from ._models import SHAPES, Shapes, get_weight_bytes, make_4bit_config, make_contender


if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMPORTS = {
    "llava-hr": "from modeling_llava_hr import LlavaHrForConditionalGeneration, LlavaHrProcessor",
    "llava": "from transformers import LlavaForConditionalGeneration, AutoProcessor",
}
# The cpu preset's language model, wider and with more layers: what loading takes whatever the model's size, about
# 30 MB, is then small beside the weights
WIDE_TEXT = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8, "num_attention_heads": 16}


@dataclass
class LoadingArguments(BenchmarkArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        formats (`list[str]`): `"bf16"` (as the checkpoint is) and `"4bit"` (NF4, the language model's layers).
        small (`bool`): Takes the small language model of the cpu preset's other benchmarks, for a quick try.
    """

    formats: list[str] = field(default_factory=lambda: ["bf16", "4bit"], metadata={"help": "bf16, 4bit"})
    small: bool = field(default=False, metadata={"help": "a small language model, for a quick try"})

    def __post_init__(self):
        super().__post_init__()
        if not self.formats or not {"bf16", "4bit"}.issuperset(self.formats):
            raise ValueError(f"--formats are bf16 and 4bit, but got {self.formats}.")

    @property
    def shapes(self) -> Shapes:
        shapes = SHAPES[self.preset]
        if self.preset == "full" or self.small:
            return shapes
        return dataclasses.replace(shapes, text={**shapes.text, **WIDE_TEXT})


def run_python(code: str) -> None:
    """Runs code in a new interpreter; raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-c", code], check=True)


def get_anonymous_bytes() -> int | None:
    """Memory of this process that is no mapped file, in bytes; `None` where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


def load(folder: str, weights: str, device: str) -> dict[str, Any]:
    """
    Loads a model, to be called in a fresh process.

    Args:
        folder (`str`): Its checkpoint.
        weights (`str`): `"bf16"` or `"4bit"`.
        device (`str`): Where to.

    Returns:
        `dict`: `load` and `touch` in seconds, `weight_bytes`, `anonymous_bytes` (by how much it raised the memory
        that is no mapped file) and `gpu_bytes` (peak, `None` on a CPU).
    """
    quantization = make_4bit_config(torch.bfloat16) if weights == "4bit" else None
    kwargs = {"quantization_config": quantization, "device_map": device}
    anonymous, seconds, models = get_anonymous_bytes(), {}, []

    def from_pretrained() -> None:
        start = time.perf_counter()
        models.append(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, **kwargs))
        synchronize()
        seconds["load"] = time.perf_counter() - start

    gpu_bytes = added_gpu_bytes(from_pretrained) if device == "cuda" else from_pretrained()
    start = time.perf_counter()
    for parameter in models[0].parameters():
        parameter.detach().view(torch.uint8).max()  # reads each byte, without a copy
    synchronize()
    seconds["touch"] = time.perf_counter() - start
    return {
        **seconds,
        "weight_bytes": get_weight_bytes(models[0]),
        "anonymous_bytes": None if anonymous is None else get_anonymous_bytes() - anonymous,
        "gpu_bytes": gpu_bytes,
    }


def save_models(arguments: LoadingArguments, folder: Path) -> None:
    """Writes `FOLDER/llava-hr` and `FOLDER/llava`, one after the other in memory."""
    for name, contender in (("llava-hr", "llava-hr-1024"), ("llava", "llava-1.5-336")):
        made = make_contender(arguments.shapes, contender, arguments.device, torch.bfloat16)
        made.model.save_pretrained(folder / name)
        del made


def measure_loading(folder: Path, arguments: LoadingArguments) -> dict[str, Any]:
    """
    Loads the models in `folder` in turn.

    Returns:
        `dict`: For each model and format, like `"llava-hr, bf16"`: `seconds` of `load` and `touch`, `weight_bytes`,
        `peak_bytes` (by how much the resident memory rose at most, or the GPU's), its ratio `peak_over_weights`, and
        `anonymous_bytes`.
    """
    runs: dict[str, list[dict[str, Any]]] = {}

    def measure(name: str, weights: str) -> dict[str, float]:
        result, raised = in_fresh_process(load, str(folder / name), weights, arguments.device)
        gpu_bytes = result["gpu_bytes"]
        runs.setdefault(f"{name}, {weights}", []).append(
            {**result, "peak_bytes": raised if gpu_bytes is None else gpu_bytes}
        )
        return {phase: result[phase] for phase in ("load", "touch")}

    functions = {
        f"{name}, {weights}": partial(measure, name, weights) for weights in arguments.formats for name in IMPORTS
    }
    *_, timings = compare_phases(functions, arguments, "loading")
    entries = {}
    for name, results in runs.items():
        counted = results[arguments.warmup :]
        entries[name] = {
            "seconds": {phase: timing.to_dict() for phase, timing in timings[name].items()},
            "weight_bytes": counted[0]["weight_bytes"],
            "peak_bytes": spread([run["peak_bytes"] for run in counted]),
            "peak_over_weights": spread([run["peak_bytes"] / run["weight_bytes"] for run in counted]),
            "anonymous_bytes": None
            if counted[0]["anonymous_bytes"] is None
            else spread([run["anonymous_bytes"] for run in counted]),
        }
    return entries


def find_targets(
    imports: dict[str, Timing], loading: dict[str, Any], arguments: LoadingArguments
) -> list[dict[str, Any]]:
    """What the project wants, beside what came out; see [`make_target`]."""
    slower = ratio(imports["llava-hr"], imports["llava"])
    targets = [make_target("time to import over that of transformers' LLaVA", slower, 1.2, False, True)]
    if "bf16" in arguments.formats:
        peak = loading["llava-hr, bf16"]["peak_over_weights"]
        targets.append(make_target("peak memory of loading over the weights", peak, 1.05, False, not arguments.small))
    return targets


def draw(figure: "Figure", results: dict[str, Any], arguments: LoadingArguments) -> None:
    """Seconds to import and to load, and memory against the weights."""
    figure.set_size_inches(13, 4)
    left, middle, right = figure.subplots(1, 3)
    left.bar(list(results["imports"]), [entry["median"] for entry in results["imports"].values()])
    left.set(title="seconds to import")
    loading = results["loading"]
    names = list(loading)
    load_seconds, touch_seconds = (
        [entry["seconds"][phase]["median"] for entry in loading.values()] for phase in ("load", "touch")
    )
    middle.barh(names, load_seconds, label="from_pretrained")
    middle.barh(names, touch_seconds, left=load_seconds, label="first reading of all weights")
    middle.set(title="seconds to load")
    middle.legend()
    right.barh(names, [entry["peak_bytes"]["median"] / 1e9 for entry in loading.values()], label="peak")
    right.barh(names, [entry["weight_bytes"] / 1e9 for entry in loading.values()], height=0.4, label="weights")
    right.set(title="memory in GB")
    right.legend()


def run(arguments: LoadingArguments) -> Iterator[dict[str, Any]]:
    """Measures importing and then loading; yields the results after each."""
    imports = compare({name: partial(run_python, code) for name, code in IMPORTS.items()}, arguments, "imports")
    results = {"imports": {name: timing.to_dict() for name, timing in imports.items()}}
    yield results
    with tempfile.TemporaryDirectory() as folder:
        save_models(arguments, Path(folder))
        results["loading"] = measure_loading(Path(folder), arguments)
    results["targets"] = find_targets(imports, results["loading"], arguments)
    yield results


def main() -> None:
    run_benchmark("loading", LoadingArguments, run, draw)


if __name__ == "__main__":
    main()
