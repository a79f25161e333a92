# SPDX-License-Identifier: Apache-2.0
"""
Where the high-resolution pathway contributed, as an image:

    python -m examples.heat_map --image photo.jpg --output heat_map.png

The heat of a position is how far its feature moves when the high-resolution pathway is zeroed, as in the Space
(`get_high_res_contribution` in examples/space/engine.py). The gate of each MR-Adapter is printed, 0 where it ignores
the high-resolution view.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from examples.space.engine import draw_heat_map, get_high_res_contribution
from modeling_llava_hr.utils import run_command


HERE = Path(__file__).parent
SIDE, MARGIN = 512, 28  # of a panel, in pixels


def to_image(view: torch.Tensor, processor) -> Image.Image:
    """A view `(3, side, side)` of the image processor as it was before normalisation."""
    mean, std = (view.new_tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    pixels = view.permute(1, 2, 0) * std + mean
    return Image.fromarray((pixels.clamp(0, 1) * 255).byte().cpu().numpy())


def draw_panels(**panels: Image.Image) -> Image.Image:
    """Images side by side, at the same height, each with its name and its own size above it."""
    canvas = Image.new("RGB", (len(panels) * (SIDE + MARGIN) - MARGIN, SIDE + MARGIN), "white")
    for index, (name, panel) in enumerate(panels.items()):
        left = index * (SIDE + MARGIN)
        canvas.paste(panel.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, MARGIN))
        text = f"{name.replace('_', ' ')}: {panel.width} x {panel.height} pixels"
        ImageDraw.Draw(canvas).text((left, 6), text, fill="black", font_size=16)
    return canvas


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--image", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--output", default="heat_map.png", help="PNG file")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    image = processor.image_processor.fetch_images(arguments.image)
    views = processor.image_processor(image, return_tensors="pt").to(model.device)
    encoded, heat = get_high_res_contribution(model, views["pixel_values"], views["low_res_pixel_values"])
    low_res, high_res = (to_image(views[name][0], processor) for name in ("low_res_pixel_values", "pixel_values"))
    heat_map = draw_heat_map(high_res, heat[0].cpu())
    draw_panels(ViT=low_res, ConvNeXt=high_res, contribution_of_the_ConvNeXt=heat_map).save(arguments.output)
    gates = (f"{gate.float().mean().item():.3f}" for gate in encoded.mr_adapter_gates)
    print(f"gates: {', '.join(gates)}\n{arguments.output}")


if __name__ == "__main__":
    run_command(main)
