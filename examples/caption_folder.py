# SPDX-License-Identifier: Apache-2.0
"""
The same question about every picture of a folder, in batches, into a file of JSON lines:

    python -m examples.caption_folder --folder photos --output captions.jsonl --question "Describe the picture."

Started again, it goes on where it was stopped or killed. A picture that cannot be read becomes a row with an `error`;
the next start tries it again.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


HERE = Path(__file__).parent


def read_done(file: Path, question: str) -> set[str]:
    """Names of the pictures that have an answer. Errors, and the half line that a kill may leave, leave the file."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    try:
        rows = [(line, json.loads(line)) for line in lines if line.endswith(b"\n")]
        kept = [(line, row) for line, row in rows if row["question"] != question or "error" not in row]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"--output: {file} holds other things than rows of captions. Name another file.") from None
    if len(kept) < len(lines):
        new = file.with_name(f"{file.name}.new")
        new.write_bytes(b"".join(line for line, _ in kept))
        new.replace(file)  # at once: a kill leaves one of the two
    return {row["picture"] for _, row in kept if row["question"] == question}


def answer(pipe, paths: list[Path], question: str, max_new_tokens: int) -> list[dict[str, str]]:
    """One row for each picture."""
    rows = [{"picture": path.name, "question": question} for path in paths]
    try:
        images = [pipe.processor.image_processor.fetch_images(path) for path in paths]
        contents = [[{"type": "image", "image": image}, {"type": "text", "text": question}] for image in images]
        chats = [[{"role": "user", "content": content}] for content in contents]
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "return_full_text": False}
        outputs = pipe(chats, batch_size=len(chats), **options)
    except ValueError as error:
        if len(paths) > 1:  # one by one, to find out which it is
            return [row for path in paths for row in answer(pipe, [path], question, max_new_tokens)]
        return [{**rows[0], "error": str(error)}]
    return [{**row, "answer": output[0]["generated_text"].strip()} for row, output in zip(rows, outputs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--folder", type=Path, default=HERE / "pictures", help="folder with pictures")
    parser.add_argument("--output", type=Path, default=Path("captions.jsonl"), help="file that rows are added to")
    parser.add_argument("--question", default="What is shown?")
    parser.add_argument("--batch_size", type=int, default=4, help="pictures at a time")
    parser.add_argument("--max_new_tokens", type=int, default=100, help="longest answer")
    arguments = parser.parse_args()

    suffixes = Image.registered_extensions()
    paths = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in suffixes)
    done = read_done(arguments.output, arguments.question)
    left = [path for path in paths if path.name not in done]
    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    with (
        arguments.output.open("a", encoding="utf-8") as file,
        tqdm(total=len(paths), initial=len(paths) - len(left), unit="picture") as progress,
    ):
        for first in range(0, len(left), arguments.batch_size):
            batch = left[first : first + arguments.batch_size]
            rows = answer(pipe, batch, arguments.question, arguments.max_new_tokens)
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            progress.update(len(batch))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {error}")
