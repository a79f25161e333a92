# SPDX-License-Identifier: Apache-2.0
"""
Trains a tiny LLaVA-HR from nothing, by this project's own commands one after another (`make train-tiny`):

    python -m training.tiny.train --preset cpu --output .cache/train-tiny

Language model, towers, FinePrint, `conversion.assemble`, stage 1, stage 2 on growing images, evaluation. Complete
steps are skipped, so the same command resumes an interrupted training. The result is `OUTPUT/model`, in bfloat16, and
`OUTPUT/evaluation.json`.

The GPU preset starts from a language model and towers that a CPU trained beforehand. They are in `training/parts`; the
first command makes them again:

    python -m training.tiny.train --preset gpu --only_parts --output .cache/parts
    python -m training.tiny.train --preset gpu --parts training/parts --output .cache/train-tiny-1024
"""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import new_file, new_folder, run_command
from training.tiny.fineprint import count_cores


ROOT = Path(__file__).parent.parent.parent
# Side of a ViT patch, and what it shows, a position of the ConvNeXt, in pixels of either view
PATCH_SIZE, STRIDE = 7, 32
LOW_RES_RATIO = PATCH_SIZE / STRIDE
HIGH_RES_TOWER = r"model\.vision_tower\.high_res_tower\."
# What a pathway alone has no use for: the other's half of the fusion, and what MR-Adapters (of stage 2) let in, which
# starts at zero and stays there when it is frozen.
UNUSED = {
    "both": [],
    "low_res": [
        r"model\.vision_tower\.fusion\.high_res_proj\.",
        r"model\.vision_tower\.mr_adapters\.\d+\.high_res_mapping\.",
    ],
    "high_res": [r"model\.vision_tower\.fusion\.low_res_proj\."],
}


@dataclass(frozen=True)
class Course:
    """A run of stage 2."""

    size: int  # side of images and high-resolution view in pixels, a multiple of 64
    max_signs: int  # largest number of texts in an image
    num_train: int  # different images
    steps: int  # optimizer steps
    learning_rate: float  # peak
    batch_size: int = 32  # images per step
    # The high-resolution tower is small and forgets how to read at the learning rate that the rest needs
    frozen: bool = True


@dataclass(frozen=True)
class Preset:
    """The settings that differ between a short and a long training."""

    towers: tuple[str, ...]  # options of training.tiny.towers
    language_model: tuple[str, ...]  # options of training.tiny.language_model
    alphabet: str  # see FinePrintConfig
    pretrain: Course  # stage 1
    finetune: tuple[Course, ...]  # stage 2
    num_test: int  # test images
    options: tuple[str, ...]  # of every training.train


PRESETS = {
    "cpu": Preset(
        towers=("--reading_steps=3400", "--joint_steps=150", "--size=256", "--max_signs=4", "--joint_batch_size=16"),
        language_model=("--steps=1200", "--batch_size=32", "--max_signs=4"),
        alphabet="digits",
        pretrain=Course(size=128, max_signs=2, num_train=10000, steps=700, learning_rate=2e-3),
        finetune=(
            Course(size=128, max_signs=2, num_train=10000, steps=300, learning_rate=7e-4),
            Course(size=256, max_signs=4, num_train=8000, steps=600, learning_rate=7e-4, batch_size=16),
        ),
        num_test=300,
        options=("--use_cpu=True", "--bf16=True", "--dataloader_num_workers=1"),
    ),
    # Drawing, both stages and evaluation in five minutes on an H100 with 16 cores (docs/results.md)
    "gpu": Preset(
        towers=("--reading_steps=3400", "--joint_steps=150", "--size=256", "--max_signs=4", "--joint_batch_size=16"),
        language_model=("--steps=1000", "--batch_size=32", "--max_signs=6"),
        alphabet="alphanumeric",
        pretrain=Course(size=256, max_signs=2, num_train=8000, steps=300, learning_rate=2e-3, batch_size=128),
        finetune=(
            Course(size=256, max_signs=2, num_train=8000, steps=300, learning_rate=1e-3, batch_size=128),
            Course(size=512, max_signs=4, num_train=4000, steps=150, learning_rate=1e-3, batch_size=128),
            Course(size=1024, max_signs=6, num_train=3000, steps=200, learning_rate=7e-4, batch_size=64),
        ),
        num_test=150,
        options=("--use_cpu=False", "--bf16=True", "--dataloader_num_workers=14"),
    ),
}


