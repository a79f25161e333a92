# SPDX-License-Identifier: Apache-2.0
"""
From pictures to tensors: both views of LLaVA-HR against the one view of transformers' LLaVA and the released code.

    python -m benchmarks.preprocessing                  # on the CPU
    python -m benchmarks.preprocessing --preset full    # larger batches; torchvision's backends on the GPU

All make views of the same size. LLaVA's is padded to a square, as LLaVA-1.5 is used, and in another row cut to one, as
its image processor does by itself. Pictures are in memory as PIL has them, or bytes of a JPEG file.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlavaImageProcessor, LlavaImageProcessorPil
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrImageProcessorPil

from ._common import BenchmarkArguments, Timing, compare, make_target, ratio, run_benchmark
from ._models import LLAVA_HR_SIDES


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Width and height in pixels
PICTURES = {
    "12 megapixels": (4000, 3000),
    "12 megapixels, upright": (3000, 4000),
    "screen": (1920, 1080),
    "small": (320, 240),
}
# What is divided by what in each case
RATIOS = (("llava", "llava-hr"), ("llava, cropped", "llava-hr"), ("released", "llava-hr, PIL"))


@dataclass
class PreprocessingArguments(BenchmarkArguments):
    """
    Options of this benchmark beside those of every one.

    Args:
        side (`int`): Side of the high-resolution view in pixels, and of LLaVA's only view.
        batch_size (`int`, *optional*): Pictures of a batch; 4 (cpu) or 16 (full) by default.
        shrink (`int`): Divides the sides of all pictures, for a quick try.
    """

    side: int = field(default=1024, metadata={"help": "side of the (high-resolution) view in pixels"})
    batch_size: int | None = field(default=None, metadata={"help": "pictures of a batch"})
    shrink: int = field(default=1, metadata={"help": "divides the sides of all pictures, for a quick try"})

    def __post_init__(self):
        super().__post_init__()
        self.batch_size = self.batch_size or (16 if self.preset == "full" else 4)
        if self.side not in LLAVA_HR_SIDES:
            raise ValueError(f"--side must be one of {', '.join(map(str, LLAVA_HR_SIDES))}, but got {self.side}.")
        if not 1 <= self.shrink <= 100:
            raise ValueError(f"--shrink must be from 1 to 100, but got {self.shrink}.")


def draw_picture(width: int, height: int) -> Image.Image:
    """A picture of random blobs about 8 pixels wide, the same at each call."""
    blobs = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def encode(picture: Image.Image) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def decode(pictures: list[Image.Image | bytes]) -> list[Image.Image]:
    """For those that take no bytes: opens the files; PIL decodes them when they are used."""
    return [Image.open(io.BytesIO(item)) if isinstance(item, bytes) else item for item in pictures]


def prepare_as_released(pictures: list[Image.Image | bytes], side: int, low_res_side: int) -> dict[str, torch.Tensor]:
    """
    Both views by the procedure of the released code: PIL pads and resizes, numpy rescales and normalises as
    transformers' CLIP image processor does, torch makes the low-resolution view of the result.

    Args:
        pictures (`list`): RGB pictures, or files of such.
        side (`int`): Side H of the high-resolution view in pixels.
        low_res_side (`int`): Side L of the low-resolution view in pixels.

    Returns:
        `dict[str, torch.Tensor]`: `pixel_values` `(images, 3, H, H)`, `low_res_pixel_values` `(images, 3, L, L)`.
    """
    mean, std = (np.array(values, np.float32) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    views = []
    for picture in decode(pictures):
        longest = max(picture.size)
        if picture.width != picture.height:
            square = Image.new("RGB", (longest, longest), tuple(int(255 * value) for value in OPENAI_CLIP_MEAN))
            square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
            picture = square
        pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))
        normalized = ((pixels * (1 / 255)).astype(np.float32) - mean) / std  # (H, H, 3)
        views.append(torch.from_numpy(normalized).permute(2, 0, 1))
    high_res = torch.stack(views).contiguous()
    low_res = F.interpolate(high_res, (low_res_side, low_res_side), mode="bilinear", align_corners=True)
    return {"pixel_values": high_res, "low_res_pixel_values": low_res}


def make_contenders(arguments: PreprocessingArguments) -> dict[str, Callable[[list], dict[str, torch.Tensor]]]:
    """What is compared, by name: functions of pictures or bytes that return views."""
    side, low_res_side = arguments.side, LLAVA_HR_SIDES[arguments.side]
    sizes = {"size": side, "low_res_size": low_res_side}
    llava = {"size": {"shortest_edge": side}, "crop_size": side}
    ours, ours_pil = LlavaHrImageProcessor(**sizes), LlavaHrImageProcessorPil(**sizes)
    # as LLaVA-1.5 is used: the whole picture, padded to a square
    theirs, theirs_pil = LlavaImageProcessor(**llava, do_pad=True), LlavaImageProcessorPil(**llava, do_pad=True)
    cropped = LlavaImageProcessor(**llava)
    device = {"device": arguments.device, "return_tensors": "pt"}
    return {
        "llava-hr": partial(ours, **device),
        "llava-hr, PIL": partial(ours_pil, return_tensors="pt"),
        "llava": lambda pictures: theirs(decode(pictures), **device),
        "llava, cropped": lambda pictures: cropped(decode(pictures), **device),
        "llava, PIL": lambda pictures: theirs_pil(decode(pictures), return_tensors="pt"),
        "released": partial(prepare_as_released, side=side, low_res_side=low_res_side),
    }


def make_cases(arguments: PreprocessingArguments) -> dict[str, list[Image.Image | bytes]]:
    """Each size alone, in a batch, and as a JPEG file."""
    cases = {}
    for name, size in PICTURES.items():
        picture = draw_picture(*(max(pixels // arguments.shrink, 1) for pixels in size))
        cases[name] = [picture]
        cases[f"{name}, batch"] = [picture] * arguments.batch_size
        cases[f"{name}, JPEG"] = [encode(picture)]
    return cases


def get_deviations(views: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of each view from the released one, in 1/255 before normalisation."""
    std = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    return {
        name: ((views[name].cpu() - expected[name]) * std * 255).abs().max().item()
        for name in ("pixel_values", "low_res_pixel_values")
    }


