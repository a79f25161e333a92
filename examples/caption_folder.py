# SPDX-License-Identifier: Apache-2.0
"""
The same question about every image of a folder, in batches, into a file of JSON lines:

    python -m examples.caption_folder --folder photos --output captions.jsonl --question "Describe the image."

Run again, it resumes where it was stopped or killed. An image that cannot be read becomes a row with an `error`; the
next run tries it again.
"""

import argparse
import json
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import new_file, run_command


HERE = Path(__file__).parent


def read_done(file: Path, question: str) -> set[str]:
    """Names of the images that have an answer. Errors, and the partial line that a kill may leave, are removed."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    try:
        rows = [(line, json.loads(line)) for line in lines if line.endswith(b"\n")]
        kept = [(line, row) for line, row in rows if row["question"] != question or "error" not in row]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"--output: {file} is not a file of captions. Name another file.") from None
    if len(kept) < len(lines):
        with new_file(file) as new:
            new.write_bytes(b"".join(line for line, _ in kept))
    return {row["image"] for _, row in kept if row["question"] == question}


def answer(pipe, paths: list[Path], question: str, max_new_tokens: int) -> list[dict[str, str]]:
    """One row per image."""
    rows = [{"image": path.name, "question": question} for path in paths]
    try:
        images = [pipe.processor.image_processor.fetch_images(path) for path in paths]
        contents = [[{"type": "image", "image": image}, {"type": "text", "text": question}] for image in images]
        chats = [[{"role": "user", "content": content}] for content in contents]
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        outputs = pipe(chats, batch_size=len(chats), generate_kwargs=options, return_full_text=False)
    except ValueError as error:
        if len(paths) > 1:  # one by one, to find the one that fails
            return [row for path in paths for row in answer(pipe, [path], question, max_new_tokens)]
        return [{**rows[0], "error": str(error)}]
    return [{**row, "answer": output[0]["generated_text"].strip()} for row, output in zip(rows, outputs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--folder", type=Path, default=HERE / "pictures", help="folder with images")
    parser.add_argument("--output", type=Path, default=Path("captions.jsonl"), help="file that rows are appended to")
    parser.add_argument("--question", default="What is shown?")
    parser.add_argument("--batch_size", type=int, default=4, help="images per batch")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest answer")
    arguments = parser.parse_args()

    suffixes = Image.registered_extensions()
    paths = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in suffixes)
    done = read_done(arguments.output, arguments.question)
    left = [path for path in paths if path.name not in done]
    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    with (
        arguments.output.open("a", encoding="utf-8") as file,
        tqdm(total=len(paths), initial=len(paths) - len(left), unit="image") as progress,
    ):
        for first in range(0, len(left), arguments.batch_size):
            batch = left[first : first + arguments.batch_size]
            rows = answer(pipe, batch, arguments.question, arguments.max_new_tokens)
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            progress.update(len(batch))


if __name__ == "__main__":
    run_command(main)