@dataclass
class TrainTinyArguments:
    """Options of the command; the help describes each field."""

    preset: str = field(default="cpu", metadata={"help": "cpu (an hour on two cores) or gpu"})
    output: str = field(default=".cache/train-tiny", metadata={"help": "folder for everything that is made"})
    pathway: str = field(
        default="both",
        metadata={
            "help": "both, or the controls low_res (LLaVA-1.5's design) or high_res: the other pathway's share of the "
            "fusion is zero and stays so"
        },
    )
    blind: bool = field(
        default=False,
        metadata={
            "help": "the fair control: the same recipe, the towers' training included, on images that hold no more "
            "than the low-resolution view"
        },
    )
    parts: str | None = field(
        default=None, metadata={"help": "output of another training, whose complete parts are used where they fit"}
    )
    only_parts: bool = field(default=False, metadata={"help": "stop after the language model and the towers"})
    workers: int = field(default_factory=count_cores, metadata={"help": "processes that draw; all cores by default"})
    seed: int = field(default=0, metadata={"help": "of weights and data"})
    dry_run: bool = field(default=False, metadata={"help": "print the commands only"})


@dataclass(frozen=True)
class Step:
    """A command of this project, and the file that it writes last."""

    name: str
    done: Path
    command: list[str]


def get_low_res_size(size: int) -> int:
    """Side of the low-resolution view: a patch for each position of the high-resolution tower."""
    return size // STRIDE * PATCH_SIZE


def find_part(arguments: TrainTinyArguments, name: str, done: str) -> Path:
    """The folder of a part: that in `parts` if it is complete there and may be used, else that in `output`."""
    part = Path(arguments.parts or arguments.output, name)
    usable = (part / done).exists() and not (arguments.blind and name != "language-model")
    return part if usable else Path(arguments.output, name)


def get_part_steps(arguments: TrainTinyArguments) -> Iterator[Step]:
    """The commands that make language model and towers."""
    preset = PRESETS[arguments.preset]
    common = [f"--alphabet={preset.alphabet}", f"--seed={arguments.seed}"]
    language_model = find_part(arguments, "language-model", "tokenizer.json")
    options = [f"--output={language_model}", f"--size={preset.finetune[-1].size}", *preset.language_model]
    command = ["training.tiny.language_model", *options, *common]
    yield Step("language model", language_model / "tokenizer.json", command)
    towers = find_part(arguments, "towers", "towers.json")
    options = [f"--output={towers}", f"--tokenizer={language_model}", f"--workers={arguments.workers}"]
    options += [f"--low_res_ratio={LOW_RES_RATIO}", f"--patch_size={PATCH_SIZE}", *preset.towers]
    command = ["training.tiny.towers", *options, *(["--blind"] if arguments.blind else []), *common]
    yield Step("towers", towers / "towers.json", command)


