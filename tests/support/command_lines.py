# SPDX-License-Identifier: Apache-2.0
"""Command lines of small runs of the commands that write something, for [`forked_commands.Commands.run`]."""

from pathlib import Path

from converted_checkpoints import REFERENCE, TINY_MODEL
from forked_commands import CONVERT
from small_training import OPTIONS


CHECKPOINT = REFERENCE / "stage1-384" / "checkpoint"


def convert(output: Path, checkpoint: str | Path = CHECKPOINT) -> tuple:
    return (CONVERT, "--checkpoint", checkpoint, "--output", output)


def caption(images: Path, output: Path) -> tuple:
    """Answers one question about every image of a folder."""
    options = ("--batch_size", "2", "--max_new_tokens", "4")
    return ("examples.caption_folder", "--model", TINY_MODEL, "--folder", images, "--output", output, *options)


def train(model: Path, data: Path, output: Path, *options: str) -> tuple:
    """Stage 1 on `captions.json` of [`small_training.make_data`]."""
    paths = ("--model_name_or_path", model, "--data_path", data / "captions.json", "--output_dir", output)
    batch = ("--per_device_train_batch_size", "4")
    return ("training.train", "--stage", "pretrain", *paths, *OPTIONS, *batch, *options)


def evaluate(data: Path, output: Path) -> tuple:
    """Answers of the tiny model on `train.jsonl` of [`small_training.make_data`]."""
    paths = ("--model", TINY_MODEL, "--data_path", data / "train.jsonl", "--output", output)
    options = ("--batch_size", "2", "--max_new_tokens", "4", "--max_questions", "12", "--device", "cpu")
    return ("training.evaluate", *paths, *options)


def publish(model: Path, repo: str) -> tuple:
    return ("examples.publish", "--model", model, "--repo", repo)
