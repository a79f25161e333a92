# SPDX-License-Identifier: Apache-2.0
"""
Encode a picture once, ask many questions: the towers run a single time.

    python -m examples.encode_once --picture photo.jpg "What is shown?" "What does the sign say?"
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


HERE = Path(__file__).parent
QUESTIONS = ["What is shown?", "What does the green sign say?", "What shape is red?"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--picture", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    image = processor.image_processor.fetch_images(arguments.picture)
    start = time.perf_counter()
    views = processor.image_processor(image, return_tensors="pt").to(model.device)
    encoded = model.get_image_features(**views)
    print(f"{time.perf_counter() - start:.2f} s for the picture: {encoded.pooler_output.shape[1]} visual tokens")
    for question in arguments.questions:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        start = time.perf_counter()
        output = model.generate(
            **text, mm_encoder_outputs={"image": encoded}, max_new_tokens=arguments.max_new_tokens, do_sample=False
        )
        answer = processor.decode(output[0, text["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{time.perf_counter() - start:.2f} s for {question!r}: {answer}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
