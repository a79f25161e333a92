# SPDX-License-Identifier: Apache-2.0
"""
Several images: each by itself, and all in one chat, answered in one padded batch:

    python -m examples.several_images a.jpg b.jpg c.jpg --question "What is the same in these images?"

The released models and the tiny one were trained with one image per chat: do not expect much about several.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


HERE = Path(__file__).parent
IMAGES = [str(HERE / "pictures" / name) for name in ("street.jpg", "receipt.jpg")]


def make_chat(paths: list[str], question: str) -> list[dict]:
    images = [{"type": "image", "path": path} for path in paths]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("images", nargs="*", default=IMAGES, help="files or URLs")
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--question", default="What is shown?")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    groups = [[path] for path in arguments.images] + [arguments.images]
    inputs = processor.apply_chat_template(
        [make_chat(group, arguments.question) for group in groups],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for group, answer in zip(groups, answers, strict=True):
        print(f"{' + '.join(Path(path).name for path in group)}: {answer.strip()}")


if __name__ == "__main__":
    run_command(main)
