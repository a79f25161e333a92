# SPDX-License-Identifier: Apache-2.0
"""
A question about a PDF, or about an image that is much taller or wider than a square, in overlapping squares:

    python -m examples.long_document invoice.pdf receipt.png --question "What is the total?"

The model sees squares. A tall receipt, padded to one, has small letters; cut into squares, its letters are as large as
the side of a square allows. Each square is asked by itself, or all in one prompt (`--together`), for which the
released models were not trained.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


HERE = Path(__file__).parent
MAX_RATIO = 1.25  # of the long to the short side; what is longer is split
DPI = 150


def read_pages(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """Names and images of the pages of a PDF, or of the one image in a file."""
    if path.suffix.lower() != ".pdf":
        yield path.name, ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        return
    import pypdfium2

    with pypdfium2.PdfDocument(path) as document:
        for number, page in enumerate(document, start=1):
            yield f"{path.name}, page {number}", page.render(scale=DPI / 72).to_pil().convert("RGB")


def split(image: Image.Image, overlap: float) -> list[tuple[int, int, int, int]]:
    """
    Boxes (left, top, right, bottom, in pixels) of squares that cover an image and overlap by at least `overlap` of
    their side; one box, of the whole image, if it is nearly square.
    """
    short, long = sorted(image.size)
    if long <= MAX_RATIO * short:
        return [(0, 0, *image.size)]
    count = math.ceil((long - overlap * short) / (short - overlap * short))
    starts = [round(index * (long - short) / (count - 1)) for index in range(count)]
    if image.width == long:
        return [(start, 0, start + short, short) for start in starts]
    return [(0, start, short, start + short) for start in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "files", nargs="*", type=Path, default=[HERE / "pictures" / "receipt.jpg"], help="PDF or image"
    )
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--question", default="What is the total?")
    parser.add_argument("--overlap", type=float, default=0.2, help="of neighboring squares, as a part of their side")
    parser.add_argument("--together", action="store_true", help="ask about all squares in one prompt")
    parser.add_argument("--batch_size", type=int, default=1, help="prompts at a time")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()
    if not 0 <= arguments.overlap < 1:
        raise ValueError(f"--overlap must be at least 0 and less than 1, but got {arguments.overlap}.")

    names, squares = [], []
    for file in arguments.files:
        for name, page in read_pages(file):
            for box in split(page, arguments.overlap):
                names.append(f"{name}, pixels {box[0]}-{box[2]} x {box[1]}-{box[3]}")
                squares.append({"type": "image", "image": page.crop(box)})
    question = {"type": "text", "text": arguments.question}
    groups = [squares] if arguments.together else [[square] for square in squares]
    chats = [[{"role": "user", "content": [*group, question]}] for group in groups]

    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    options = {"max_new_tokens": arguments.max_new_tokens, "return_full_text": False}
    outputs = pipe(chats, batch_size=arguments.batch_size, **options)
    answers = [output[0]["generated_text"].strip() for output in outputs]
    if arguments.together:
        print(*names, answers[0], sep="\n")
    else:
        print(*(f"{name}: {answer}" for name, answer in zip(names, answers, strict=True)), sep="\n")


if __name__ == "__main__":
    run_command(main)
