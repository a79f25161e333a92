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
"""What the benchmarks share: rounds, ratios, memory of a process, options, targets."""

import sys

import pytest
import torch

from benchmarks import _common
from benchmarks._common import BenchmarkArguments, Timing


HELD = []


def hold(num_bytes: int) -> str:
    """Touches so many bytes of memory."""
    HELD.append(torch.ones(num_bytes, dtype=torch.uint8))
    return "held"


def die() -> None:
    sys.exit(3)


def test_everything_runs_once_in_each_round():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    timings = _common.compare(functions, BenchmarkArguments(repeats=3, warmup=2))
    assert calls == ["a", "b"] * 5
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_warmup_does_not_count():
    numbers = iter(range(10))
    timings = _common.compare_phases(
        {"a": lambda: {"first": next(numbers), "second": 7.0}}, BenchmarkArguments(repeats=3, warmup=4)
    )
    assert timings["a"]["first"].seconds == [4, 5, 6] and timings["a"]["second"].seconds == [7, 7, 7]


def test_ratios_are_taken_in_each_round():
    # the medians' ratio would be 4 / 3
    ratio = Timing([2.0, 4.0, 30.0]).ratio(Timing([1.0, 3.0, 10.0]))
    assert ratio == {"median": 2.0, "low": pytest.approx((4 / 3 + 2) / 2), "high": 2.5}


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
        ({"preset": "gpu"}, "--preset must be cpu or full"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"warmup": -1}, "--warmup 0, but got 5 and -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkArguments(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_full_preset_wants_a_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--preset", "full"])
    with pytest.raises(SystemExit, match="there is no GPU here"):
        _common.parse_arguments(BenchmarkArguments)


@pytest.mark.parametrize(("at_least", "target", "met"), [(True, 2, True), (True, 3, False), (False, 2, False)])
def test_targets(at_least, target, met):
    measured = {"median": 2.5, "low": 1.0, "high": 4.0}
    assert _common.make_target("x", measured, target, at_least, True)["met"] is met
    assert _common.make_target("x", measured, target, at_least, False)["met"] is None