def find_targets(timings: dict[str, dict[str, Timing]], arguments: PreprocessingArguments) -> list[dict[str, Any]]:
    """What the project wants, beside what came out; see [`make_target`]."""
    applies, targets = arguments.side == 1024 and arguments.shrink == 1, []
    for name in PICTURES:
        case = timings[name]
        lower = 1.3 if name.startswith("12") else 1
        text = f"LLaVA's time for its view over that for both views, {name}"
        targets.append(make_target(text, ratio(case["llava"], case["llava-hr"]), lower, True, applies))
        text = f"the released procedure's time over the PIL backend's, {name}"
        targets.append(make_target(text, ratio(case["released"], case["llava-hr, PIL"]), 1, True, applies))
    return targets


def draw(figure: "Figure", results: dict[str, Any], arguments: PreprocessingArguments) -> None:
    """Milliseconds per image, for each case and contender."""
    figure.set_size_inches(8, 10)
    cases = results["cases"]
    axes, names = figure.subplots(), list(next(iter(cases.values()))["seconds"])
    height = 0.8 / len(names)
    for row, name in enumerate(names):
        values = [1e3 * case["seconds"][name]["median"] / case["pictures"] for case in cases.values()]
        axes.barh([index + row * height for index in range(len(cases))], values, height=height, label=name)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(cases))], list(cases))
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="milliseconds a picture", title=f"Views of {arguments.side} px")
    axes.legend()


def run(arguments: PreprocessingArguments) -> Iterator[dict[str, Any]]:
    """Measures one case after the other; yields the results after each."""
    contenders, timings, results = make_contenders(arguments), {}, {"cases": {}}
    for name, pictures in make_cases(arguments).items():
        timings[name] = compare({key: partial(view, pictures) for key, view in contenders.items()}, arguments, name)
        expected = contenders["released"](pictures)
        results["cases"][name] = {
            "pictures": len(pictures),
            "seconds": {key: timing.to_dict() for key, timing in timings[name].items()},
            "ratios": {f"{a} / {b}": ratio(timings[name][a], timings[name][b]) for a, b in RATIOS},
            "deviations": {
                key: get_deviations(contenders[key](pictures), expected) for key in ("llava-hr", "llava-hr, PIL")
            },
        }
        yield results
    results["targets"] = find_targets(timings, arguments)
    yield results


def main() -> None:
    run_benchmark("preprocessing", PreprocessingArguments, run, draw)


if __name__ == "__main__":
    main()
