# SPDX-License-Identifier: Apache-2.0
"""
A sharper high-resolution view at the same number of visual tokens.

    python -m examples.resolution --model llava-hr-7b-sft-1024-hf --sizes 256 512 1024

Prints, for each side of the high-resolution view, tokens, seconds (image preparation excluded) and the answer.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


HERE = Path(__file__).parent


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--image", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--question", default="What does the green sign say?")
    parser.add_argument("--sizes", type=int, nargs="+", help="sides of the image; default: 1/4, 1/2, 1 of the model's")
    parser.add_argument("--low_res_size", type=int, help="side of the low-resolution view; default: the model's")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="longest answer")
    arguments = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    own = processor.image_processor.size["height"]
    low_res_size = arguments.low_res_size or processor.image_processor.get_low_res_size()
    content = [{"type": "image", "path": arguments.image}, {"type": "text", "text": arguments.question}]
    messages = [{"role": "user", "content": content}]
    print("   size  low-res  visual tokens  seconds  answer")
    for size in arguments.sizes or [own // 4, own // 2, own]:
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"size": size, "low_res_size": low_res_size},
        ).to(model.device)
        num_tokens = (inputs["input_ids"] == processor.image_token_id).sum().item()
        model.generate(**inputs, max_new_tokens=1, do_sample=False)  # the first use of a size is slower
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        seconds = time.perf_counter() - start
        print(f"{size:7}  {low_res_size:7}  {num_tokens:13}  {seconds:7.2f}  {answer.strip()}")


if __name__ == "__main__":
    run_command(main)
