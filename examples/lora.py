# SPDX-License-Identifier: Apache-2.0
"""
LoRA on your own data, then one merged model that loads like any other:

    python -m examples.lora --model llava-hr-7b-sft-1024-hf --data mine.jsonl --output llava-hr-7b-mine --bf16 true

`--data` is in any format of docs/training.md, with its images beside it. Options that this example does not know go
to training.train, such as `--num_train_epochs 3`, `--lora_r 128`, `--dtype bfloat16`.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import check_new_folder, new_folder, run_command


HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], epilog="Others go to training.train.")
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--data", default=str(HERE / "pictures" / "questions.jsonl"), help="LLaVA format")
    parser.add_argument("--output", default="lora-model", help="folder for the merged model; LoRA's goes beside it")
    arguments, options = parser.parse_known_args()
    check_new_folder(arguments.output)
    if find_spec("peft") is None or find_spec("trl") is None:
        sys.exit('error: LoRA needs PEFT and TRL: pip install ".[training]" in the checkout')
    from peft import PeftConfig, PeftModel

    from training.train import main as train
    from training.train import make_parser

    processor = AutoProcessor.from_pretrained(arguments.model)
    lora = f"{arguments.output}-lora"
    defaults = {
        "stage": "finetune",
        "model_name_or_path": arguments.model,
        "data_path": arguments.data,
        "output_dir": lora,
        "size": processor.image_processor.size["height"],
        "use_peft": True,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
    }
    words = [word for name, value in defaults.items() for word in (f"--{name}", str(value))]
    train(*make_parser().parse_args_and_config([*words, *options]))

    base = AutoModelForImageTextToText.from_pretrained(PeftConfig.from_pretrained(lora).base_model_name_or_path)
    with new_folder(arguments.output) as folder:
        PeftModel.from_pretrained(base, lora).merge_and_unload().save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"python -m examples.ask --model {arguments.output}")


if __name__ == "__main__":
    run_command(main)
