# SPDX-License-Identifier: Apache-2.0
"""
Asks where something is, and draws the box of the answer:

    python -m examples.locate --model llava-hr-7b-sft-1024-hf --image photo.jpg --phrase "the red sign"

writes box.png. The released models were trained on such questions. Boxes are [x1, y1, x2, y2], from 0 to 1, of the
image padded to a square, as in the Visual Genome part of the data. (Boxes of its RefCOCO part are said not to consider
the padding: github.com/haotian-liu/LLaVA, issues 606 and 822. For a square image there is no difference.) The tiny
model has not learned to answer with boxes.
"""

import argparse
import re

from PIL import ImageDraw
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}"
NUMBER = r"\s*([01](?:\.\d*)?|\.\d+)\s*"
BOX = re.compile(rf"\[{NUMBER},{NUMBER},{NUMBER},{NUMBER}\]")


def parse_box(answer: str) -> tuple[float, float, float, float]:
    """The first box in an answer: left, top, right, bottom, from 0 to 1."""
    match = BOX.search(answer)
    left, top, right, bottom = map(float, match.groups()) if match else (0, 0, 0, 0)
    if not (left < right <= 1 and top < bottom <= 1):
        raise ValueError(f"The answer has no box [x1, y1, x2, y2] with numbers from 0 to 1: {answer!r}.")
    return left, top, right, bottom


def to_pixels(box: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """
    Maps a box of the padded square back to the image.

    Args:
        box (`tuple`): Left, top, right, bottom as parts of the square's side.
        width, height (`int`): Of the image in pixels. The shorter side is padded, `(side - shorter) // 2` before it.

    Returns:
        `tuple[int, int, int, int]`: Left, top, right, bottom in pixels of the image, without what is in the padding.
    """
    side = max(width, height)
    left, right = (round(side * value) - (side - width) // 2 for value in box[::2])
    top, bottom = (round(side * value) - (side - height) // 2 for value in box[1::2])
    clipped = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise ValueError(f"The box {list(box)} is in the padding of the image.")
    return clipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="folder or Hub id of a model that was trained on boxes")
    parser.add_argument("--image", required=True, help="file")
    parser.add_argument("--phrase", required=True, help="what to locate")
    parser.add_argument("--output", default="box.png", help="the image with the box")
    arguments = parser.parse_args()

    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    image = pipe.processor.image_processor.fetch_images(arguments.image).convert("RGB")
    text = QUESTION.format(arguments.phrase)
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    output = pipe([{"role": "user", "content": content}], max_new_tokens=50, return_full_text=False)
    box = to_pixels(parse_box(output[0]["generated_text"]), *image.size)
    print(f"pixels {box[0]}-{box[2]} x {box[1]}-{box[3]}")
    ImageDraw.Draw(image).rectangle(box, outline="red", width=max(2, max(image.size) // 200))
    image.save(arguments.output)


if __name__ == "__main__":
    run_command(main)
