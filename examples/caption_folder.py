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


def read_left(file: Path, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """
    Those of the rows that have no answer in the file yet. Their errors, and the partial line that a kill may leave,
    are removed from it.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    names, wanted = list(rows[0]) if rows else [], {tuple(row.values()) for row in rows}
    done, kept = set(), []
    try:
        for line in (line for line in lines if line.endswith(b"\n")):
            answered = json.loads(line)
            key = tuple(answered[name] for name in names)
            if "error" not in answered or key not in wanted:
                kept.append(line)
                done.add(key)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"--output: {file} is not a file of answers. Name another file.") from None
    if len(kept) < len(lines):
        with new_file(file) as new:
            new.write_bytes(b"".join(kept))
    return [row for row in rows if tuple(row.values()) not in done]


def answer(pipe, rows: list[dict[str, str]], folder: Path, max_new_tokens: int) -> list[dict[str, str]]:
    """The rows, each with the answer to its `question` about its `image`, or with an error."""
    try:
        images = [pipe.processor.image_processor.fetch_images(folder / row["image"]) for row in rows]
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": image}, {"type": "text", "text": row["question"]}],
                }
            ]
            for image, row in zip(images, rows, strict=True)
        ]
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        outputs = pipe(chats, batch_size=len(chats), generate_kwargs=options, return_full_text=False)
    except ValueError as error:
        if len(rows) > 1:  # one by one, to isolate the failing one
            return [answered for row in rows for answered in answer(pipe, [row], folder, max_new_tokens)]
        return [{**rows[0], "error": str(error)}]
    return [{**row, "answer": output[0]["generated_text"].strip()} for row, output in zip(rows, outputs, strict=True)]


def write_answers(
    pipe, rows: list[dict[str, str]], num_done: int, folder: Path, arguments: argparse.Namespace
) -> None:
    """Appends answers to `arguments.output`, batch by batch."""
    with (
        arguments.output.open("a", encoding="utf-8") as file,
        tqdm(total=num_done + len(rows), initial=num_done, unit="question") as progress,
    ):
        for first in range(0, len(rows), arguments.batch_size):
            batch = rows[first : first + arguments.batch_size]
            answered = answer(pipe, batch, folder, arguments.max_new_tokens)
            file.write("".join(json.dumps(row) + "\n" for row in answered))
            file.flush()
            progress.update(len(batch))


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
    names = sorted(path.name for path in arguments.folder.iterdir() if path.suffix.lower() in suffixes)
    rows = [{"image": name, "question": arguments.question} for name in names]
    left = read_left(arguments.output, rows)
    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    write_answers(pipe, left, len(rows) - len(left), arguments.folder, arguments)


if __name__ == "__main__":
    run_command(main)
