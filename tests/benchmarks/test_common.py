# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: rounds, ratios, memory of a process, options, targets."""

import json
import sys
import weakref
from dataclasses import dataclass

import pytest
import torch

from benchmarks import _common
from benchmarks._common import BenchmarkArguments, OutputArguments, Timing


HELD = []


def hold(num_bytes: int) -> str:
    """Touches so many bytes of memory."""
    HELD.append(torch.ones(num_bytes, dtype=torch.uint8))
    return "held"


def die() -> None:
    sys.exit(3)


def fail(message: str) -> None:
    raise RuntimeError(message)


def test_everything_runs_once_in_each_round():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = _common.compare(functions, BenchmarkArguments(repeats=3, warmup=2))
    assert calls == ["a", "b"] * 5
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_warmup_does_not_count():
    numbers = iter(range(10))
    functions = {"a": lambda: {"first": next(numbers), "second": 7.0}}
    *_, timings = _common.compare_phases(functions, BenchmarkArguments(repeats=3, warmup=4))
    assert timings["a"]["first"].seconds == [4, 5, 6] and timings["a"]["second"].seconds == [7, 7, 7]


def test_ratios_are_taken_in_each_round():
    # the medians' ratio would be 4 / 3
    ratio = _common.ratio(Timing([2.0, 4.0, 30.0]), Timing([1.0, 3.0, 10.0]))
    assert ratio == {"median": 2.0, "low": pytest.approx((4 / 3 + 2) / 2), "high": 2.5}
    assert _common.ratio(None, Timing([1.0])) is None and _common.ratio(Timing([1.0]), None) is None
    assert _common.ratio(Timing([4.0, 9.0]), Timing([2.0]))["median"] == 2  # so far measured in one round alone


def test_timings_are_there_after_each_run():
    functions = {name: lambda: {"seconds": 1.0} for name in "ab"}
    counts = [
        {name: len(phases["seconds"].seconds) for name, phases in timings.items()}
        for timings in _common.compare_phases(functions, BenchmarkArguments(repeats=2, warmup=1))
    ]
    assert counts == [{"a": 1}, {"a": 1, "b": 1}, {"a": 2, "b": 1}, *[{"a": 2, "b": 2}] * 2]


def test_what_memory_does_not_suffice_for_is_left_out():
    calls = []

    def grow():
        calls.append("grow")
        if len(calls) > 2:  # in the second round
            raise torch.OutOfMemoryError("CUDA out of memory.")

    functions = {"grow": grow, "other": lambda: calls.append("other")}
    timings = _common.compare(functions, BenchmarkArguments(repeats=3, warmup=1))
    assert calls == ["grow", "other", "grow", "other", "other", "other"]
    assert timings.keys() == {"other"} and len(timings["other"].seconds) == 3


def test_memory_is_given_back_when_it_did_not_suffice(monkeypatch):
    held, given_back = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(held[0]() is None))

    def fill():
        tensor = torch.ones(1000)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert _common.unless_out_of_memory(fill) is None
    assert given_back == [True]  # not before the function's tensors were gone
    assert _common.unless_out_of_memory(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="other"):
        _common.unless_out_of_memory(lambda: fail("other"))


def test_one_round_has_no_spread():
    assert _common.spread([3.0]) == {"low": 3.0, "median": 3.0, "high": 3.0}


def test_a_fresh_process_tells_its_memory():
    result, raised = _common.in_fresh_process(hold, 200_000_000)
    assert result == "held" and not HELD
    assert 200_000_000 <= raised < 260_000_000


def test_a_fresh_process_that_dies_is_named():
    with pytest.raises(RuntimeError, match="die ended with exit code 3"):
        _common.in_fresh_process(die)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "large"}, "--preset must be cpu or full, but got 'large'"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"warmup": -1}, "--warmup 0, but got 5 and -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_preset_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--preset", "full"])
    with pytest.raises(SystemExit, match="--preset full needs a GPU"):
        _common.parse_arguments(BenchmarkArguments)


@pytest.mark.parametrize(("at_least", "target", "met"), [(True, 2, True), (True, 3, False), (False, 2, False)])
def test_targets(at_least, target, met):
    measured = {"median": 2.5, "low": 1.0, "high": 4.0}
    assert _common.make_target("x", measured, target, at_least, True)["met"] is met
    assert _common.make_target("x", measured, target, at_least, False)["met"] is None
    assert _common.make_target("x", None, target, at_least, True) == {
        "name": "x",
        "measured": None,
        "target": f"{'at least' if at_least else 'at most'} {target}",
        "met": None,
    }


@dataclass
class CountArguments(OutputArguments):
    number: int = 2


def test_a_stop_loses_nothing(tmp_path, monkeypatch, capsys):
    """The record is written after each case, in place of the one before."""
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
        results["targets"] = [_common.make_target("gaps", None, 1, True, True)]
        yield results

    monkeypatch.setattr(sys, "argv", ["count", "--output", str(tmp_path)])
    _common.run_benchmark("count", CountArguments, run, lambda *_: None)
    assert seen == [([0], False), ([0, 1], False)]
    assert read()["finished"] and read()["arguments"]["number"] == 2
    assert "gaps: not measured (target: at least 1)" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["count", "--output", str(tmp_path), "--number", "3"])
    with pytest.raises(KeyboardInterrupt):
        _common.run_benchmark("count", CountArguments, run, lambda *_: None)
    assert read()["results"]["cases"] == [0, 1] and not read()["finished"]
    plot = {"count.png"} if _common.is_installed("matplotlib") else set()
    assert {file.name for file in tmp_path.iterdir()} == {"count.json"} | plot


def test_a_plot_is_drawn_later_where_matplotlib_is(tmp_path, monkeypatch, capsys):
    """`--from` reads results and options from the record, also those that this machine would refuse."""
    pytest.importorskip("matplotlib", reason="the GPU image may lack it")

    def run(arguments):
        yield {"number": arguments.number}

    drawn = []
    command = ("count", CountArguments, run, lambda figure, results, arguments: drawn.append((results, arguments)))
    monkeypatch.setattr(_common, "is_installed", lambda package: package != "matplotlib")
    monkeypatch.setattr(sys, "argv", ["count", "--output", str(tmp_path), "--number", "3", "--label", "second"])
    _common.run_benchmark(*command)
    assert not drawn and "--from FOLDER" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["count-second.json"]
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["count", "--from", str(tmp_path), "--label", "second"])
    _common.run_benchmark(*command)
    ((results, arguments),) = drawn
    assert results == {"number": 3} and arguments.number == 3 and (tmp_path / "count-second.png").exists()
    assert BenchmarkArguments(preset="full", records="results").on_gpu  # of another machine: no GPU is needed here
