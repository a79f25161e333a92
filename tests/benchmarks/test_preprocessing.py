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
"""A small run of `benchmarks.preprocessing`, and that what makes preprocessing fast changes no result."""

import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as tvF

from benchmarks import preprocessing
from benchmarks._common import Timing
from benchmarks.preprocessing import PreprocessingArguments, get_deviations
from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrImageProcessorPil


SIZES = {"size": 336, "high_res_size": 384}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SHAPES = [(500, 375), (375, 500), (401, 300), (300, 401), (40, 30), (31, 40), (384, 384), (1, 1)]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def to_low_res(high_res):
    return F.interpolate(high_res, (336, 336), mode="bilinear", align_corners=True)


# Results


@pytest.mark.parametrize("width, height", SHAPES)
def test_pil_backend_gives_the_bits_of_the_released_procedure(width, height):
    picture, longest = noise(width, height), max(width, height)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))  # int(255 * MEAN)
    square.paste(picture, ((longest - width) // 2, (longest - height) // 2))
    pixels = np.asarray(square.resize((384, 384), Image.Resampling.BICUBIC)).astype(np.float64) * (1 / 255)
    high_res = (torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) - MEAN) / STD
    views = LlavaHrImageProcessorPil(**SIZES)([picture, picture], return_tensors="pt")
    expected = torch.stack([high_res.contiguous()] * 2)
    assert torch.equal(views["high_res_pixel_values"], expected)
    assert torch.equal(views["pixel_values"], to_low_res(expected))
    by_benchmark = preprocessing.prepare_as_released([picture], 384, 336)
    assert torch.equal(by_benchmark["high_res_pixel_values"], expected[:1])
    assert torch.equal(by_benchmark["pixel_values"], to_low_res(expected[:1]))


@pytest.mark.parametrize("width, height", SHAPES)
def test_torchvision_backend_gives_the_bits_of_padding_and_resizing_the_plain_way(width, height):
    """The whole square is padded and resized, colours first in memory, and normalised out of place."""
    pixels = torch.from_numpy(np.array(noise(width, height))).permute(2, 0, 1).contiguous()
    longest = max(width, height)
    square = torch.tensor([122, 116, 104], dtype=torch.uint8)[:, None, None].repeat(1, longest, longest)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    resized = tvF.resize(square, [384, 384], tvF.InterpolationMode.BICUBIC)
    scale = 1 / (1 / 255)  # in double precision not quite 255
    high_res = ((resized.float() - MEAN * scale) / (STD * scale))[None]
    for picture in (noise(width, height), pixels):
        views = LlavaHrImageProcessor(**SIZES)(picture, input_data_format="channels_first", return_tensors="pt")
        assert torch.equal(views["high_res_pixel_values"], high_res)
        # float32's rounding: torch sums in another order on one thread
        torch.testing.assert_close(views["pixel_values"], to_low_res(high_res), atol=1e-6, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_holds_what_each_picture_gives(threads):
    before, processor = torch.get_num_threads(), LlavaHrImageProcessor(**SIZES)
    torch.set_num_threads(threads)
    try:
        pictures = [noise(*shape) for shape in SHAPES]
        together = processor(pictures, return_tensors="pt")
        for index, picture in enumerate(pictures):
            alone = processor(picture, return_tensors="pt")
            for name in ("pixel_values", "high_res_pixel_values"):
                assert torch.equal(together[name][index], alone[name][0])
                assert together[name].is_contiguous()
    finally:
        torch.set_num_threads(before)


# The benchmark


def test_run(tmp_path, monkeypatch, capsys):
    argv = ["--output", str(tmp_path), "--side", "384", "--shrink", "20", "--repeats", "2", "--warmup", "0"]
    monkeypatch.setattr(sys, "argv", ["preprocessing", *argv, "--batch_size", "2"])
    preprocessing.main()
    results = json.loads((tmp_path / "preprocessing-cpu.json").read_text())["results"]
    assert (tmp_path / "preprocessing-cpu.png").stat().st_size > 1000
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
        assert 0 < case["deviations"]["llava-hr"]["high_res_pixel_values"] < 2.001
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
        view = views["high_res_pixel_values" if name == "llava-hr" else "pixel_values"]
        assert view.shape == (1, 3, 384, 384) and (view[0, 0, 0, 0] < 1) == bars


def test_deviations_are_levels_of_8_bits():
    expected = {name: torch.zeros(1, 3, 4, 4) for name in ("pixel_values", "high_res_pixel_values")}
    views = {name: view.clone() for name, view in expected.items()}
    views["high_res_pixel_values"][0, 1, 2, 3] = -3 / 255 / STD[1, 0, 0]
    assert get_deviations(views, expected) == {"pixel_values": 0, "high_res_pixel_values": pytest.approx(3)}


@pytest.mark.parametrize("option, named", [({"side": 1000}, "--side"), ({"shrink": 0}, "--shrink")])
def test_refused_options(option, named):
    with pytest.raises(ValueError, match=f"{named} must be .* but got {next(iter(option.values()))}"):
        PreprocessingArguments(**option)
