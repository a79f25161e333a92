# SPDX-License-Identifier: Apache-2.0
"""A run of tiny shapes, its counts against formulas, and the shares that are derived from what was measured."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import roofline
from benchmarks._common import Timing
from benchmarks._models import make_contender
from benchmarks.roofline import RooflineArguments


def test_a_run_measures_every_part_and_draws(run_benchmark, capsys, monkeypatch):
    # whether compiled towers are right is tested with benchmarks.inference
    monkeypatch.setattr(roofline, "compile_towers", lambda contender: contender)
    options = ("--repeats", "2", "--warmup", "0", "--matrix_side", "256", "--copied_bytes", "1000000")
    results = run_benchmark(roofline, *options, "--new_tokens", "4", "--batch_size", "1")
    names = ["ConvNeXt", "ViT", "adapters and fusion", "towers and projector", "prefill", "decoding"]
    assert list(results["parts"]) == names
    rate, bandwidth = results["matrix_flops_per_second"], results["copied_bytes_per_second"]
    for part in results["parts"].values():
        assert part["flops"] > 0 and part["bytes"] > 0
        for share in ("share_of_matrix_rate", "share_of_copy_bandwidth"):
            assert 0 < part[share]["low"] <= part[share]["median"] <= part[share]["high"]
    assert rate > 0 and bandwidth > 0
    towers = sum(results["parts"][name]["flops"] for name in names[:3])
    # 16 tokens of 32 channels to 64 and 64 channels
    assert results["parts"]["towers and projector"]["flops"] == towers + 2 * 16 * (32 * 64 + 64 * 64)
    assert [target["met"] for target in results["targets"]] == [None, None]  # they are about 7B on a GPU
    shares = [operation["share"] for operation in results["first_token_operations"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    for entry in results["compiled_towers"].values():
        assert entry["seconds"].keys() == {"eager", "compiled"} and entry["speedup"]["low"] > 0
    out = capsys.readouterr().out
    assert "decoding: " in out and "first_token: " in out


def test_counts_are_those_of_the_formulas(tiny):
    contender = make_contender(tiny, "llava-hr-1024", "meta", torch.float32)
    arguments = RooflineArguments(batch_size=3, text_tokens=50, new_tokens=4)
    parts = roofline.make_parts(contender, arguments)
    weights = 4 * 64 * 64 + 3 * 64 * 128  # of the language model's layer
    tokens = 16 + 50
    attention = 4 * tokens**2 * 64
    head = 64 * 128  # for the last position alone
    # before 5.24, transformers computes the rotary embedding's angles by a product, which counts (0.04 % here)
    expected = 2 * (weights * tokens + head) + attention
    assert roofline.count_flops(parts["prefill"].run) == pytest.approx(expected, rel=1e-3)
    # each new token looks at those before it and at itself
    length = tokens + 2
    expected = 2 * (weights + head) + 4 * length * 64
    assert roofline.count_decoding_flops(contender, arguments) == pytest.approx(expected, rel=1e-3)
    vit = 4 * (4 * 32 * 32 + 2 * 32 * 32) * 16 * 2 + 4 * 4 * 16**2 * 32 + 2 * 3 * 112**2 * 32 * 16
    assert roofline.count_flops(parts["ViT"].run) == 3 * vit

    norms = 2 * 64
    cache = 2 * 64 * length
    assert roofline.get_decoding_bytes(contender, arguments) == 4 * (weights + norms + head + cache)


def test_shares_are_taken_round_by_round():
    arguments = RooflineArguments(matrix_side=100, copied_bytes=1000)
    timings = {"matrix product": Timing([1, 2]), "copy": Timing([4, 8]), "x": Timing([2, 4])}
    results = roofline.describe(timings, {"x": 500_000}, {"x": 800}, arguments)
    # 2e6 FLOPs in half the time, 2000 bytes in twice the time
    part = results["parts"]["x"]
    assert part["share_of_matrix_rate"]["median"] == pytest.approx(0.125)
    assert part["share_of_copy_bandwidth"]["median"] == pytest.approx(0.8)
    assert part["limit"] == "copy bandwidth"
    assert results["matrix_flops_per_second"] == pytest.approx(2e6 / 1.5)


def test_parts_that_memory_does_not_suffice_for_are_left_out():
    timings = {"matrix product": Timing([1]), "copy": Timing([4]), "x": Timing([2])}
    results = roofline.describe(timings, {"x": 5, "y": 5}, {"x": 8, "y": 8}, RooflineArguments())
    assert results["parts"].keys() == {"x"}


def test_a_kernels_time_counts_once():
    """A kernel is an event of its own, and its time is that of the operation that launched it as well."""

    def event(key, device_type, on_cpu, on_gpu):
        times = {"self_cpu_time_total": on_cpu, "self_device_time_total": on_gpu}
        return SimpleNamespace(key=key, device_type=device_type, count=2, **times)

    events = [
        event("aten::mm", DeviceType.CPU, 30, 60),
        event("gemm_kernel", DeviceType.CUDA, 0, 60),
        event("aten::add", DeviceType.CPU, 10, 20),
        event("add_kernel", DeviceType.CUDA, 0, 20),
        event("cudaLaunchKernel", DeviceType.CPU, 60, 0),
    ]
    ranked = roofline.rank_operations(events, on_gpu=True)
    assert [(o["operation"], o["share"]) for o in ranked[:2]] == [("aten::mm", 0.75), ("aten::add", 0.25)]
    assert ranked[2]["share"] == 0 and ranked[0]["calls"] == 2
    ranked = roofline.rank_operations(events, on_gpu=False, number=1)
    assert [(o["operation"], o["share"]) for o in ranked] == [("cudaLaunchKernel", 0.6)]


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="--new_tokens must be"):
        RooflineArguments(new_tokens=1)
