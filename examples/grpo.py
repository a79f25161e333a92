# SPDX-License-Identifier: Apache-2.0
"""
Reinforcement learning with TRL's GRPOTrainer: the reward is an exact answer to FinePrint's questions about texts.

    python -m examples.grpo --output_dir tiny-grpo      # raises the tiny model's reward in minutes on a CPU

Your own data needs `images` and `prompt`, and the columns that your reward function reads. Every field of `GRPOConfig`
and `ModelConfig` is an option.
"""

import io
from pathlib import Path

from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command
from training.tiny.fineprint import FinePrintConfig, draw_sample, get_questions


def make_questions(split: str, num_images: int) -> list[dict]:
    """Rows with `images`, `prompt` and `answer`: every question about a text in newly drawn images."""
    rows, config = [], FinePrintConfig(size=256, seed=7)
    for index in range(num_images):
        file, scene = draw_sample(config, split, index)
        for kind, question, answer in get_questions(scene):
            if kind == "fine":
                prompt = [{"role": "user", "content": question}]
                rows.append({"images": [Image.open(io.BytesIO(file))], "prompt": prompt, "answer": answer})
    return rows


def exact_match(completions: list[list[dict]], answer: list[str], **kwargs) -> list[float]:
    """1 for each completion that is the answer, else 0."""
    texts = (completion[0]["content"].strip() for completion in completions)
    return [float(text == expected) for text, expected in zip(texts, answer, strict=True)]


def main() -> None:
    parser = TrlParser((GRPOConfig, ModelConfig))
    parser.set_defaults(
        model_name_or_path=str(Path(__file__).parent / "tiny-llava-hr"),
        dtype="float32",
        bf16=False,
        max_steps=40,
        num_generations=8,
        per_device_train_batch_size=64,
        max_completion_length=8,
        learning_rate=1e-4,
        temperature=1.0,
        logging_steps=5,
        gradient_checkpointing=False,
        lora_target_modules=[r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"],
        report_to=[],
    )
    arguments, model_arguments = parser.parse_args_and_config()
    trainer = GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(
            model_arguments.model_name_or_path, dtype=model_arguments.dtype
        ),
        reward_funcs=exact_match,
        args=arguments,
        train_dataset=Dataset.from_list(make_questions("train", 24)),
        processing_class=AutoProcessor.from_pretrained(model_arguments.model_name_or_path),
        peft_config=get_peft_config(model_arguments),
    )
    trainer.train()
    trainer.save_model()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    print(f"mean reward: {rewards[0]:.3f} in the first steps, {rewards[-1]:.3f} in the last")


if __name__ == "__main__":
    run_command(main)
