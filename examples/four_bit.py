# SPDX-License-Identifier: Apache-2.0
"""
4-bit weights (NF4) in the language model: what they need, and what they answer.

    python -m examples.four_bit --model llava-hr-7b-sft-1024-hf --save llava-hr-7b-sft-1024-4bit

Towers, MR-Adapters, projector and output layer stay as they are.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


HERE = Path(__file__).parent


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--picture", default=str(HERE / "pictures" / "street.jpg"), help="file or URL")
    parser.add_argument("--question", default="What does the green sign say?")
    parser.add_argument("--save", help="folder for the 4-bit model")
    parser.add_argument("--max_new_tokens", type=int, default=50, help="longest answer")
    arguments = parser.parse_args()
    if find_spec("bitsandbytes") is None:
        sys.exit('error: 4-bit weights need bitsandbytes: pip install ".[quantization]" in the checkout')

    with torch.device("meta"):  # shapes without weights
        full = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(arguments.model)).bfloat16()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model, quantization_config=quantization, dtype=torch.bfloat16, device_map="auto"
    )
    processor = AutoProcessor.from_pretrained(arguments.model)
    for name, some_model in (("bfloat16", full), ("4-bit", model)):
        print(f"{name}: {some_model.get_memory_footprint() / 1e6:,.1f} MB")
    if arguments.save:  # before the first forward pass, in which a CPU repacks 4-bit weights
        model.save_pretrained(arguments.save)
        processor.save_pretrained(arguments.save)

    content = [{"type": "image", "path": arguments.picture}, {"type": "text", "text": arguments.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
    print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
