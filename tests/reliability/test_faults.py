# SPDX-License-Identifier: Apache-2.0
"""
Full disks, read-only targets, missing permissions, broken connections, full memory: one clear message, nothing lost,
and the same command completes once the fault is gone.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from forked_commands import Commands, Ended
from loopback_hub import Hub, run_hub
from packaging.version import Version
from PIL import Image
from small_training import OPTIONS, make_data
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "reference" / "stage1-384" / "checkpoint"
TINY_MODEL = ROOT / "examples" / "tiny-llava-hr"
CONVERT = "conversion.convert_llava_hr_weights_to_hf"
CAPTION = "examples.caption_folder"
NOBODY = 65534

# A small disk and a read-only one, which only the commands see. Whoever is not root becomes it for them alone.
UNSHARE = ("unshare", "--mount") if os.name == "posix" and os.geteuid() == 0 else ("unshare", "-r", "--mount")
MOUNT = 'mount -t tmpfs -o size=16m none "$0" && mount -t tmpfs -o ro none "$1" && shift && exec "$@"'


@cache
def can_mount() -> bool:
    try:
        command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def require_mounts() -> None:
    if not can_mount():
        pytest.skip("mounting needs Linux with user namespaces, or root")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    yield from run_hub()


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("small-disk")


@pytest.fixture(scope="module")
def read_only(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("read-only")


@pytest.fixture(scope="module")
def commands(hub, small_disk, read_only, tmp_path_factory) -> Iterator[Commands]:
    # the latter are imported at first use, when a command may be somebody who must not read them
    modules = [CONVERT, CAPTION, "examples.publish", "timm"]
    modules += ["sentencepiece", "google.protobuf.descriptor_pb2", "transformers.tokenization_utils_sentencepiece"]
    if Version(transformers.__version__) >= Version("5.18"):
        modules.append("training.train")
    folder = tmp_path_factory.mktemp("commands")
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "tables")}
    wrapper = (*UNSHARE, "sh", "-c", MOUNT, str(small_disk), str(read_only)) if can_mount() else ()
    with Commands(folder / "run", *modules, wrapper=wrapper, **environment) as commands:
        yield commands


@pytest.fixture
def disk(commands, small_disk) -> Path:
    """The small disk as the commands see it, empty."""
    require_mounts()
    folder = Path(f"/proc/{commands.server.pid}/root{small_disk}")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from conversion.convert_llava_hr_weights_to_hf import convert

    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(str(CHECKPOINT), str(folder))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "generated")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        Image.new("RGB", (40 + number, 40), "navy").save(folder / f"{number}.png")
    return folder


def fill(disk: Path) -> Path:
    """A file that leaves no room on a disk."""
    filler, status = disk / "filler", os.statvfs(disk)
    with filler.open("ab") as file:
        file.write(bytes(status.f_bfree * status.f_bsize))
    return filler


def assert_one_message(ended: Ended, *parts: str) -> None:
    """Ended with status 1 and one line that begins with `error:` and says `parts`."""
    assert ended.status == 1, ended.output
    assert "Traceback" not in ended.output, ended.output[-4000:]
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.output
    for part in parts:
        assert part in errors[0]


def convert_arguments(output: Path, checkpoint: str | Path = CHECKPOINT) -> tuple:
    return (CONVERT, "--checkpoint", checkpoint, "--output", output)


def caption_arguments(pictures: Path, output: Path, model: str | Path = TINY_MODEL) -> tuple:
    options = ("--batch_size", "2", "--max_new_tokens", "4")
    return (CAPTION, "--model", model, "--folder", pictures, "--output", output, *options)


def train_arguments(model: Path, data: Path, output: Path, max_steps: int) -> tuple:
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("training needs transformers 5.18")
    paths = ("--model_name_or_path", model, "--data_path", data / "captions.json", "--output_dir", output)
    options = (*OPTIONS, "--per_device_train_batch_size", "4", "--save_strategy", "no", "--max_steps", max_steps)
    return ("training.train", "--stage", "pretrain", *paths, *options)


# --- disks ---


def leave(disk: Path, num_bytes: int) -> None:
    """Fills a disk but for so many bytes."""
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - num_bytes)


def test_a_full_disk_while_converting(commands, disk, small_disk, model):
    output = small_disk / "out"
    # not even a folder's files, or only the beginning of the weights
    for room in (0, 1_000_000):
        leave(disk, room)
        ended = commands.run(*convert_arguments(output))
        assert_one_message(ended, f"--output: {output} could not be written", "No space left")
        assert [path.name for path in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    assert commands.run(*convert_arguments(output)).status == 0
    assert (disk / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_full_disk_while_captions_are_written(commands, disk, small_disk, pictures, tmp_path):
    whole, output = tmp_path / "whole.jsonl", small_disk / "answers.jsonl"
    assert commands.run(*caption_arguments(pictures, whole)).status == 0
    # earlier answers that fill their block of the disk
    row = json.dumps({"picture": "0.png", "question": "another", "answer": ""})
    before = row.replace('""', f'"{"x" * (os.statvfs(disk).f_bsize - len(row) - 1)}"') + "\n"
    (disk / output.name).write_text(before)
    filler = fill(disk)
    assert_one_message(commands.run(*caption_arguments(pictures, output)), "No space left")
    assert (disk / output.name).read_text() == before
    filler.unlink()
    assert commands.run(*caption_arguments(pictures, output)).status == 0
    assert (disk / output.name).read_text() == before + whole.read_text()


def test_a_full_disk_while_training(commands, disk, small_disk, model, data):
    output = small_disk / "trained"
    filler = fill(disk)
    ended = commands.run(*train_arguments(model, data, output, max_steps=1))
    assert_one_message(ended, "No space left on device", str(output))
    leave(disk, 1_000_000)  # for all but the weights
    ended = commands.run(*train_arguments(model, data, output, max_steps=1))
    assert_one_message(ended, "incomplete could not be written", "Make room and start the same command again")
    assert not (disk / "trained" / "model.safetensors").exists()
    filler.unlink()
    assert commands.run(*train_arguments(model, data, output, max_steps=1)).status == 0
    assert (disk / "trained" / "model.safetensors").exists()


def test_a_full_disk_while_publishing(commands, disk, small_disk, hub, model):
    code = "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    code += "runpy.run_module('examples.publish', run_name='__main__', alter_sys=True)"
    arguments = (small_disk, "--model", model, "--repo", "someone/full")
    filler = fill(disk)
    assert_one_message(commands.run(None, *arguments, code=code), "No space left on device")
    assert "someone/full" not in hub.commits
    filler.unlink()
    ended = commands.run(None, *arguments, code=code)
    assert ended.status == 0, ended.output
    assert len(hub.read("someone/full")[1]) > 5


@pytest.mark.parametrize("command", ["converting", "captions", "training"])
def test_a_read_only_target_is_named(command, commands, read_only, pictures, model, data):
    require_mounts()
    output = read_only / "out"
    arguments = {
        "converting": lambda: convert_arguments(output),
        "captions": lambda: caption_arguments(pictures, output),
        "training": lambda: train_arguments(model, data, output, max_steps=1),
    }[command]()
    assert_one_message(commands.run(*arguments), "Read-only file system", str(output))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody else")
def test_missing_permissions_are_named(commands):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # where everybody may look
        folder = Path(folder)
        folder.chmod(0o755)
        shutil.copytree(CHECKPOINT, folder / "checkpoint")
        arguments = convert_arguments(folder / "out", folder / "checkpoint")
        assert_one_message(commands.run(*arguments, user=NOBODY), "Permission denied", str(folder / "out"))
        (folder / "checkpoint" / "config.json").chmod(0o600)
        assert_one_message(commands.run(*arguments, user=NOBODY), "Permission denied", "config.json")
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint"]


# --- connections ---


@pytest.fixture
def repository(hub) -> Iterator[str]:
    """The recorded checkpoint on the Hub."""
    hub.commits["someone/original"] = {"0" * 40: {file.name: file.read_bytes() for file in CHECKPOINT.iterdir()}}
    yield "someone/original"
    hub.cuts = 0


def test_a_download_that_breaks_once_goes_on(commands, repository, hub, model, tmp_path):
    hub.cuts = 1
    ended = commands.run(*convert_arguments(tmp_path / "out", repository))
    assert ended.status == 0, ended.output
    assert hub.cuts == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_download_that_keeps_breaking_is_one_message_and_runs_again(commands, repository, hub, model, tmp_path):
    hub.commits["someone/again"] = hub.commits[repository]
    hub.cuts = 10**6
    arguments = convert_arguments(tmp_path / "out", "someone/again")
    assert_one_message(commands.run(*arguments), "--checkpoint: 'someone/again'", "cannot be reached")
    assert not list(tmp_path.iterdir())
    hub.cuts = 0
    assert commands.run(*arguments).status == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


# --- memory ---


@pytest.fixture
def full_memory(monkeypatch) -> AutoModelForImageTextToText:
    """The tiny model, whose language model finds no memory in the second step of generating."""
    model = AutoModelForImageTextToText.from_pretrained(TINY_MODEL, dtype=torch.float32)
    calls = []

    def run_out(module, arguments):
        calls.append(module)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.lm_head.register_forward_pre_hook(run_out)
    return model


def test_out_of_memory_says_what_needs_less(full_memory):
    processor = AutoProcessor.from_pretrained(TINY_MODEL)
    content = [{"type": "image", "image": Image.new("RGB", (40, 40))}, {"type": "text", "text": "What is shown?"}]
    pipe = pipeline("image-text-to-text", model=full_memory, processor=processor)
    with pytest.raises(torch.OutOfMemoryError) as error:
        pipe([{"role": "user", "content": content}], max_new_tokens=4, do_sample=False)
    for knob in ("fewer images", "`size`", "max_new_tokens", "bfloat16", "load_in_4bit=True"):
        assert knob in str(error.value)
    assert "Tried to allocate 2.00 GiB" in str(error.value)
    # the same call works once there is memory, and other errors are not touched
    answer = pipe([{"role": "user", "content": content}], max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"
    with pytest.raises(ValueError, match="max_new_tokens"):
        pipe([{"role": "user", "content": content}], max_new_tokens=-1)


RUNS_OUT = """
import runpy, torch
from modeling_llava_hr import LlavaHrModel

def run_out(self, *arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.")

LlavaHrModel.get_image_features = run_out
runpy.run_module("examples.caption_folder", run_name="__main__", alter_sys=True)
"""


def test_out_of_memory_ends_batch_inference_with_one_message(commands, pictures, tmp_path):
    output = tmp_path / "answers.jsonl"
    ended = commands.run(None, *caption_arguments(pictures, output)[1:], code=RUNS_OUT)
    assert_one_message(ended, "ran out of memory", "fewer images", "CUDA out of memory.")
    assert output.read_text() == ""
    assert commands.run(*caption_arguments(pictures, output)).status == 0
    assert output.read_text().count("answer") == 4
