# SPDX-License-Identifier: Apache-2.0
"""
What `make demo` runs: the tiny LLaVA-HR that is shipped with this project reads fine print, on a CPU in seconds.

It was trained from scratch by this project's own pipeline, on drawn images only (docs/results.md). At the end it
gets a photograph, which is out of its domain.
"""

import json
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command

from .heat_map import draw_panels, to_image


EXAMPLES = Path(__file__).parent
OUTPUT = EXAMPLES.parent / ".cache" / "demo"
SCENE = "street"


def main() -> None:
    pipe = pipeline("image-text-to-text", model=str(EXAMPLES / "tiny-llava-hr"))

    def ask(image: Image.Image, question: str) -> str:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        output = pipe(messages, max_new_tokens=12, return_full_text=False)
        return output[0]["generated_text"].strip()

    with Image.open(EXAMPLES / "pictures" / f"{SCENE}.jpg") as file:
        image = file.convert("RGB")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    views = pipe.processor.image_processor(image, return_tensors="pt")
    low_res, high_res = (to_image(views[name][0], pipe.processor) for name in ("low_res_pixel_values", "pixel_values"))
    draw_panels(ViT=low_res, ConvNeXt=high_res).save(OUTPUT / "views.png")
    print(f"\nA {SCENE}, {image.width} x {image.height} pixels; both views are in {OUTPUT / 'views.png'}.")
    rows = map(json.loads, (EXAMPLES / "pictures" / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    turns = next(row["conversations"] for row in rows if row["id"] == SCENE)
    for question, expected in zip(turns[::2], turns[1::2], strict=True):
        question = question["value"].removeprefix("<image>\n")
        answer = ask(image, question)
        verdict = "right" if answer == expected["value"] else f"wrong: {expected['value']}"
        print(f"  {question:38} {answer:14} ({verdict})")

    photograph = Image.fromarray(load_sample_image("china.jpg"))
    question = "What is shown?"
    print("\nA photograph of a palace (scikit-learn's china.jpg), unlike its training data:")
    print(f"  {question:38} {ask(photograph, question)}")


if __name__ == "__main__":
    run_command(main)
