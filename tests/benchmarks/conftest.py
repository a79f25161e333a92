# SPDX-License-Identifier: Apache-2.0
"""Shapes with which a benchmark takes seconds: few patches, few channels, one layer."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_configs import TEXT_SIZES, VIT_SIZES

from benchmarks.measure import is_installed
from benchmarks.models import CONTENDERS, SHAPES, Contender, make_contenders


# With patches of 112 pixels LLaVA-HR has 9, 9, 16 and 36 image tokens and LLaVA-1.5 has 9, 16, 36 and 81
TINY = dataclasses.replace(
    SHAPES["cpu"],
    text={**TEXT_SIZES, "num_hidden_layers": 1, "vocab_size": 128, "max_position_embeddings": 512},
    vision={**VIT_SIZES, "hidden_size": 32, "intermediate_size": 32, "image_size": 336, "patch_size": 112},
    high_res={**SHAPES["cpu"].high_res, "model_args": {"depths": [1] * 4, "dims": [4, 8, 16, 24]}},
)


@pytest.fixture
def tiny(monkeypatch):
    """The CPU preset has tiny shapes."""
    monkeypatch.setitem(SHAPES, "cpu", TINY)
    return TINY


@pytest.fixture
def contenders(tiny) -> dict[str, Contender]:
    """All that benchmarks compare, with tiny shapes."""
    return make_contenders(tiny, CONTENDERS, "cpu", torch.float32)


@pytest.fixture
def run_benchmark(tiny, tmp_path, monkeypatch):
    """Runs a benchmark's `main` with options of its command line; checks its record and plot, returns the results."""

    def run(module, *options: str) -> dict:
        name = Path(module.__file__).stem
        monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path), *options])
        module.main()
        (path,) = tmp_path.glob("*.json")
        if hasattr(module, "draw") and is_installed("matplotlib"):
            assert path.with_suffix(".png").stat().st_size > 5000
        record = json.loads(path.read_text())
        assert record["command"].startswith(f"python -m benchmarks.{name} ") and record["machine"]["cores"] > 0
        assert record["finished"] and not list(tmp_path.glob(".*"))
        return record["results"]

    return run


@pytest.fixture
def exhaust(monkeypatch):
    """Makes a function of a module run out of a GPU's memory where `when` says so."""

    def patch(module, function: str, when: Callable[..., bool]) -> None:
        whole = getattr(module, function)

        def run(*args, **kwargs):
            if when(*args, **kwargs):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return whole(*args, **kwargs)

        monkeypatch.setattr(module, function, run)

    return patch


@pytest.fixture
def no_gpu_statistics(monkeypatch):
    """GPU measurements run on a CPU; every function adds 100 bytes at its peak."""
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1100)
