# SPDX-License-Identifier: Apache-2.0
"""
A question about an image, through transformers' `pipeline`:

    python -m examples.ask --image photo.jpg --question "What is written on the small sign?"
"""

import argparse
from pathlib import Path

from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--image", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--question", default="What does the green sign say?")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()

    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    content = [{"type": "image", "path": arguments.image}, {"type": "text", "text": arguments.question}]
    messages = [{"role": "user", "content": content}]
    output = pipe(messages, max_new_tokens=arguments.max_new_tokens, return_full_text=False)
    print(output[0]["generated_text"].strip())


if __name__ == "__main__":
    run_command(main)
