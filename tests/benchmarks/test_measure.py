# SPDX-License-Identifier: Apache-2.0
"""Rounds, ratios, options, targets, records."""

import json
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import BenchmarkArguments, OutputArguments


def test_everything_runs_once_per_round_and_warmup_does_not_count():
    calls, counts = [], []
    functions = {name: lambda name=name: calls.append(name) or {"first": len(calls), "second": 7} for name in "ab"}
    for timings in measure.compare(functions, BenchmarkArguments(repeats=2, warmup=1)):
        counts.append({name: len(phases["first"]) for name, phases in timings.items()})
    assert calls == ["a", "b"] * 3
    assert counts == [{"a": 1}, {"a": 1, "b": 1}, {"a": 2, "b": 1}, {"a": 2, "b": 2}]
    assert timings["a"] == {"first": [3, 5], "second": [7] * 2}
    assert measure.get_phase(timings, "first") == {"a": [3, 5], "b": [4, 6]}


def test_ratios_are_taken_round_by_round():
    # the medians' ratio would be 4 / 3
    ratio = measure.ratio([2.0, 4.0, 30.0], [1.0, 3.0, 10.0])
    assert ratio == {"median": 2.0, "low": pytest.approx((4 / 3 + 2) / 2), "high": 2.5}
    assert measure.ratio(None, [1.0]) is None and measure.ratio([1.0], None) is None
    assert measure.ratio([4.0, 9.0], [2.0])["median"] == 2  # so far measured in one round alone
    assert measure.spread([3.0]) == {"low": 3.0, "median": 3.0, "high": 3.0}


def test_a_function_that_runs_out_of_memory_is_not_called_again():
    calls = []

    def grow():
        calls.append("grow")
        if len(calls) > 2:  # in the second round
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"seconds": 1.0}

    functions = {"grow": grow, "other": lambda: calls.append("other") or {"seconds": 1.0}}
    *_, timings = measure.compare(functions, BenchmarkArguments(repeats=3, warmup=1))
    assert calls == ["grow", "other", "grow", "other", "other", "other"]
    assert timings == {"grow": None, "other": {"seconds": [1.0] * 3}}
    assert measure.get_phase(timings).keys() == {"other"}


def test_memory_is_freed_after_running_out_of_it(monkeypatch):
    held, freed = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[0]() is None))

    def fill():
        tensor = torch.ones(1000)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert measure.unless_out_of_memory(fill) is None
    assert freed == [True]  # not before the function's tensors were gone
    assert measure.unless_out_of_memory(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        measure.unless_out_of_memory(lambda: 1 / 0)


@pytest.mark.parametrize(("at_least", "target", "met"), [(True, 2, True), (True, 3, False), (False, 2, False)])
def test_targets(at_least, target, met):
    measured = {"median": 2.5, "low": 1.0, "high": 4.0}
    assert measure.make_target("x", measured, target, at_least, True)["met"] is met
    assert measure.make_target("x", measured, target, at_least, False)["met"] is None
    assert measure.make_target("x", None, target, at_least, True) == {
        "name": "x",
        "measured": None,
        "target": f"{'at least' if at_least else 'at most'} {target}",
        "met": None,
    }


@dataclass
class CountArguments(OutputArguments):
    number: int = 2


def test_an_interrupted_run_keeps_its_record(tmp_path, monkeypatch, capsys):
    """The record is replaced after each case."""
    read = lambda: json.loads((tmp_path / "count.json").read_text())  # noqa: E731
    seen = []

    def run(arguments):
        results = {"cases": []}
        for number in range(arguments.number):
            if number == 2:
                raise KeyboardInterrupt
            results["cases"].append(number)
            yield results
            seen.append((read()["results"]["cases"], read()["finished"]))
        results["targets"] = [measure.make_target("gaps", None, 1, True, True)]
        yield results

    monkeypatch.setattr(sys, "argv", ["count", "--output", str(tmp_path)])
    measure.run_benchmark("count", CountArguments, run, lambda *_: None)
    assert seen == [([0], False), ([0, 1], False)]
    assert read()["finished"] and read()["arguments"]["number"] == 2
    assert "gaps: not measured (target: at least 1)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["count", "--output", str(tmp_path), "--number", "3"])
    with pytest.raises(KeyboardInterrupt):
        measure.run_benchmark("count", CountArguments, run, lambda *_: None)
    assert read()["results"]["cases"] == [0, 1] and not read()["finished"]
    plot = {"count.png"} if measure.is_installed("matplotlib") else set()
    assert {file.name for file in tmp_path.iterdir()} == {"count.json"} | plot


def test_a_plot_is_drawn_later_where_matplotlib_is_installed(tmp_path, monkeypatch, capsys):
    """`--from` reads results and options from the record, even those that this machine refuses."""
    pytest.importorskip("matplotlib", reason="the GPU image may lack it")

    def run(arguments):
        yield {"number": arguments.number}

    drawn = []
    command = ("count", CountArguments, run, lambda figure, results, arguments: drawn.append((results, arguments)))
    monkeypatch.setattr(measure, "is_installed", lambda package: package != "matplotlib")
    monkeypatch.setattr(sys, "argv", ["count", "--output", str(tmp_path), "--number", "3", "--label", "second"])
    measure.run_benchmark(*command)
    assert not drawn and "--from FOLDER" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["count-second.json"]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["count", "--from", str(tmp_path), "--label", "second"])
    measure.run_benchmark(*command)
    ((results, arguments),) = drawn
    assert results == {"number": 3} and arguments.number == 3 and (tmp_path / "count-second.png").exists()
    assert BenchmarkArguments(preset="full", records="results").on_gpu  # of another machine: no GPU is needed here
