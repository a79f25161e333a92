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
"""
A question about a picture, answered through `pipeline("image-text-to-text")`: `make demo`.

There are no trained weights in this repository yet, so the demo converts a miniature checkpoint with random weights in
the layout of the published ones. It shows that everything works together; the answer itself is noise.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from conversion.convert_llava_hr_weights_to_hf import convert


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "fixtures" / "reference" / "stage2-1024" / "checkpoint"
OUTPUT = ROOT / ".cache" / "demo"
QUESTION = "What is written on the small sign?"


def draw_picture() -> Image.Image:
    """A street scene of 1280 x 960 pixels with a sign that is legible at high resolution only."""
    picture = Image.new("RGB", (1280, 960), "skyblue")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 640, 1280, 960), fill="dimgray")
    draw.rectangle((180, 200, 620, 640), fill="firebrick")
    draw.polygon([(150, 200), (400, 60), (650, 200)], fill="saddlebrown")
    draw.rectangle((900, 380, 906, 700), fill="black")
    draw.rectangle((850, 340, 956, 382), fill="white", outline="navy", width=2)
    draw.text((903, 361), "PLATFORM 4711", fill="navy", font=ImageFont.load_default(12), anchor="mm")
    return picture


def show_views(processor, picture: Image.Image, path: Path) -> None:
    """Saves what the two pathways see, side by side and at the same height, as a PNG file."""
    views = processor.image_processor(picture, return_tensors="pt")
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    panels = []
    for name in ("pixel_values", "high_res_pixel_values"):
        pixels = views[name][0].permute(1, 2, 0) * views[name].new_tensor(std) + views[name].new_tensor(mean)
        panel = Image.fromarray((pixels.clamp(0, 1) * 255).byte().numpy())
        print(f"  {name}: {panel.width} x {panel.height} pixels")
        panels.append(panel)
    side = max(panel.height for panel in panels)
    canvas = Image.new("RGB", (side * len(panels), side))
    for index, panel in enumerate(panels):
        canvas.paste(panel.resize((side, side), Image.Resampling.NEAREST), (index * side, 0))
    canvas.save(path)


def main() -> None:
    model = OUTPUT / "model"
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        convert(str(CHECKPOINT), str(model))
    pipe = pipeline("image-text-to-text", model=str(model))

    picture = draw_picture()
    print("\nThe two views of the picture:")
    show_views(pipe.processor, picture, OUTPUT / "views.png")
    print(f"  side by side in {OUTPUT / 'views.png'}")

    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    answer = pipe([{"role": "user", "content": content}], max_new_tokens=12, return_full_text=False)
    print(f"\nQuestion: {QUESTION}\nAnswer:   {answer[0]['generated_text']!r}")
    print("(Random weights: the answer is noise. Convert a published checkpoint to get real ones, see README.md.)")


if __name__ == "__main__":
    main()
