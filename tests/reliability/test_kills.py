# SPDX-License-Identifier: Apache-2.0
"""
SIGKILL at random moments of every command that writes something; see `tests/support/kills.py`. (Saving is
transformers' own, file by file: a folder that a kill leaves either does not load, or has all weights.)
"""

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from command_lines import CHECKPOINT, caption, convert, evaluate, make_images, publish, train
from kills import Work, has_first_lines, has_whole_files, is_all_or_nothing, read_files, remove, survive
from loopback_hub import Hub
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_training import get_losses, make_data

from modeling_llava_hr import LlavaHrForConditionalGeneration


pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL"),
    # huggingface_hub's own upload to the large-file storage
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]

REPO = "someone/small"
# What a user of the library writes
SAVE = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
import modeling_llava_hr

source, output = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(source, dtype="auto").save_pretrained(output, max_shard_size="300KB")
AutoProcessor.from_pretrained(source).save_pretrained(output)
"""


def make_works(folder: Path, hub: Hub, model: Path) -> list[Work]:
    converted, saved, trained, answers, evaluated = (
        folder / name for name in ("converted", "saved", "trained", "answers", "evaluated")
    )

    def loads_whole_or_not(seen: dict, whole: dict) -> None:
        try:
            weights = LlavaHrForConditionalGeneration.from_pretrained(saved, dtype="auto").state_dict()
        except (OSError, ValueError, SafetensorError):
            assert seen != whole
        else:
            expected = load_file(model / "model.safetensors")
            assert all(torch.equal(weights[name], expected[name]) for name in expected)

    def read_repository() -> dict[str, bytes]:
        files = hub.read(REPO)[1] if REPO in hub.commits else {}
        return files if len(files) > 1 else {}  # the Hub's own first commit

    def clear_repository() -> None:
        hub.commits.clear()
        hub.large_files.clear()

    def read_trained() -> dict:
        seen = read_files(trained)
        return {**seen, "losses": get_losses(trained)} if "projector.safetensors" in seen else seen

    def read_answers() -> dict[str, bytes]:
        return {name: content for name, content in read_files(evaluated).items() if name == "answers.jsonl"}

    def clear_answers() -> None:
        remove(answers)()
        answers.mkdir()

    data, images = make_data(folder / "data"), make_images(folder / "images", 12)
    steps = ("--max_steps", "6", "--save_steps", "1", "--save_total_limit", "2", "--learning_rate", "1e-3")
    convert_command = convert(converted, shutil.copytree(CHECKPOINT, folder / "checkpoint"))
    train_command = train(model, data, trained, *steps, "--skip_broken", "true")
    return [
        Work("converting", convert_command, lambda: read_files(converted), is_all_or_nothing, remove(converted), True),
        Work("saving", (SAVE, model, saved), lambda: read_files(saved), loads_whole_or_not, remove(saved)),
        Work("publishing", publish(model, REPO), read_repository, is_all_or_nothing, clear_repository),
        Work("training", train_command, read_trained, has_whole_files, remove(trained)),
        Work(
            "batch inference",
            *(caption(images, answers / "answers.jsonl"), lambda: read_files(answers), has_first_lines, clear_answers),
        ),
        Work("evaluation", evaluate(data, evaluated), read_answers, has_first_lines, remove(evaluated)),
    ]


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param((1, 1, 1, 2, 1, 1), id="short"),
        pytest.param((12, 9, 11, 12, 9, 9), id="long", marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_moments(numbers, commands, hub, converted_stage1, tmp_path, capsys):
    hub.large = True
    generator, works = random.Random(0), make_works(tmp_path, hub, converted_stage1)
    unfinished = sum(survive(commands, work, number, generator) for work, number in zip(works, numbers, strict=True))
    kinds = ", ".join(f"{number} {work.name}" for work, number in zip(works, numbers, strict=True))
    with capsys.disabled():
        print(f"\n{sum(numbers)} kills ({unfinished} before the end): {kinds}; all completed, results equal")
    assert unfinished >= sum(numbers) / 2 or sum(numbers) < 10, "kills that come too late test nothing"
