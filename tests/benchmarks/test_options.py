# SPDX-License-Identifier: Apache-2.0
"""Options that make no sense are named, by every benchmark."""

import importlib
import sys

import pytest
import torch

from benchmarks import plan


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about a missing GPU, and there is one")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("inference", {"variants": ["fast"]}, "--variants are eager, static, 4bit or none, but got fast"),
        ("inference", {"new_tokens": 9}, "--new_tokens must be at least 10"),
        ("loader", {"batch_size": 0}, "--batch_size must be"),
        ("loader", {"num_batches": 0}, "--num_batches must be"),
        ("loader", {"workers": [1, -1]}, "--workers must be at least 0, but got -1"),
        ("plan", {"resolution": 512}, "--resolution must be one of 384, 768, 1024, 1536, but got 512"),
        ("plan", {"gpu": "abacus"}, "--gpu must be one of a100, a800, h100, h200, but got 'abacus'"),
        ("plan", {"aspect_ratio": "wide"}, "--aspect_ratio must be width:height"),
        ("plan", {"utilization": 1.5}, "--utilization must be above 0 and at most 1"),
        ("roofline", {"new_tokens": 1}, "--new_tokens must be"),
        ("roofline", {"preset": "large"}, "--preset must be cpu or full, but got 'large'"),
        pytest.param("roofline", {"preset": "full"}, "--preset full needs a GPU", marks=NO_GPU),
        ("roofline", {"repeats": 0}, "--repeats must be at least 1"),
        ("roofline", {"warmup": -1}, "--warmup 0, but got 5 and -1"),
        ("run", {"preset": "7b-cpu"}, "--preset must be cpu or full"),
        ("run", {"minutes": 0}, "--minutes must be above 0, but got 0"),
        ("training", {"method": "sgd"}, "--method must be one of full, full_8bit, lora"),
        ("training", {"contenders": ["llava-hr-512"]}, "--contenders are llava-hr-384, .* but got llava-hr-512"),
        ("training", {"stages": ["third"]}, "--stages are pretrain, finetune, but got third"),
        ("training", {"max_batch_size": 4}, "--max_batch_size needs --preset full"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    if name == "loader":
        pytest.importorskip("trl", reason="benchmarks.loader needs TRL, which a GPU image may not have")
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(ValueError, match=message):
        getattr(module, f"{name.title()}Arguments")(**options)


def test_wrong_options_of_a_command_are_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", "--gpus", "0"])
    with pytest.raises(SystemExit, match="error: --gpus must be at least 1, but got 0"):
        plan.main()