def get_steps(arguments: TrainTinyArguments) -> Iterator[Step]:
    """The commands of a training in their order."""
    preset, output, seed = PRESETS[arguments.preset], Path(arguments.output), f"--seed={arguments.seed}"
    parts = list(get_part_steps(arguments))
    yield from parts
    if arguments.only_parts:
        return
    language_model, towers = (step.done.parent for step in parts)

    def data_folder(course: Course) -> Path:
        return find_part(arguments, f"fineprint-{course.size}-{course.max_signs}", "test.jsonl")

    for course in {data_folder(course): course for course in (preset.pretrain, *preset.finetune)}.values():
        folder = data_folder(course)
        options = [f"--output={folder}", f"--size={course.size}", f"--max_signs={course.max_signs}"]
        options += [f"--num_train={course.num_train}", f"--num_test={preset.num_test}"]
        options += [f"--shown_ratio={LOW_RES_RATIO}"] if arguments.blind else []
        options += [f"--alphabet={preset.alphabet}", f"--workers={arguments.workers}", seed]
        yield Step(folder.name, folder / "test.jsonl", ["training.tiny.fineprint", *options])
    model = output / "untrained"
    options = [f"--{name}={towers / name}" for name in ("vision_tower", "high_res_tower")]
    options += [f"--language_model={language_model}", f"--output={model}", f"--size={preset.finetune[-1].size}", seed]
    yield Step("assemble", model / "config.json", ["conversion.assemble", *options])
    courses = [("pretrain", preset.pretrain), *(("finetune", course) for course in preset.finetune)]
    for number, (stage, course) in enumerate(courses):
        folder, data = output / f"{number}-{stage}", data_folder(course)
        frozen = UNUSED[arguments.pathway][: 1 if stage == "pretrain" else None]
        frozen = frozen + [HIGH_RES_TOWER] * (stage == "finetune" and course.frozen)
        options = ["--config", str(Path(__file__).with_name(f"{stage}.yaml"))]  # TRL's parser knows no `--config=`
        options += [f"--model_name_or_path={model}", f"--output_dir={folder}", f"--image_folder={data / 'images'}"]
        options += [f"--data_path={data / ('captions' if stage == 'pretrain' else 'train')}.jsonl"]
        options += [f"--eval_data_path={data / 'validation.jsonl'}", f"--max_steps={course.steps}"]
        options += [f"--size={course.size}", f"--low_res_size={get_low_res_size(course.size)}"]
        options += [f"--learning_rate={course.learning_rate}", f"--per_device_train_batch_size={course.batch_size}"]
        options += [*(["--frozen", *frozen] if frozen else []), *preset.options, seed]
        yield Step(folder.name, folder / "processor_config.json", ["training.train", *options])
        model = folder
    device = "cpu" if "--use_cpu=True" in preset.options else "cuda"
    options = [f"--model={output / 'model'}", f"--data={data}", f"--device={device}"]
    options += [f"--output={output / 'evaluation.json'}"]
    yield Step("evaluation", output / "evaluation.json", ["training.tiny.evaluate", *options])


def silence(model: Path, pathway: str) -> None:
    """Zeroes the part of the fusion that a single pathway does not use, in a model without MR-Adapters."""
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if any(re.match(pattern, name) for pattern in UNUSED[pathway]):
            weight.zero_()
    with new_file(model / "model.safetensors") as partial:
        save_file(weights, partial, metadata={"format": "pt"})


def save_final(trained: Path, output: Path) -> None:
    """Saves a trained model in bfloat16 and its processor in a new folder, atomically."""
    with new_folder(output) as folder:
        AutoModelForImageTextToText.from_pretrained(trained, dtype="bfloat16").save_pretrained(folder)
        AutoProcessor.from_pretrained(trained).save_pretrained(folder)


def main() -> None:
    """Runs or prints the commands."""
    (arguments,) = HfArgumentParser(TrainTinyArguments).parse_args_into_dataclasses()
    for name, choices in (("preset", PRESETS), ("pathway", UNUSED)):
        if (value := getattr(arguments, name)) not in choices:
            raise ValueError(f"--{name} must be one of {', '.join(choices)}, but got {value!r}.")
    if arguments.parts and not Path(arguments.parts, "language-model", "tokenizer.json").exists():
        raise ValueError(f"--parts: {arguments.parts} has no complete language-model. Name the output of a training.")
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    steps = list(get_steps(arguments))
    for number, step in enumerate(steps, 1):
        command = [sys.executable, "-m", *step.command]
        print(f"[{number}/{len(steps)}] {step.name}\n{shlex.join(command)}", flush=True)
        if arguments.dry_run:
            continue
        if step.done.exists():
            print(f"{step.done} exists already.", flush=True)
            continue
        if step.name.endswith("pretrain"):  # here rather than after assembling: a kill could come in between
            silence(output / "untrained", arguments.pathway)
        if step.name == "evaluation" and not (output / "model").exists():
            save_final(steps[-2].done.parent, output / "model")
        start = time.time()
        if subprocess.run(command, cwd=ROOT).returncode:
            raise ValueError(f"{step.name} failed, see above. The same command resumes there.")
        with (output / "seconds.jsonl").open("a") as file:
            file.write(json.dumps({"step": step.name, "seconds": round(time.time() - start)}) + "\n")


if __name__ == "__main__":
    run_command(main)
