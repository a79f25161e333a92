# SPDX-License-Identifier: Apache-2.0
"""
SIGKILL at random moments of every command that writes something: afterwards nothing is half-written, the same command
completes, and the result equals that of an undisturbed run. (Saving is transformers' own, file by file: a folder that
a kill leaves either does not load, or has all weights.)
"""

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_lines import CHECKPOINT, caption, convert, evaluate, publish, train
from forked_commands import Commands
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
IN_A_ROW = 3  # kills before the command may complete
# What a user of the library writes
SAVE = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor
import modeling_llava_hr

source, output = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(source, dtype="auto").save_pretrained(output, max_shard_size="300KB")
AutoProcessor.from_pretrained(source).save_pretrained(output)
"""


@dataclass
class Work:
    """
    A command that writes something.

    Args:
        name (`str`): Its name in the report.
        command (`tuple`): Module and arguments; a script in the place of the module if it has several lines.
        read (`Callable`): Returns what is visible of the result: names and contents.
        check (`Callable`): Takes what is visible after a kill and the complete result; fails if something is
            half-written.
        clear (`Callable`): Removes the result.
        refuses_again (`bool`): Whether the command refuses to run when its result is complete.
    """

    name: str
    command: tuple[Any, ...]
    read: Callable[[], dict]
    check: Callable[[dict, dict], None]
    clear: Callable[[], None]
    refuses_again: bool = False

    def run(self, commands: Commands, **options):
        module, *arguments = self.command
        if "\n" in module:
            return commands.run(None, *arguments, code=module, **options)
        return commands.run(module, *arguments, **options)


def remove(folder: Path) -> Callable[[], None]:
    return partial(shutil.rmtree, folder, ignore_errors=True)


def read_files(folder: Path) -> dict[str, bytes]:
    """Contents of the files that are in a folder itself, but for hidden ones."""
    files = folder.iterdir() if folder.exists() else []
    return {file.name: file.read_bytes() for file in files if file.is_file() and not file.name.startswith(".")}


def is_all_or_nothing(seen: dict, whole: dict) -> None:
    assert seen in ({}, whole)


def has_whole_files(seen: dict, whole: dict) -> None:
    for name, content in seen.items():
        assert content == whole[name], name


def has_first_lines(seen: dict, whole: dict) -> None:
    """The lines that are complete are the first ones of the complete result."""
    for name, content in seen.items():
        lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        assert lines == whole[name].splitlines(keepends=True)[: len(lines)], name


def survive(commands: Commands, work: Work, number: int, generator: random.Random) -> int:
    """Kills a command `number` times, checks the files it left each time, and returns how often it was unfinished."""
    work.clear()
    undisturbed = work.run(commands)
    assert undisturbed.status == 0, undisturbed.output
    whole, seconds = work.read(), undisturbed.seconds
    assert whole
    kills = attempts = unfinished = 0
    while kills < number:
        work.clear()
        for in_a_row in range(min(IN_A_ROW, number - kills)):
            attempts += 1
            assert attempts <= 5 * number + 10, f"{work.name}: ends before it can be killed"
            ended = work.run(commands, kill_after=generator.uniform(0.05, 1) * seconds)
            assert ended.status in (0, -signal.SIGKILL), ended.output
            if ended.status == 0 and in_a_row == 0:  # the machine has become faster
                seconds = min(seconds, ended.seconds)
            kills += ended.status < 0
            unfinished += ended.status < 0 and work.read() != whole
            work.check(work.read(), whole)
            if work.refuses_again and work.read():
                break
        else:
            completed = work.run(commands)
            assert completed.status == 0, completed.output
        assert work.read().keys() == whole.keys()
        has_whole_files(work.read(), whole)
    return unfinished


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

    data, images = make_data(folder / "data"), make_data(folder / "fewer", num_rows=12) / "images"
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
