# SPDX-License-Identifier: Apache-2.0
"""TRL's own trainers, as shipped, on the tiny model: conversational data with `images`, no code of ours between."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import trl
from chats import chat, tokenize
from converted_checkpoints import ROOT, TINY_MODEL
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from examples.grpo import make_questions


# TRL 1.16 on transformers 5.24, and its experimental parts
pytestmark = pytest.mark.filterwarnings("default")

QUESTION, RIGHT, WRONG = "What does the green sign say?", "1471", "9999"


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def make_rows(num_images: int, **columns) -> Dataset:
    """Four rows of one prompt with so many images each; the columns are the same in every row."""
    with Image.open(ROOT / "examples" / "pictures" / "street.jpg") as file:
        image = file.convert("RGB")
    prompt = [{"role": "user", "content": QUESTION}]
    return Dataset.from_list([{"prompt": prompt, "images": [image] * num_images, **columns}] * 4)


def reward_by_place(completions, **kwargs) -> list[float]:
    """Differs within each group, so that every step has an advantage to learn from."""
    return [float(index % 2) for index in range(len(completions))]


def make_trainer(kind: str, folder: Path, num_images: int = 1, model=None, **options):
    """A trainer of two steps with the tiny model in float32."""
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer  # warns of being experimental

    preferences = {"chosen": answer(RIGHT), "rejected": answer(WRONG)}
    trainer_class, config_class, columns, arguments = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {"completion": answer(RIGHT)}, {"max_length": None}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, preferences, {"max_length": None}),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig, {}, {"beta": 0.1}),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig, {}, {"beta": 0.1}),
        "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig, {}, {"max_length": 512, "max_new_tokens": 4}),
        "reward": (trl.RewardTrainer, trl.RewardConfig, preferences, {"max_length": None}),
    }[kind]
    if kind in ("grpo", "rloo"):
        arguments |= {"num_generations": 2, "max_completion_length": 4}
    if kind in ("grpo", "rloo", "online_dpo"):
        options["reward_funcs"] = reward_by_place
    config = config_class(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        **arguments,
    )
    model = model or AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(TINY_MODEL)
    rows = make_rows(num_images, **columns)
    if kind == "online_dpo":  # knows one image a row
        rows = Dataset.from_list([{"prompt": row["prompt"], "image": row["images"][0]} for row in rows])
    return trainer_class(model=model, args=config, train_dataset=rows, processing_class=processor, **options)


def take_two_steps(trainer) -> None:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(torch.tensor(losses).isfinite())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "rloo"])
def test_two_steps(kind, num_images, lora, tmp_path):
    """With gradient checkpointing, which TRL switches on; "all-linear" takes towers and language model."""
    options = {"peft_config": LoraConfig(target_modules="all-linear", r=4)} if lora else {}
    trainer = make_trainer(kind, tmp_path, num_images, **options)
    assert trainer.args.gradient_checkpointing
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    take_two_steps(trainer)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved) == lora
    for part in ("high_res_tower", "mr_adapters", "vision_tower.layers", "language_model"):
        assert any(part in name for name in moved), part


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "rloo"])
def test_two_steps_with_unpad(kind, tmp_path):
    """Images of several shapes, as many as TRL hands on with their `image_sizes`."""
    trainer = make_trainer(kind, tmp_path, num_images=2)
    trainer.processing_class.image_processor.unpad = True
    boxes = [(0, 60, 256, 204), (80, 0, 165, 256)]
    images = [image.crop(box) for image, box in zip(trainer.train_dataset[0]["images"], boxes, strict=True)]
    rows = [{**row, "images": images} for row in trainer.train_dataset]
    rows[1]["images"] = images[::-1]
    trainer.train_dataset = Dataset.from_list(rows)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("image_sizes")), with_kwargs=True
    )
    take_two_steps(trainer)
    sizes = [size for batch in seen if batch is not None for size in batch.tolist()]
    assert {tuple(size) for size in sizes} == {(144, 256), (256, 85)}


def test_online_dpo_sees_the_images(tmp_path):
    """TRL looks in one of transformers' lists, rather than at the model, whether a model takes images."""
    trainer, seen = make_trainer("online_dpo", tmp_path), []
    trainer.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("pixel_values") is not None), with_kwargs=True
    )
    take_two_steps(trainer)
    assert any(seen)


def test_log_probabilities_of_dpo_are_those_of_the_model(tmp_path):
    """By hand from `model(**inputs)`: the sum over the answer's tokens and the end token."""
    trainer = make_trainer("dpo", tmp_path)
    model, processor = trainer.model.eval(), trainer.processing_class
    expected = {}
    for name in ("chosen", "rejected"):
        row = trainer.train_dataset[0]
        question = chat(QUESTION, row["images"][0])
        prompt = tokenize(processor, question)
        whole = tokenize(processor, question + row[name], add_generation_prompt=False)
        length = prompt["input_ids"].shape[1]
        with torch.no_grad():
            log_probabilities = model(**whole).logits[0, length - 1 : -1].log_softmax(-1)
        ids = whole["input_ids"][0, length:]
        assert processor.decode(ids).strip() == f"{row[name][0]['content']}</s>"
        expected[f"logps/{name}"] = log_probabilities.gather(1, ids[:, None]).sum().item()
    metrics = trainer.evaluate(trainer.train_dataset)
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-3)


def test_a_folder_alone_is_enough(tmp_path):
    """TRL finds the class of a folder's model by itself; such a folder has none of the code."""
    trainer = make_trainer("sft", tmp_path, model=str(TINY_MODEL))
    assert type(trainer.model).__name__ == "LlavaHrForConditionalGeneration"
    trainer.train()


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_examples(name, tmp_path, monkeypatch, capsys):
    example = importlib.import_module(f"examples.{name}")
    monkeypatch.setattr(example, "make_questions", lambda split, num_images: make_questions(split, num_images=2))
    batch = ["--per_device_train_batch_size", "4", *(["--num_generations", "2"] if name == "grpo" else [])]
    options = ["--output_dir", str(tmp_path), "--max_steps", "2", "--logging_steps", "1", *batch]
    monkeypatch.setattr(sys, "argv", [name, *options, "--use_cpu", "true"])
    example.main()
    assert (tmp_path / "model.safetensors").exists()
    assert name == "dpo" or "mean reward: " in capsys.readouterr().out


def test_reward_models_are_not_for_images(tmp_path):
    """transformers has no sequence classification of image and text."""
    with pytest.raises(ValueError, match="reward models require `num_labels=1`"):
        make_trainer("reward", tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class.*AutoModelForSequenceClassification"):
        make_trainer("reward", tmp_path, model=str(TINY_MODEL))
