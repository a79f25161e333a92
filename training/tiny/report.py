# SPDX-License-Identifier: Apache-2.0
"""
Compares trainings of [`training.tiny.train`] by what they left behind:

    python -m training.tiny.report --runs .cache/train-tiny .cache/train-tiny-blind --output docs/results

draws `accuracy.png`, `learning_curves.png` and `gates.png` and writes `results.json`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from transformers import HfArgumentParser

from modeling_llava_hr.utils import run_command

from ..trainer import list_checkpoints


@dataclass
class ReportArguments:
    """Options of the command."""

    runs: list[str] = field(metadata={"help": "outputs of finished trainings"})
    output: str = field(metadata={"help": "folder for images and results.json"})


def read_run(folder: Path) -> dict:
    """
    What a training left in its output: `accuracy` and `mean_gates` as in `evaluation.json`, `seconds` of each step,
    and `losses`: for each run of a stage, its name, and steps and losses.

    Raises:
        ValueError: If the training is not finished.
    """
    if not (folder / "evaluation.json").exists():
        raise ValueError(f"`runs`: {folder} has no evaluation.json. Finish it with `python -m training.tiny.train`.")
    evaluation = json.loads((folder / "evaluation.json").read_text())
    losses = {}
    for stage in sorted(folder.glob("[0-9]*-*"), key=lambda path: int(path.name.split("-")[0])):
        newest = list_checkpoints(stage)[0]
        history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
        losses[stage.name] = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    lines = (folder / "seconds.jsonl").read_text().splitlines()
    seconds = {entry["step"]: entry["seconds"] for entry in map(json.loads, lines)}
    return {**{name: evaluation[name] for name in ("accuracy", "mean_gates")}, "seconds": seconds, "losses": losses}


def draw_accuracy(runs: dict[str, dict], path: Path) -> None:
    """Bars of fine and coarse accuracy with their standard errors, a group for each run."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for index, kind in enumerate(("fine", "coarse")):
        results = [run["accuracy"][kind] for run in runs.values()]
        places = [number + 0.4 * index - 0.2 for number in range(len(runs))]
        bars = axes.bar(
            places,
            [100 * result["accuracy"] for result in results],
            yerr=[100 * result["standard_error"] for result in results],
            width=0.38,
            label=f"{kind} questions",
        )
        axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.set(ylabel="exact answers, %", ylim=(0, 112), xticks=range(len(runs)), xticklabels=runs)
    axes.legend(loc="upper right", ncols=2)
    figure.savefig(path, dpi=120)


def draw_losses(runs: dict[str, dict], path: Path) -> None:
    """Loss over steps, one panel for each run of a stage, one line for each training."""
    stages = list(next(iter(runs.values()))["losses"])
    figure = Figure(figsize=(3.2 * len(stages), 3), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False, sharey=True)
    for panel, stage in zip(panels[0], stages, strict=True):
        for name, run in runs.items():
            panel.plot(*zip(*run["losses"].get(stage, [(0, float("nan"))]), strict=True), label=name, linewidth=1)
        panel.set(title=stage, xlabel="step", yscale="log")
    panels[0][0].set_ylabel("loss of the answers")
    panels[0][-1].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_gates(run: dict, path: Path) -> None:
    """Mean gate of each MR-Adapter by kind of question."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.subplots()
    for index, (kind, gates) in enumerate(sorted(run["mean_gates"].items())):
        axes.bar([number + 0.4 * index - 0.2 for number in range(len(gates))], gates, width=0.38, label=kind)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylabel="mean gate", xticks=range(len(gates)), xticklabels=[f"adapter {n + 1}" for n in range(len(gates))])
    axes.legend(title="questions")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draws and writes everything, and prints a row of a table for each training."""
    (arguments,) = HfArgumentParser(ReportArguments).parse_args_into_dataclasses()
    runs = {Path(folder).name: read_run(Path(folder)) for folder in arguments.runs}
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    draw_accuracy(runs, output / "accuracy.png")
    draw_losses(runs, output / "learning_curves.png")
    draw_gates(next(iter(runs.values())), output / "gates.png")
    kept = {name: {key: run[key] for key in ("accuracy", "mean_gates", "seconds")} for name, run in runs.items()}
    (output / "results.json").write_text(json.dumps(kept, indent=2) + "\n")
    for name, run in runs.items():
        figures = [run["accuracy"][kind] for kind in ("fine", "coarse")]
        print(
            f"| {name}", *(f"{f['accuracy']:.1%} ± {f['standard_error']:.1%}" for f in figures), sep=" | ", end=" |\n"
        )


if __name__ == "__main__":
    run_command(main)
