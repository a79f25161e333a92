# SPDX-License-Identifier: Apache-2.0
"""
Where the high-resolution pathway contributed, as a picture:

    python -m examples.heat_map --picture photo.jpg --output heat_map.png

The heat of a place is how far its feature moves when nothing of the high-resolution pathway is let through, as in the
Space (`get_high_res_contribution` in examples/space/engine.py); beside it the gate of each MR-Adapter, 0 where it lets
nothing of the high-resolution view in.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from examples.space.engine import get_high_res_contribution


HERE = Path(__file__).parent


def to_picture(view: torch.Tensor, processor) -> Image.Image:
    """A view `(3, side, side)` of the image processor as it was before normalisation."""
    mean, std = (view.new_tensor(getattr(processor.image_processor, name)) for name in ("image_mean", "image_std"))
    pixels = view.permute(1, 2, 0) * std + mean
    return Image.fromarray((pixels.clamp(0, 1) * 255).byte().cpu().numpy())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--picture", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--output", default="heat_map.png", help="PNG file")
    arguments = parser.parse_args()
    if find_spec("matplotlib") is None:
        sys.exit('error: drawing needs matplotlib: pip install ".[training]" in the checkout')
    from matplotlib.figure import Figure

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    image = processor.image_processor.fetch_images(arguments.picture)
    views = processor.image_processor(image, return_tensors="pt").to(model.device)
    low_res, high_res = views["low_res_pixel_values"], views["pixel_values"]
    encoded, heat = get_high_res_contribution(model, high_res, low_res)
    gates = [gate.float().mean().item() for gate in encoded.mr_adapter_gates]

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.6))
    for axis, view, name in ((axes[0], low_res, "low"), (axes[1], high_res, "high"), (axes[2], high_res, "high")):
        axis.imshow(to_picture(view[0], processor), extent=(0, 1, 1, 0))
        axis.set(title=f"{name}-resolution view, {view.shape[-1]} px", xticks=[], yticks=[])
    axes[2].imshow(heat[0].cpu().numpy(), extent=(0, 1, 1, 0), cmap="inferno", alpha=0.7, interpolation="bilinear")
    axes[2].set_title("where it contributed")
    axes[3].bar([f"{layer}" for layer in model.config.mr_adapter_layers], gates, color="tab:orange")
    axes[3].axhline(0, color="black", linewidth=0.8)
    axes[3].set(title="gates", xlabel="MR-Adapter before layer")
    figure.savefig(arguments.output, dpi=120)
    print(f"gates: {', '.join(f'{gate:.3f}' for gate in gates)}\n{arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
