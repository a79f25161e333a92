# SPDX-License-Identifier: Apache-2.0
"""The run of all benchmarks: its budget, and steps that fail, hang or lack a package."""

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure, run
from benchmarks.run import RunArguments, Step


ROOT = Path(__file__).parents[2]
CODE = {
    "works": "print('it works')",
    "fails": "raise SystemExit(3)",
    # the child that it waits for has to go as well
    "hangs": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
    "out_of_memory": "import torch; raise torch.OutOfMemoryError('CUDA out of memory.')",
}


@pytest.fixture
def do(tmp_path, monkeypatch):
    """Runs steps (name, estimate, needs) whose commands are the modules of `CODE`; returns the table and the log."""
    for name, code in CODE.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def do(minutes: float, *steps: tuple, missing: set[str] = frozenset()) -> tuple[list[dict], str]:
        output = tmp_path / "output"
        steps = [Step(name, [name], *rest) for name, *rest in steps]
        run.run_steps(steps, RunArguments(output=str(output), minutes=minutes), missing)
        record = json.loads((output / "steps.json").read_text())
        assert record["finished"] and {path.name for path in output.iterdir()} == {"steps.json", "log.txt"}
        return record["results"]["steps"], (output / "log.txt").read_text()

    return do


def test_the_next_step_runs_after_one_that_fails_or_lacks_a_package(do, capsys):
    steps = [("fails", 30), ("out_of_memory", 30), ("works", 30, ("nothing", "trl")), ("works", 30)]
    steps, log = do(2, *steps, missing={"trl", "peft"})
    assert [step["status"] for step in steps] == ["failed", "failed", "skipped", "done"]
    assert [step["exit_status"] for step in steps] == [3, 1, None, 0]
    assert steps[2]["reason"] == "not installed: trl" and all(step["seconds"] > 0 for step in steps[:2])
    assert "OutOfMemoryError: CUDA out of memory." in log and log.endswith("=== works: python -m works\nit works\n")
    assert "works           skipped: not installed: trl" in capsys.readouterr().out


def test_no_step_starts_that_cannot_finish(do):
    steps, log = do(0.5, ("works", 31), ("works", 29))
    assert [step["status"] for step in steps] == ["skipped", "done"]
    assert steps[0]["reason"] == "takes 31 s, 30 s are left" and log.count("===") == 1


def test_a_step_that_hangs_is_killed_with_its_children(do):
    steps, _ = do(1, ("hangs", 1.5), ("works", 20))
    assert [step["status"] for step in steps] == ["timeout", "done"]
    assert steps[0]["exit_status"] == -signal.SIGKILL and 3 <= steps[0]["seconds"] < 10
    assert is_gone("time.sleep(600)")


def is_gone(argument: str) -> bool:
    """Whether, within ten seconds, no process of this user is left that has been started with `argument`."""
    for _ in range(100):
        lines = subprocess.run(["ps", "-o", "stat=,args=", "-u", str(os.getuid())], capture_output=True, text=True)
        if not any(argument in line and line[0] not in "Z" for line in lines.stdout.splitlines()):
            return True
        time.sleep(0.1)
    return False


def test_a_stop_leaves_the_table_and_no_process(tmp_path):
    (tmp_path / "step_without_end.py").write_text("import time; time.sleep(777)")
    code = (
        "from benchmarks.run import *\n"
        "steps = [Step('plan', ['this'], 1), Step('long', ['step_without_end'], 300), Step('never', ['this'], 1)]\n"
        f"run_command(run_steps, steps, RunArguments(output={str(tmp_path)!r}, minutes=6), set())"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    read = lambda: [step["status"] for step in json.loads(table.read_text())["results"]["steps"]]  # noqa: E731
    table = tmp_path / "steps.json"
    while process.poll() is None and not (table.exists() and read()[1] == "running"):
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert read() == ["done", "stopped", "pending"] and not json.loads(table.read_text())["finished"]
    assert is_gone("-m step_without_end")


@pytest.mark.parametrize("missing", [set(), {"bitsandbytes"}])
def test_the_gpu_steps_do_without_bitsandbytes(missing):
    steps = {step.name: step for step in run.get_steps(RunArguments(preset="full"), missing)}
    assert list(steps)[:5] == ["inference", "roofline", "training", "gpu tests", "largest batch"]
    assert sum(step.estimate for step in list(steps.values())[:5]) < 9 * 60  # the rest is for what fits
    tiny = steps["tiny model"]
    assert tiny.command[-2:] == ["--parts", "training/parts"] and tiny.estimate <= 300
    assert sum(step.estimate for step in list(steps.values())[:7]) <= 12 * 60
    quantized = not missing
    assert ("4bit" in steps["inference"].command) == quantized
    for name in ("training", "largest batch"):
        command = steps[name].command
        assert command[command.index("--method") + 1] == ("full_8bit" if quantized else "lora")


@pytest.mark.parametrize("preset", ["cpu", "full"])
def test_every_step_is_a_command_with_a_record_of_its_own(preset, monkeypatch):
    """At most eight files are in the folder: the records, the table and the log."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    records, parsed = [], []

    def parse(name, cls, *_, **__):
        parsed.append(name)
        records.append(measure.parse_arguments(cls).get_name(name))

    pytest.importorskip("benchmarks.loader", reason="it needs TRL, which the GPU image may lack")
    for step in run.get_steps(RunArguments(preset=preset), set()):
        assert importlib.util.find_spec(step.command[0])
        if step.command[0].startswith("benchmarks."):
            module = importlib.import_module(step.command[0])
            monkeypatch.setattr(module, "run_benchmark", parse)
            monkeypatch.setattr(sys, "argv", step.command)
            module.main()
    assert len(set(records)) == len(parsed) <= 6


def test_a_short_run(tmp_path):
    """The command as a user starts it, with a step that takes seconds and one for which there is no time."""
    options = ["--minutes", "1.4", "--steps", "plan", "loader", "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.run", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    reason = "takes 90 s, " if measure.is_installed("trl") else "not installed: trl"
    assert f"loader          skipped: {reason}" in done.stdout and "plan            done, " in done.stdout
    steps = json.loads((tmp_path / "steps.json").read_text())["results"]["steps"]
    assert [(step["name"], step["status"]) for step in steps] == [("loader", "skipped"), ("plan", "done")]
    assert json.loads((tmp_path / "plan.json").read_text())["finished"]


def test_unknown_steps_are_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--steps", "plan", "everything"])
    with pytest.raises(ValueError, match="--steps are inference, .*, plan, but got everything"):
        run.main()
