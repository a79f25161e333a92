# SPDX-License-Identifier: Apache-2.0
"""
Preference training with TRL's DPOTrainer, on FinePrint's questions: the right answer against one with a wrong digit.

    python -m examples.dpo --output_dir tiny-dpo
    python -m examples.dpo --model_name_or_path llava-hr-7b-sft-1024-hf --use_peft --bf16 --output_dir llava-hr-7b-dpo

Your own data needs the same columns: `images`, `prompt`, `chosen`, `rejected`. Every field of `DPOConfig` and
`ModelConfig` is an option.
"""

import random
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command

from .grpo import make_questions


def main() -> None:
    parser = TrlParser((DPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path=str(Path(__file__).parent / "tiny-llava-hr"),
        dtype="float32",
        max_length=None,  # would cut image tokens
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-5,
        logging_steps=5,
        lora_target_modules=[r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"],
        report_to=[],
    )
    arguments, model_arguments = parser.parse_args_and_config()
    rows, digits = [], random.Random(0)
    for row in make_questions("train", 200):
        answer = row.pop("answer")
        place = digits.randrange(len(answer))
        wrong = answer[:place] + digits.choice([digit for digit in "0123456789" if digit != answer[place]])
        pair = {"chosen": answer, "rejected": wrong + answer[place + 1 :]}
        rows.append({**row, **{name: [{"role": "assistant", "content": text}] for name, text in pair.items()}})
    trainer = DPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(
            model_arguments.model_name_or_path, dtype=model_arguments.dtype
        ),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(model_arguments.model_name_or_path),
        peft_config=get_peft_config(model_arguments),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    run_command(main)
