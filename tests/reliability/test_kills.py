# SPDX-License-Identifier: Apache-2.0
"""
SIGKILL at random moments of the commands that write something. Afterwards nothing is half-written, the same command
completes, and the result equals that of an undisturbed run, byte for byte. (Saving is transformers' own, file by file:
a folder that a kill leaves either does not load, or has the whole weights.)
"""

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from forked_commands import Commands
from loopback_hub import Hub
from packaging.version import Version
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from safetensors.torch import load_file
from small_training import OPTIONS, get_losses, make_data

from modeling_llava_hr import LlavaHrForConditionalGeneration


pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL"),
    pytest.mark.skipif(Version(transformers.__version__) < Version("5.18"), reason="training needs transformers 5.18"),
    # huggingface_hub's own upload to the large-file storage
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "reference" / "stage1-384" / "checkpoint"
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
        name (`str`): What it does.
        command (`dict`): Arguments of [`Commands.run`].
        read (`Callable`): Returns what is visible of the result: names and contents.
        check (`Callable`): Takes what is visible after a kill and the whole result; fails if something is half there.
        clear (`Callable`): Removes the result.
        refuses_again (`bool`): Whether the command takes a complete result for a reason to stop.
    """

    name: str
    command: dict
    read: Callable[[], dict]
    check: Callable[[dict, dict], None]
    clear: Callable[[], None]
    refuses_again: bool = False


def read_files(folder: Path) -> dict[str, bytes]:
    """Contents of the files that are in a folder itself, but for hidden ones."""
    files = folder.iterdir() if folder.exists() else []
    return {file.name: file.read_bytes() for file in files if file.is_file() and not file.name.startswith(".")}


def is_all_or_nothing(seen: dict, whole: dict) -> None:
    assert seen in ({}, whole)


def has_whole_files(seen: dict, whole: dict) -> None:
    for name, content in seen.items():
        assert content == whole[name], name


def make_works(folder: Path, hub: Hub) -> list[Work]:
    """Converting, saving, publishing, training and batch inference; each takes what an earlier one makes."""

    def files(name: str, module: str, output: Path, *arguments, check: Callable, **options) -> Work:
        command = {"module": module, "arguments": arguments}
        return Work(name, command, lambda: read_files(output), check, lambda: remove(output), **options)

    def remove(output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)

    model = folder / "model"
    convert = "conversion.convert_llava_hr_weights_to_hf"
    shutil.copytree(CHECKPOINT, folder / "checkpoint")
    paths = ("--checkpoint", folder / "checkpoint", "--output", folder / "converted")
    converting = files(
        "converting", convert, folder / "converted", *paths, check=is_all_or_nothing, refuses_again=True
    )

    saved = folder / "saved"

    def loads_whole_or_not(seen: dict, whole: dict) -> None:
        try:
            weights = LlavaHrForConditionalGeneration.from_pretrained(saved, dtype="auto").state_dict()
        except (OSError, ValueError, SafetensorError):
            assert seen != whole
        else:
            expected = load_file(model / "model.safetensors")
            assert all(torch.equal(weights[name], expected[name]) for name in expected)

    command = {"code": SAVE, "arguments": (model, saved)}
    saving = Work("saving", command, lambda: read_files(saved), loads_whole_or_not, lambda: remove(saved))

    def read_repository() -> dict[str, bytes]:
        return hub.read(REPO)[1] if REPO in hub.commits else {}

    def clear_repository() -> None:
        hub.commits.clear()
        hub.large_files.clear()

    command = {"module": "examples.publish", "arguments": ("--model", model, "--repo", REPO)}
    publishing = Work(
        "publishing",
        command,
        read_repository,
        lambda seen, whole: is_all_or_nothing({n: c for n, c in seen.items() if len(seen) > 1}, whole),
        clear_repository,
    )

    data, trained = make_data(folder / "data") / "captions.json", folder / "trained"
    paths = ("--model_name_or_path", model, "--data_path", data, "--output_dir", trained)
    steps = ("--max_steps", "6", "--save_steps", "1", "--save_total_limit", "2", "--learning_rate", "1e-3")
    training = files(
        "training",
        "training.train",
        trained,
        *("--stage", "pretrain", "--skip_broken", "true", *paths, *OPTIONS, *steps),
        *("--per_device_train_batch_size", "4"),
        check=has_whole_files,
    )

    def read_trained() -> dict:
        seen = read_files(trained)
        return {**seen, "losses": get_losses(trained)} if "projector.safetensors" in seen else seen

    training.read = read_trained

    pictures, answers = folder / "pictures", folder / "answers" / "answers.jsonl"
    pictures.mkdir()
    for number in range(12):
        image = Image.new("RGB", (60 + number, 50), ("navy", "green", "maroon")[number % 3])
        ImageDraw.Draw(image).text((9, 9), str(number), fill="white")
        image.save(pictures / f"{number:02d}.png")
    paths = ("--model", ROOT / "examples" / "tiny-llava-hr", "--folder", pictures, "--output", answers)

    def is_beginning(seen: dict, whole: dict) -> None:
        lines = seen.get(answers.name, b"").splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        assert complete == whole[answers.name].splitlines(keepends=True)[: len(complete)]

    def clear_answers() -> None:
        remove(answers.parent)
        answers.parent.mkdir()

    inference = files(
        "batch inference",
        "examples.caption_folder",
        answers.parent,
        *(*paths, "--batch_size", "3", "--max_new_tokens", "8"),
        check=is_beginning,
    )
    inference.clear = clear_answers
    return [converting, saving, publishing, training, inference]


def survive(commands: Commands, work: Work, number: int, generator: random.Random) -> int:
    """Kills a command so many times, looks at what it left each time, and returns how often it was not finished."""
    work.clear()
    undisturbed = run(commands, work)
    assert undisturbed.status == 0, undisturbed.output
    whole, seconds = work.read(), undisturbed.seconds
    assert whole
    kills = attempts = unfinished = 0
    while kills < number:
        work.clear()
        for in_a_row in range(min(IN_A_ROW, number - kills)):
            attempts += 1
            assert attempts <= 5 * number + 10, f"{work.name}: ends before it can be killed"
            ended = run(commands, work, kill_after=generator.uniform(0.05, 1) * seconds)
            assert ended.status in (0, -signal.SIGKILL), ended.output
            if ended.status == 0 and in_a_row == 0:  # the machine has become faster
                seconds = min(seconds, ended.seconds)
            kills += ended.status < 0
            unfinished += ended.status < 0 and work.read() != whole
            work.check(work.read(), whole)
            if work.refuses_again and work.read():
                break
        else:
            completed = run(commands, work)
            assert completed.status == 0, completed.output
        assert work.read().keys() == whole.keys()
        has_whole_files(work.read(), whole)
    return unfinished


def run(commands: Commands, work: Work, **options):
    command = dict(work.command)
    return commands.run(command.pop("module", None), *command.pop("arguments"), **command, **options)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param((1, 1, 1, 2, 1), id="short"),
        pytest.param((12, 9, 11, 12, 9), id="long", marks=pytest.mark.slow),
    ],
)
def test_kills_at_random_moments(numbers, hub, tmp_path, capsys):
    hub.large = True
    generator = random.Random(0)
    works = make_works(tmp_path, hub)
    modules = [work.command["module"] for work in works if "module" in work.command]
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "tables")}
    with Commands(tmp_path / "commands", *modules, "timm", **environment) as commands:
        unfinished = 0
        for work, number in zip(works, numbers, strict=True):
            unfinished += survive(commands, work, number, generator)
            if work.name == "converting":
                (tmp_path / "converted").rename(tmp_path / "model")
    kinds = ", ".join(f"{number} {work.name}" for work, number in zip(works, numbers, strict=True))
    with capsys.disabled():
        print(f"\n{sum(numbers)} kills ({unfinished} before the end): {kinds}; all completed, results equal")
    assert unfinished >= sum(numbers) / 2 or sum(numbers) < 10, "kills that come too late try nothing"
