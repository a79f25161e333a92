# SPDX-License-Identifier: Apache-2.0
"""A small run of `benchmarks.loader`, and what it compares."""

import os

import pytest
import torch


loader = pytest.importorskip("benchmarks.loader", reason="it needs TRL, which the GPU image may lack")
VIEW_VALUES = {"256": 3 * 256**2, "1024": 3 * 1024**2}


# transformers 5.24 decodes LLaVA's files with torchvision
@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
def test_run(run_benchmark):
    results = run_benchmark(
        loader, "--workers", "0", "1", "--batch_size", "2", "--num_batches", "2", "--repeats", "1", "--warmup", "0"
    )
    assert {side: len(entries) for side, entries in results["sides"].items()} == {"256": 2, "1024": 3}
    for side, entries in results["sides"].items():
        for name, entry in entries.items():
            values = 3 * 1022**2 if name == "llava" else VIEW_VALUES[side]
            text_bytes = entry["bytes_per_sample"] - (2 if name.endswith("bfloat16") else 4) * values
            assert 3 * 8 * 200 < text_bytes < 3 * 8 * 6000  # ids, mask and labels of an image and its chat
            assert entry["samples_per_second"].keys() == {"0", "1"} and min(entry["samples_per_second"].values()) > 0
            limit = (
                entry["main_process_seconds"]["0"] if side == "1024" else float("inf")
            )  # starting a worker counts, too
            assert 0 < entry["main_process_seconds"]["1"] < limit
    assert results["views"].keys() == {"llava-hr", "llava"}
    needs = results["needs"]
    per_sample = results["sides"]["1024"]["llava-hr"]["bytes_per_sample"]
    assert needs["shared_memory_bytes"] == pytest.approx(64 * 12 * 2 * per_sample)
    assert 75e12 < needs["flops_per_sample"] < 85e12  # about 80 TFLOP
    assert needs["h100_samples_per_second"] == pytest.approx(989e12 * needs["utilization"] / needs["flops_per_sample"])
    assert len(results["targets"]) == 5


def test_both_ways_of_masking_give_the_same_batches(tmp_path):
    samples = loader.make_samples(tmp_path, 256, 2)
    batches = [collator(samples) for collator in loader.make_collators(256).values()]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(values, batches[1][name]) for name, values in batches[0].items())
    learned = batches[0]["labels"][0]
    tokenizer = next(iter(loader.make_collators(256).values())).processor.tokenizer
    assert tokenizer.decode(learned[learned != -100]) == "".join(f" {answer}</s>" for _, answer in loader.TURNS)


def test_targets_compare_rates():
    arguments = loader.LoaderArguments(workers=[0, 1], repeats=2)
    ours, slow, llava = ({n: [seconds] * 2 for n in (0, 1)} for seconds in (2.0, 8.0, 1.0))
    small, large = {"llava-hr": ours, "llava-hr, transformers' masks": slow}, {"llava-hr": ours, "llava": llava}
    views, needs = {"llava-hr": [1.0, 2.0], "llava": [2.0, 4.0]}, {"h100_samples_per_second": 0.25}
    targets = loader.find_targets({256: small, 1024: large}, views, needs, arguments)
    assert [target["measured"]["median"] for target in targets] == [4, 0.5, 0.5, 2, 2]
    assert [target["met"] for target in targets] == [True, False, False, True, True]


def test_by_default_no_more_workers_than_cores():
    assert max(loader.LoaderArguments().workers) <= os.cpu_count()
    assert loader.LoaderArguments(workers=[0, 100_000]).workers == [0, 100_000]
