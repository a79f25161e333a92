# SPDX-License-Identifier: Apache-2.0
"""The cost model of `benchmarks.scale`: its fit on made-up measurements, and a run of tiny shapes."""

import dataclasses
import json

import pytest

from benchmarks import scale
from benchmarks._models import SHAPES
from benchmarks.scale import Case, ScaleArguments


def test_fit_finds_the_rate_that_made_the_times():
    flops = [1e9, 4e9, 30e9, 9e9]
    seconds = [0.05 + count / 40e9 for count in flops]
    assert scale.fit(flops, seconds) == pytest.approx({"overhead": 0.05, "rate": 40e9, "worst": 0}, rel=1e-6, abs=1e-6)


def test_each_is_varied_by_itself():
    cases = scale.get_cases(ScaleArguments(batch_sizes=[1, 3], pictures=[1, 5]))
    assert cases == [Case(384), Case(768), Case(1024), Case(1536), Case(1024, 3), Case(1024, 1, 5)]


def test_a_run_measures_counts_and_draws(tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(
        SHAPES["cpu"],
        text={**SHAPES["cpu"].text, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1},
        high_res={**SHAPES["cpu"].high_res, "model_args": {"depths": [1] * 4, "dims": [4, 8, 16, 24]}},
    )
    monkeypatch.setitem(SHAPES, "cpu", tiny)
    options = ["--repeats", "2", "--batch_sizes", "1", "2", "--pictures", "1", "2", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["scale", *options])
    scale.main()
    results = json.loads((tmp_path / "scale-cpu.json").read_text())["results"]
    by_case = {(row["side"], row["batch_size"], row["pictures"]): row for row in results["cases"]}
    assert by_case.keys() == {(384, 1, 1), (768, 1, 1), (1024, 1, 1), (1536, 1, 1), (1024, 2, 1), (1024, 1, 2)}
    one, batch, pictures = by_case[1024, 1, 1], by_case[1024, 2, 1], by_case[1024, 1, 2]
    batch, pictures, one = (row["flops"] for row in (batch, pictures, one))
    assert batch["vision"] == pictures["vision"] == 2 * one["vision"]
    assert batch["text"] == 2 * one["text"]
    tokens, width, vocab = 2 * 1024 + 50, 48, 1024
    weights = 4 * width**2 + 3 * width * 64 + vocab * width
    assert pictures["text"] == pytest.approx(2 * weights * tokens + 4 * tokens**2 * width, rel=1e-4)
    for row in results["cases"]:
        assert 0 < row["seconds"]["vision"]["low"] <= row["seconds"]["vision"]["high"]
        assert row["seconds"]["first_token"]["median"] > 0
    assert results["fit"].keys() == {"vision", "text"}
    assert "GFLOP/s, at most" in capsys.readouterr().out
    assert (tmp_path / "scale-cpu.png").stat().st_size > 5000


def test_cases_that_memory_does_not_suffice_for_are_left_out(tiny, exhaust):
    exhaust(scale, "see", lambda contender, pixels: len(pixels["pixel_values"]) > 1)
    arguments = ScaleArguments(repeats=1, warmup=0, batch_sizes=[1, 2], pictures=[1])
    (results,) = scale.run(arguments)
    assert [(row["side"], row["batch_size"]) for row in results["cases"]] == [(s, 1) for s in (384, 768, 1024, 1536)]
    scale.draw(results, arguments)
