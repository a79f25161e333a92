# SPDX-License-Identifier: Apache-2.0
"""
4-bit weights (NF4) in the language model: their size, an answer, and how to save them.

    python -m examples.four_bit --model llava-hr-7b-sft-1024-hf --save llava-hr-7b-sft-1024-4bit

Towers, MR-Adapters, projector and output layer are not quantized.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import get_4bit_config, new_folder, run_command


HERE = Path(__file__).parent


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--image", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--question", default="What does the green sign say?")
    parser.add_argument("--save", help="folder for the 4-bit model")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()
    if find_spec("bitsandbytes") is None:
        sys.exit('error: 4-bit weights need bitsandbytes: pip install ".[quantization]" in the checkout')

    with torch.device("meta"):  # shapes without weights
        full = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(arguments.model)).bfloat16()
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model, quantization_config=get_4bit_config(), dtype=torch.bfloat16, device_map="auto"
    )
    processor = AutoProcessor.from_pretrained(arguments.model)
    for name, some_model in (("bfloat16", full), ("4-bit", model)):
        print(f"{name}: {some_model.get_memory_footprint() / 1e6:,.1f} MB")
    if arguments.save:  # before the first forward pass, in which a CPU repacks 4-bit weights
        with new_folder(arguments.save, "--save") as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)

    content = [{"type": "image", "path": arguments.image}, {"type": "text", "text": arguments.question}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    run_command(main)
