# SPDX-License-Identifier: Apache-2.0
"""
A chat about an image over several turns, with streamed answers; the image is encoded once:

    python -m examples.chat --image photo.jpg

Questions are read line by line; an empty line ends the chat.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


HERE = Path(__file__).parent


def read_questions() -> Iterator[str]:
    try:
        while question := input("You:   ").strip():
            yield question
    except (EOFError, KeyboardInterrupt):
        pass


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--image", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="longest answer")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages, encoded = [], None
    for question in read_questions():
        content = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image", "path": arguments.image})
        messages.append({"role": "user", "content": content})
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        views = {name: inputs.pop(name) for name in {"pixel_values", "image_sizes"} & inputs.keys()}
        encoded = encoded or {"image": model.get_image_features(**views)}

        print("Model: ", end="", flush=True)
        output = model.generate(
            **inputs,
            mm_encoder_outputs=encoded,
            streamer=streamer,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


if __name__ == "__main__":
    run_command(main)
