# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from converted_checkpoints import TINY_MODEL
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from modeling_llava_hr import get_num_image_tokens
from training.tiny import train
from training.tiny.fineprint import FinePrintArguments
from training.tiny.language_model import PretrainLanguageModelArguments
from training.tiny.towers import PretrainTowersArguments
from training.tiny.train import PRESETS, UNUSED, TrainTinyArguments, get_steps
from training.train import make_parser


PARSERS = {
    "training.tiny.fineprint": FinePrintArguments,
    "training.tiny.language_model": PretrainLanguageModelArguments,
    "training.tiny.towers": PretrainTowersArguments,
}


# The option's new name does not exist before transformers 5.24
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pathway", UNUSED)
def test_every_command_can_be_parsed(preset, pathway):
    for step in get_steps(TrainTinyArguments(preset=preset, pathway=pathway, blind=pathway == "both")):
        module, *options = step.command
        if module in PARSERS:
            HfArgumentParser(PARSERS[module]).parse_args_into_dataclasses(options)
        elif module == "training.train" and preset == "cpu":  # `bf16` of the other needs its GPU
            make_parser().parse_args_and_config(options)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_starts_from_the_one_before(preset):
    steps = [step for step in get_steps(TrainTinyArguments(preset=preset)) if "fineprint" not in step.command[0]]
    made = [step.done.parent for step in steps]
    starts = [re.search(r"--model_name_or_path=(\S+)", " ".join(step.command)) for step in steps]
    assert [Path(start[1]) for start in starts if start] == made[2:-2]


@pytest.mark.parametrize("blind", [False, True])
def test_parts_that_are_complete_are_used(tmp_path, blind):
    """Language model, towers and one data set are there, but another is not; the fair control needs its own towers."""
    parts, output = tmp_path / "parts", tmp_path / "output"
    complete = {"language-model": "tokenizer.json", "towers": "towers.json", "fineprint-256-2": "test.jsonl"}
    for name, file in complete.items():
        (parts / name).mkdir(parents=True)
        (parts / name / file).touch()
    steps = get_steps(TrainTinyArguments(preset="gpu", parts=str(parts), output=str(output), blind=blind))
    folders = {step.done.parent for step in steps}
    used = {"language-model"} if blind else set(complete)
    assert {folder.name for folder in folders if folder.parent == parts} == used
    assert {"untrained", "0-pretrain", "fineprint-1024-6"} < {f.name for f in folders if f.parent == output}


def test_only_parts():
    steps = get_steps(TrainTinyArguments(preset="gpu", only_parts=True))
    assert [step.command[0] for step in steps] == ["training.tiny.language_model", "training.tiny.towers"]


@pytest.mark.parametrize("preset", PRESETS)
def test_both_views_have_whole_patches(preset):
    for course in (PRESETS[preset].pretrain, *PRESETS[preset].finetune):
        num_tokens = get_num_image_tokens(train.get_low_res_size(course.size), train.PATCH_SIZE)
        assert num_tokens == (course.size // 32) ** 2


def test_silence_sets_one_half_of_the_fusion_to_zero(tmp_path):
    names = ("low_res_proj.weight", "low_res_proj.bias", "high_res_proj.weight", "high_res_proj.bias")
    names = [*(f"model.vision_tower.fusion.{name}" for name in names), "lm_head.weight"]
    save_file({name: torch.ones(2) for name in names}, tmp_path / "model.safetensors")
    train.silence(tmp_path, "low_res")
    zero = {name for name, weight in load_file(tmp_path / "model.safetensors").items() if not weight.any()}
    assert zero == {"model.vision_tower.fusion.high_res_proj.weight", "model.vision_tower.fusion.high_res_proj.bias"}


def run(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["train", *options])
    train.main()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--preset=tpu", "--preset must be one of .*, but got 'tpu'"),
        ("--pathway=none", "--pathway must be one of .*, but got 'none'"),
        ("--parts=nowhere", "--parts: nowhere has no complete language-model"),
    ],
)
def test_wrong_options_are_named(option, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, option, f"--output={tmp_path}")


