# SPDX-License-Identifier: Apache-2.0
"""A run of tiny shapes, its counts against formulas, and the shares that are derived from what was measured."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.models import count_flops, make_contenders
from benchmarks.roofline import RooflineArguments


def test_a_run_measures_every_part(run_benchmark, capsys, monkeypatch):
    # whether compiled towers are right is tested with benchmarks.inference
    monkeypatch.setattr(roofline, "compile_towers", lambda contender: contender)
    monkeypatch.setitem(roofline.LIMITS, "cpu", (256, 10**6))
    results = run_benchmark(roofline, *("--repeats", "2", "--warmup", "0", "--new_tokens", "4", "--batch_size", "1"))
    assert list(results["parts"]) == ["ConvNeXt", "towers and projector", "prefill", "decoding"]
    for part in results["parts"].values():
        assert 0 < part["share"]["low"] <= part["share"]["median"] <= part["share"]["high"]
    assert results["flops_per_second"] > 0 and results["bytes_per_second"] > 0
    assert [target["met"] for target in results["targets"]] == [None, None]  # they are about 7B on a GPU
    for entry in results["compiled_towers"].values():
        assert entry["seconds"].keys() == {"eager", "compiled"} and entry["speedup"]["low"] > 0
    out = capsys.readouterr().out
    assert "decoding: " in out and "first_token: " in out


def test_counts_are_those_of_the_formulas(tiny):
    contender = make_contenders(tiny, ["llava-hr-1024"], "meta", torch.float32)["llava-hr-1024"]
    arguments = RooflineArguments(batch_size=3, new_tokens=4)
    parts = roofline.make_parts(contender, arguments)
    weights = 4 * 64 * 64 + 3 * 64 * 128  # of the language model's layer
    tokens = 16 + 50
    head = 64 * 128  # for the last position alone
    # before 5.24, transformers computes the rotary embedding's angles by a product, which counts (0.04 % here)
    expected = 2 * (weights * tokens + head) + 4 * tokens**2 * 64
    assert count_flops(parts["prefill"]) == pytest.approx(expected, rel=1e-3)
    # linear in the images; of the towers, the ViT is 4 layers on 16 tokens of 32 channels, with attention and patches
    vit = 4 * (4 * 32 * 32 + 2 * 32 * 32) * 16 * 2 + 4 * 4 * 16**2 * 32 + 2 * 3 * 112**2 * 32 * 16
    projector = 2 * 16 * (32 * 64 + 64 * 64)
    towers, convnext = count_flops(parts["towers and projector"]), count_flops(parts["ConvNeXt"])
    assert 3 * (vit + projector) + convnext < towers < 1.2 * (3 * (vit + projector) + convnext)
    # each new token looks at those before it and at itself
    cache = 2 * 64 * (tokens + 2)
    assert roofline.get_decoding_bytes(contender, arguments) == 4 * (weights + 2 * 64 + head + cache)


def test_shares_are_taken_round_by_round():
    seconds = {"matrix product": [1, 2], "x": [2, 4]}
    parts = roofline.describe(seconds, "matrix product", 2_000_000, {"x": 500_000, "z": 1})  # z ran out of memory
    assert parts.keys() == {"x"}
    assert parts["x"]["share"]["median"] == pytest.approx(0.125)  # a quarter of the work in twice the time
