# SPDX-License-Identifier: Apache-2.0
"""
What `make demo` runs: the tiny LLaVA-HR that is shipped with this project reads fine print, on a CPU in seconds.

It was trained from nothing by this project's own pipeline, on drawn pictures alone (docs/results.md). At the end it is
shown a photograph, which is nothing like those.
"""

import json
from pathlib import Path

from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)

from .heat_map import to_picture


EXAMPLES = Path(__file__).parent
OUTPUT = EXAMPLES.parent / ".cache" / "demo"
SCENE = "street"


def draw_views(processor, picture: Image.Image) -> Image.Image:
    """What the two pathways see of a picture, side by side and at the same height."""
    views = processor.image_processor(picture, return_tensors="pt")
    side, margin = 512, 28
    canvas = Image.new("RGB", (2 * side + margin, side + margin), "white")
    for index, (name, title) in enumerate((("low_res_pixel_values", "ViT"), ("pixel_values", "ConvNeXt"))):
        panel = to_picture(views[name][0], processor)
        left = index * (side + margin)
        canvas.paste(panel.resize((side, side), Image.Resampling.NEAREST), (left, margin))
        text = f"what the {title} sees: {panel.width} x {panel.height} pixels"
        ImageDraw.Draw(canvas).text((left, 6), text, fill="black", font_size=16)
    return canvas


def main() -> None:
    pipe = pipeline("image-text-to-text", model=str(EXAMPLES / "tiny-llava-hr"))

    def ask(picture: Image.Image, question: str) -> str:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        output = pipe(messages, max_new_tokens=12, return_full_text=False)
        return output[0]["generated_text"].strip()

    with Image.open(EXAMPLES / "pictures" / f"{SCENE}.jpg") as file:
        picture = file.convert("RGB")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    draw_views(pipe.processor, picture).save(OUTPUT / "views.png")
    print(f"\nA {SCENE}, {picture.width} x {picture.height} pixels; both views are in {OUTPUT / 'views.png'}.")
    rows = map(json.loads, (EXAMPLES / "pictures" / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    turns = next(row["conversations"] for row in rows if row["id"] == SCENE)
    for question, expected in zip(turns[::2], turns[1::2], strict=True):
        question = question["value"].removeprefix("<image>\n")
        answer = ask(picture, question)
        verdict = "right" if answer == expected["value"] else f"wrong: {expected['value']}"
        print(f"  {question:38} {answer:14} ({verdict})")

    photograph = Image.fromarray(load_sample_image("china.jpg"))
    question = "What is shown?"
    print("\nA photograph of a palace (scikit-learn's china.jpg), nothing like what it was trained on:")
    print(f"  {question:38} {ask(photograph, question)}")


if __name__ == "__main__":
    main()
