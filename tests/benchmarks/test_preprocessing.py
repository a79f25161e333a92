# SPDX-License-Identifier: Apache-2.0
"""A small run of `benchmarks.preprocessing`, and what it compares."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import preprocessing
from benchmarks._common import Timing, is_installed
from benchmarks.preprocessing import PreprocessingArguments, get_deviations
from modeling_llava_hr import LlavaHrImageProcessorPil


STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])  # CLIP's


@pytest.mark.parametrize("width, height", [(500, 375), (375, 500), (40, 31), (384, 384), (1, 1)])
def test_the_released_procedure_gives_what_the_pil_backend_gives(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    views = preprocessing.prepare_as_released([Image.fromarray(pixels)], 384, 336)
    expected = LlavaHrImageProcessorPil(size=384, low_res_size=336)(Image.fromarray(pixels), return_tensors="pt")
    assert views.keys() == expected.keys()
    assert all(torch.equal(view, expected[name]) for name, view in views.items())


def test_run(tmp_path, monkeypatch, capsys):
    argv = ["--output", str(tmp_path), "--side", "384", "--shrink", "20", "--repeats", "2", "--warmup", "0"]
    monkeypatch.setattr(sys, "argv", ["preprocessing", *argv, "--batch_size", "2"])
    preprocessing.main()
    results = json.loads((tmp_path / "preprocessing-cpu.json").read_text())["results"]
    assert not is_installed("matplotlib") or (tmp_path / "preprocessing-cpu.png").stat().st_size > 1000
    assert len(results["cases"]) == 12
    for name, case in results["cases"].items():
        assert case["pictures"] == (2 if name.endswith("batch") else 1)
        assert set(case["seconds"]) == {
            *("llava-hr", "llava-hr, PIL", "llava", "llava, cropped", "llava, PIL", "released")
        }
        assert set(case["ratios"]) == {"llava / llava-hr", "llava, cropped / llava-hr", "released / llava-hr, PIL"}
        for ratio in case["ratios"].values():
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
        for seconds in case["seconds"].values():
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"] < 60
        assert set(case["deviations"]["llava-hr, PIL"].values()) == {0}
        # a small picture is enlarged smoothly: some pixel is rounded otherwise
        assert 0 < case["deviations"]["llava-hr"]["pixel_values"] < 2.001
    # eight targets, none judged since the pictures are not those it was set for
    assert [target["met"] for target in results["targets"]] == [None] * 8
    assert capsys.readouterr().out.count("(target: at least ") == 8


def test_targets_divide_the_rivals_time_by_ours():
    seconds = {"llava-hr": 2.0, "llava-hr, PIL": 4.0, "llava": 3.0, "llava, PIL": 9.0, "released": 2.0}
    case = {name: Timing([value, 2 * value, value]) for name, value in seconds.items()}
    targets = preprocessing.find_targets(dict.fromkeys(preprocessing.PICTURES, case), PreprocessingArguments())
    values = [(target["measured"]["median"], target["met"], target["target"]) for target in targets]
    assert values[:4] == [(1.5, True, "at least 1.3"), (0.5, False, "at least 1")] * 2
    assert values[4:] == [(1.5, True, "at least 1"), (0.5, False, "at least 1")] * 2


def test_views_are_padded_or_cropped():
    """Of a bright picture twice as wide as high: its middle alone, or all of it between bars."""
    contenders = preprocessing.make_contenders(PreprocessingArguments(side=384))
    picture = Image.new("RGB", (200, 100), "white")
    for name, bars in (("llava", True), ("llava, cropped", False), ("llava-hr", True)):
        views = contenders[name]([picture])
        view = views["pixel_values"]
        assert view.shape == (1, 3, 384, 384) and (view[0, 0, 0, 0] < 1) == bars


def test_deviations_are_levels_of_8_bits():
    expected = {name: torch.zeros(1, 3, 4, 4) for name in ("pixel_values", "low_res_pixel_values")}
    views = {name: view.clone() for name, view in expected.items()}
    views["pixel_values"][0, 1, 2, 3] = -3 / 255 / STD[1]
    assert get_deviations(views, expected) == {"low_res_pixel_values": 0, "pixel_values": pytest.approx(3)}


@pytest.mark.parametrize("option, named", [({"side": 1000}, "--side"), ({"shrink": 0}, "--shrink")])
def test_refused_options(option, named):
    with pytest.raises(ValueError, match=f"{named} must be .* but got {next(iter(option.values()))}"):
        PreprocessingArguments(**option)
