# SPDX-License-Identifier: Apache-2.0
"""A small run of `benchmarks.loading`."""

import json
import sys

import pytest
import torch

from benchmarks import loading
from benchmarks._common import Timing, is_installed
from benchmarks.loading import IMPORTS, LoadingArguments


def test_run(tmp_path, monkeypatch, capsys):
    argv = ["--output", str(tmp_path), "--small", "True", "--formats", "bf16", "--repeats", "1", "--warmup", "0"]
    monkeypatch.setattr(sys, "argv", ["loading", *argv])
    # the interpreter and what it imports come in the benchmark itself
    monkeypatch.setattr(loading, "IMPORTS", {"llava-hr": "import json", "llava": "import sys"})
    loading.main()
    results = json.loads((tmp_path / "loading-cpu.json").read_text())["results"]
    assert not is_installed("matplotlib") or (tmp_path / "loading-cpu.png").stat().st_size > 1000
    assert set(results["imports"]) == {"llava-hr", "llava"}
    assert all(0 < entry["median"] < 60 for entry in results["imports"].values())
    assert set(results["loading"]) == {"llava-hr, bf16", "llava, bf16"}
    text = LoadingArguments(small=True).shapes.text
    layer = 4 * text["hidden_size"] ** 2 + 3 * text["hidden_size"] * text["intermediate_size"]
    language_model = 2 * (4 * layer + 2 * text["vocab_size"] * text["hidden_size"])  # bytes, norms left out
    for entry in results["loading"].values():
        assert language_model < entry["weight_bytes"] < 1.5 * language_model
        # the weights are read from the mapped file: all of them in the peak, none of them a copy
        assert entry["weight_bytes"] < entry["peak_bytes"]["median"] < entry["weight_bytes"] + 100e6
        assert entry["peak_over_weights"]["median"] == entry["peak_bytes"]["median"] / entry["weight_bytes"]
        assert entry["anonymous_bytes"]["median"] < entry["weight_bytes"] / 2
        assert all(entry["seconds"][phase]["median"] > 0 for phase in ("load", "touch"))
    assert [target["target"] for target in results["targets"]] == ["at most 1.2", "at most 1.05"]
    assert results["targets"][1]["met"] is None  # not the size that it is for
    assert capsys.readouterr().out.count("(target: at most ") == 2


def test_imports_name_what_there_is():
    for code in IMPORTS.values():
        exec(code, {})


def test_targets_are_upper_bounds_of_ratios():
    imports = {"llava-hr": Timing([2.2, 4.4, 2.2]), "llava": Timing([2.0, 4.0, 2.0])}
    peaks = {"llava-hr, bf16": {"peak_over_weights": {"median": 1.06, "low": 1.06, "high": 1.06}}}
    slow, large = loading.find_targets(imports, peaks, LoadingArguments())
    assert slow["measured"]["median"] == pytest.approx(1.1) and slow["met"]
    assert large["measured"]["median"] == 1.06 and not large["met"]


def test_a_model_is_loaded_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the GPU image may lack it")
    arguments = LoadingArguments(small=True, formats=["4bit"])
    loading.save_models(arguments, tmp_path)
    result = loading.load(str(tmp_path / "llava-hr"), "4bit", "cpu")
    whole = loading.load(str(tmp_path / "llava-hr"), "bf16", "cpu")
    text = arguments.shapes.text
    layers = 4 * (4 * text["hidden_size"] ** 2 + 3 * text["hidden_size"] * text["intermediate_size"])
    # half a byte instead of two, 4 for the scale of 64 weights; a table and a description for each of 28 layers
    packed = result["weight_bytes"] - whole["weight_bytes"] + 2 * layers
    assert 0 < packed - (layers / 2 + layers / 64 * 4) < 28 * 200
    assert result["gpu_bytes"] is None and torch.get_default_dtype() == torch.float32


def test_refused_options():
    with pytest.raises(ValueError, match=r"--formats are bf16 and 4bit, but got \['8bit'\]"):
        LoadingArguments(formats=["8bit"])