def test_a_dry_run_prints_every_command_and_makes_nothing(tmp_path, monkeypatch, capsys):
    run(monkeypatch, f"--output={tmp_path}", "--dry_run")
    printed = capsys.readouterr().out
    for step in get_steps(TrainTinyArguments(output=str(tmp_path))):
        assert f"-m {step.command[0]} " in printed
    assert list(tmp_path.iterdir()) == []


def test_goes_on_with_what_is_missing(fineprint, tmp_path, monkeypatch, capfd):
    """A part is not there, and its command fails. Then the model of the last stage (the tiny one) is evaluated."""
    steps = list(get_steps(TrainTinyArguments(output=str(tmp_path))))
    for step in steps[:-1]:
        step.done.parent.mkdir()
        step.done.touch()
    shutil.copytree(fineprint, tmp_path / "fineprint-256-4", dirs_exist_ok=True)
    shutil.copytree(TINY_MODEL, steps[-2].done.parent, dirs_exist_ok=True)

    (tmp_path / "untrained" / "config.json").unlink()
    with pytest.raises(ValueError, match="assemble failed, see above. The same command resumes there"):
        run(monkeypatch, f"--output={tmp_path}")
    (tmp_path / "untrained" / "config.json").touch()
    capfd.readouterr()

    run(monkeypatch, f"--output={tmp_path}")
    assert capfd.readouterr().out.count("exists already") == len(steps) - 1
    weights, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", TINY_MODEL))
    assert weights.keys() == expected.keys()
    assert all(weight.dtype == torch.bfloat16 and weight.equal(expected[name]) for name, weight in weights.items())
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["accuracy"]["coarse"]["num_questions"] > 0


@pytest.mark.slow
def test_every_step_runs(tmp_path, monkeypatch, capfd):
    """
    The GPU preset with a few steps on a few small images, its parts made by another command; then the same command
    again, which trains nothing.
    """
    little = ("--size=128", "--max_signs=2")
    towers = ("--reading_steps=2", "--joint_steps=2", "--reading_batch_size=4", "--joint_batch_size=2")

    def shrink(course: train.Course) -> train.Course:
        return dataclasses.replace(course, size=course.size // 4, num_train=8, steps=2, batch_size=2)

    preset = dataclasses.replace(
        PRESETS["gpu"],
        towers=(*towers, *little, "--num_images=8", "--num_test=4"),
        language_model=("--steps=2", "--batch_size=4", "--max_signs=2"),
        pretrain=shrink(PRESETS["gpu"].pretrain),
        finetune=tuple(map(shrink, PRESETS["gpu"].finetune)),
        num_test=2,
        options=("--use_cpu=True", "--bf16=True", "--dataloader_num_workers=1"),
    )
    monkeypatch.setitem(PRESETS, "gpu", preset)
    parts, output = tmp_path / "parts", tmp_path / "output"
    run(monkeypatch, "--preset=gpu", "--only_parts", f"--output={parts}", "--workers=1")
    assert sorted(path.name for path in parts.iterdir()) == ["language-model", "seconds.jsonl", "towers"]
    weights = load_file(parts / "language-model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    made = {path: path.stat().st_mtime_ns for path in parts.rglob("*")}

    options = ("--preset=gpu", f"--parts={parts}", f"--output={output}", "--pathway=low_res", "--workers=1")
    run(monkeypatch, *options)
    weights = load_file(output / "model" / "model.safetensors")
    assert not weights["model.vision_tower.fusion.high_res_proj.weight"].any()
    assert weights["model.vision_tower.fusion.low_res_proj.weight"].any()
    steps = [json.loads(line)["step"] for line in (output / "seconds.jsonl").read_text().splitlines()]
    data = ["fineprint-64-2", "fineprint-128-4", "fineprint-256-6"]
    assert steps == [*data, "assemble", "0-pretrain", "1-finetune", "2-finetune", "3-finetune", "evaluation"]
    assert json.loads((output / "evaluation.json").read_text())["accuracy"]["fine"]["num_questions"] > 0
    assert {path: path.stat().st_mtime_ns for path in parts.rglob("*")} == made

    capfd.readouterr()
    run(monkeypatch, *options)
    assert capfd.readouterr().out.count("exists already") == len(steps) + 2
