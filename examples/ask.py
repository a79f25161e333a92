# SPDX-License-Identifier: Apache-2.0
"""
A question about a picture, through transformers' `pipeline`:

    python -m examples.ask --picture photo.jpg --question "What is written on the small sign?"
"""

import argparse
import sys
from pathlib import Path

from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--picture", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--question", default="What does the green sign say?")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()

    pipe = pipeline("image-text-to-text", model=arguments.model, device_map="auto")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": arguments.picture},
                {"type": "text", "text": arguments.question},
            ],
        }
    ]
    output = pipe(messages, max_new_tokens=arguments.max_new_tokens, return_full_text=False)
    print(output[0]["generated_text"].strip())


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
