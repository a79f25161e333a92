# SPDX-License-Identifier: Apache-2.0
"""
Full disks, read-only targets, missing permissions, broken connections, full memory: one clear message, nothing lost,
and the same command completes once the fault is gone.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from chats import chat
from command_lines import CHECKPOINT, caption, convert, evaluate, publish, train
from converted_checkpoints import TINY_MODEL
from forked_commands import assert_one_message
from PIL import Image
from small_training import make_data
from transformers import pipeline

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


NOBODY = 65534


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "generated")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("images") / "generated", num_rows=4) / "images"


# --- disks ---


def test_a_full_disk_while_converting(commands, disk, converted_stage1):
    command = convert(disk.path / "out")
    # not even a folder's files, or only the beginning of the weights
    for room in (0, 1_000_000):
        disk.leave(room)
        ended = commands.run(*command)
        assert_one_message(ended, f"--output: {disk.path / 'out'} could not be written", "No space left")
        assert [path.name for path in disk.seen.iterdir()] == ["filler"]
    disk.free()
    assert commands.run(*command).status == 0
    weights = (disk.seen / "out" / "model.safetensors").read_bytes()
    assert weights == (converted_stage1 / "model.safetensors").read_bytes()


def test_a_full_disk_while_captions_are_written(commands, disk, images, tmp_path):
    whole = tmp_path / "whole.jsonl"
    assert commands.run(*caption(images, whole)).status == 0
    # earlier answers that fill their block of the disk
    answers = disk.seen / "answers.jsonl"
    row = json.dumps({"image": "0.png", "question": "another", "answer": ""})
    before = row.replace('""', f'"{"x" * (os.statvfs(disk.seen).f_bsize - len(row) - 1)}"') + "\n"
    answers.write_text(before)
    disk.leave()
    assert_one_message(commands.run(*caption(images, disk.path / answers.name)), "No space left")
    assert answers.read_text() == before
    disk.free()
    assert commands.run(*caption(images, disk.path / answers.name)).status == 0
    assert answers.read_text() == before + whole.read_text()


def test_a_full_disk_while_training(commands, disk, converted_stage1, data):
    output = disk.path / "trained"
    command = train(converted_stage1, data, output, "--save_strategy", "no", "--max_steps", "1")
    disk.leave()
    assert_one_message(commands.run(*command), "No space left on device", str(output))
    disk.leave(1_000_000)  # for all but the weights
    assert_one_message(
        commands.run(*command), "incomplete could not be written", "Make room and start the same command"
    )
    weights = disk.seen / "trained" / "model.safetensors"
    assert not weights.exists()
    disk.free()
    assert commands.run(*command).status == 0
    assert weights.exists()


def test_a_full_disk_while_publishing(commands, disk, hub, converted_stage1):
    module, *arguments = publish(converted_stage1, "someone/full")
    code = "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    code += f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    disk.leave()
    assert_one_message(commands.run(None, disk.path, *arguments, code=code), "No space left on device")
    assert "someone/full" not in hub.commits
    disk.free()
    ended = commands.run(None, disk.path, *arguments, code=code)
    assert ended.status == 0, ended.output
    assert len(hub.read("someone/full")[1]) > 5


@pytest.mark.parametrize("name", ["converting", "captions", "training", "evaluation"])
def test_a_read_only_target_is_named(name, commands, read_only, images, converted_stage1, data):
    output = read_only / "out"
    command = {
        "converting": convert(output),
        "captions": caption(images, output),
        "training": train(converted_stage1, data, output, "--max_steps", "1"),
        "evaluation": evaluate(data, output),
    }[name]
    assert_one_message(commands.run(*command), "Read-only file system", str(output))


# The first run imports everything: nobody may not be able to enter the folder that the checkout is in
AS_NOBODY = f"""
import os, runpy, sys
from conversion.convert_llava_hr_weights_to_hf import convert, main
from modeling_llava_hr.utils import run_command

checkpoint, warm_up = sys.argv[2], sys.argv.pop()
convert(checkpoint, warm_up)
os.setgroups([])
os.setresgid(*[{NOBODY}] * 3)
os.setresuid(*[{NOBODY}] * 3)
run_command(main)
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become somebody else")
def test_missing_permissions_are_named(commands, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # where everybody may look
        folder = Path(folder)
        folder.chmod(0o755)
        checkpoint, output = shutil.copytree(CHECKPOINT, folder / "checkpoint"), folder / "out"
        module, *arguments = convert(output, checkpoint)
        ended = commands.run(None, *arguments, tmp_path / "1", code=AS_NOBODY)
        assert_one_message(ended, "Permission denied", str(output))
        (checkpoint / "config.json").chmod(0o600)
        ended = commands.run(None, *arguments, tmp_path / "2", code=AS_NOBODY)
        assert_one_message(ended, "Permission denied", "config.json")
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint"]


# --- connections ---


@pytest.mark.parametrize("cuts", [1, 10**6], ids=["once", "always"])
def test_a_download_that_breaks(cuts, commands, hub, converted_stage1, tmp_path):
    """Once: it is resumed. Always: one message, and the same command completes later."""
    repo = f"someone/cut-{cuts}"
    hub.add(repo, CHECKPOINT)
    hub.cuts = cuts
    ended = commands.run(*convert(tmp_path / "out", repo))
    if cuts > 1:
        assert_one_message(ended, f"--checkpoint: '{repo}'", "cannot be reached")
        assert not list(tmp_path.iterdir())
        hub.cuts = 0
        ended = commands.run(*convert(tmp_path / "out", repo))
    assert ended.status == 0, ended.output
    assert hub.cuts == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights == (converted_stage1 / "model.safetensors").read_bytes()


# --- memory ---


def test_the_same_call_works_once_there_is_memory():
    messages, steps = chat("What is shown?", Image.new("RGB", (40, 40))), []
    pipe = pipeline("image-text-to-text", model=str(TINY_MODEL))

    def run_out_in_the_second_step(module, arguments):
        steps.append(module)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    pipe.model.lm_head.register_forward_pre_hook(run_out_in_the_second_step)
    with pytest.raises(torch.OutOfMemoryError):
        pipe(messages, max_new_tokens=4, do_sample=False)
    answer = pipe(messages, max_new_tokens=4, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


RUNS_OUT = """
import runpy, torch
from modeling_llava_hr import LlavaHrModel

def run_out(self, *arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory.")

LlavaHrModel.get_image_features = run_out
runpy.run_module("examples.caption_folder", run_name="__main__", alter_sys=True)
"""


def test_out_of_memory_ends_batch_inference_with_one_message(commands, images, tmp_path):
    output = tmp_path / "answers.jsonl"
    _, *arguments = caption(images, output)
    ended = commands.run(None, *arguments, code=RUNS_OUT)
    assert_one_message(ended, "fewer images", "CUDA out of memory.")
    assert output.read_text() == ""
    assert commands.run(*caption(images, output)).status == 0
    assert output.read_text().count("answer") == 4
