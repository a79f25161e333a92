# SPDX-License-Identifier: Apache-2.0
"""
Trains LLaVA-HR with TRL, both stages:

    python -m training.train --config training/configs/pretrain_7b.yaml --output_dir llava-hr-7b-pretrain
    python -m training.train --config training/configs/finetune_7b.yaml --model_name_or_path llava-hr-7b-pretrain

The same command resumes from the newest complete checkpoint. Every field of `SFTConfig` and of `ModelConfig` is an
option, in the YAML file or on the command line, which takes precedence.
"""

import copy
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, PreTrainedModel, set_seed
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from modeling_llava_hr import LlavaHrConfig, LlavaHrProcessor
from modeling_llava_hr.processing_llava_hr import PLAIN_CHAT_TEMPLATE
from modeling_llava_hr.utils import run_command, write_text

from .checks import LengthLimit
from .data import DataConfig, load_data
from .lora import BASE_FOLDER, Start, find_start, fits, get_modules_to_save, load_adapter, write_base
from .stages import LORA_TARGET_MODULES, STAGES, Stage, freeze, load_config, load_processor, save_trained_part
from .trainer import (
    LlavaHrDataCollator,
    LlavaHrTrainer,
    find_last_complete_checkpoint,
    has_model_only,
    has_state,
    list_checkpoints,
)


# Lists of the broken rows that were left out of training and evaluation data
REPORTS = ("skipped_rows.jsonl", "skipped_eval_rows.jsonl")

# Parts with a learning rate of their own, by parameter names; the towers are the rest of `vision_tower`
PARTS = {
    "projector": r"\.(multi_modal_projector|vision_tower\.fusion)\.",
    "adapter": r"\.vision_tower\.mr_adapters\.",
    "tower": r"\.vision_tower\.(?!fusion\.|mr_adapters\.)",
    "language_model": r"\.language_model\.|(^|\.)lm_head\.",
}

# Fields of `SFTConfig` that must keep their default because they have no effect here, by reason
UNSUPPORTED = {
    "chats with images cannot be packed": ("eval_packing", "packing", "packing_strategy", "padding_free"),
    "rows are converted once and images decoded in their batch": ("dataset_kwargs", "dataset_num_proc"),
    "rows are chats, whose answers or `completion` are learned": ("completion_only_loss", "dataset_text_field"),
    "the stage sets the prompt form, and the tokenizer has a padding token": ("chat_template_path", "pad_token"),
    "evaluation during training reports the loss; see training.evaluate": (
        "batch_eval_metrics",
        "include_for_metrics",
    ),
    "lengths are counted, and longer rows reported instead of truncated": ("length_column_name", "truncation_mode"),
    "use `dtype`, `attn_implementation` and `model_revision`": ("model_init_kwargs",),
    "use `train_sampling_strategy`": ("shuffle_dataset",),
    "samples are made from columns that the model does not know": ("remove_unused_columns",),
    "the same command resumes from the newest complete checkpoint by itself": ("resume_from_checkpoint",),
}


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingOptions:
    """What training LLaVA-HR needs beyond TRL's `SFTConfig` and `ModelConfig`; described in the help of each field."""

    stage: str = field(metadata={"choices": list(STAGES), "help": "Stage of training."})
    data_path: str = field(metadata={"help": "Training data: a file, or anything that `datasets` loads."})
    eval_data_path: str | None = _option(None, "Evaluation data of any supported kind; `none` unsets a config's.")
    image_folder: str | None = _option(None, "Folder that image names start from; by default the data file's.")
    dataset_config: str | None = _option(None, "Configuration of `data_path`, and of `eval_data_path` if the same.")
    dataset_revision: str | None = _option(None, "Revision of `data_path`, and of `eval_data_path` if the same.")
    eval_dataset_config: str | None = _option(None, "Configuration of `eval_data_path`, if it is another one.")
    dataset_train_split: str = _option("train", "Split for training.")
    dataset_test_split: str = _option("test", "Split for evaluation.")
    streaming: bool = _option(False, "Read on demand what `datasets` loads; needs `max_steps`.")
    skip_broken: bool = _option(
        False,
        "Leave broken rows out and list them in `skipped(_eval)_rows.jsonl`. A row whose image fails only when it is "
        "decoded is replaced by another one; a stream continues with the next.",
    )
    restart: bool = _option(False, "Start afresh: remove the checkpoints in `output_dir`.")
    size: int | None = _option(None, "Side of the image in pixels, if not the stage's.")
    low_res_size: int | None = _option(None, "Side of the low-resolution view in pixels, if not the released rule's.")
    unpad: bool | None = _option(None, "Drop the tokens of the padding, if not as in the stage.")
    frozen: list[str] = field(default_factory=list, metadata={"help": "Regular expressions for frozen parameters."})
    projector_learning_rate: float | None = _option(None, "Peak learning rate of projector and fusion.")
    tower_learning_rate: float | None = _option(None, "Peak learning rate of both vision towers.")
    adapter_learning_rate: float | None = _option(None, "Peak learning rate of the MR-Adapters.")
    language_model_learning_rate: float | None = _option(None, "Peak learning rate of the language model or its LoRA.")

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rates by regular expression for names of parameters."""
        given = {name: getattr(self, f"{name}_learning_rate") for name in PARTS}
        return {PARTS[name]: rate for name, rate in given.items() if rate is not None}

    def __post_init__(self) -> None:
        if self.eval_data_path is not None and self.eval_data_path.lower() in ("", "none", "null"):
            self.eval_data_path = None

    def get_data_config(self, stage: Stage, output_dir: Path, is_eval: bool = False) -> DataConfig:
        """Where training or evaluation data comes from."""
        path = (self.eval_data_path if is_eval else None) or self.data_path
        same = path == self.data_path
        return DataConfig(
            path,
            self.image_folder,
            name=(self.eval_dataset_config if is_eval else None) or (self.dataset_config if same else None),
            split=self.dataset_test_split if is_eval else self.dataset_train_split,
            revision=self.dataset_revision if same else None,
            streaming=self.streaming,
            plain=stage.chat_template == PLAIN_CHAT_TEMPLATE,
            skip_broken=self.skip_broken,
            report=output_dir / REPORTS[is_eval],
        )


def make_parser() -> TrlParser:
    """The parser, which replaces defaults of `SFTConfig` that do not fit images or this project."""
    parser = TrlParser((TrainingOptions, SFTConfig, ModelConfig))
    parser.set_defaults(
        learning_rate=None,  # the stage's
        max_length=None,  # would cut image tokens
        assistant_only_loss=True,
        remove_unused_columns=False,  # samples are made from columns that the model does not know
        train_sampling_strategy="group_by_length",
        report_to=["tensorboard"],
        # not needed: every batch uses every parameter, see LlavaHrDataCollator
        ddp_find_unused_parameters=False,
    )
    return parser


def find_checkpoint(options: TrainingOptions, training_args: SFTConfig, model_args: ModelConfig) -> str | None:
    """
    The checkpoint that this run resumes from, after removing incomplete ones of interrupted runs (with `restart`, all
    checkpoints). Raises a `ValueError` if this command did not write the checkpoints in `output_dir`.
    """
    output_dir = Path(training_args.output_dir)
    run = {"stage": options.stage, "model_name_or_path": model_args.model_name_or_path, "data_path": options.data_path}
    run_file, checkpoints = output_dir / "run.json", list_checkpoints(output_dir)
    earlier = json.loads(run_file.read_text()) if run_file.exists() else None
    checkpoint = None if options.restart else find_last_complete_checkpoint(output_dir)
    model_only = [folder.name for folder in checkpoints if has_model_only(folder)]
    problem = None
    if earlier is None and checkpoints:
        problem = f"{checkpoints[-1].name}, which this command did not write: there is no run.json"
    elif checkpoint is not None and earlier != run:
        problem = f"checkpoints of another run: {earlier}, not {run} (`restart: true` removes them)"
    elif model_only and checkpoint is None and not options.restart:
        problem = (
            f"{model_only[0]}, saved with `save_only_model`, from which no run can resume (`restart: true` removes "
            "it, `model_name_or_path` can start from its weights)"
        )
    if problem is not None:
        raise ValueError(f"`output_dir` ({output_dir}) has {problem}. Name another folder.")
    if not training_args.should_save:
        return checkpoint
    if earlier is not None:
        shutil.rmtree(output_dir / "incomplete", ignore_errors=True)
    for folder in checkpoints:
        if options.restart or not has_state(folder):
            shutil.rmtree(folder)
    if checkpoint is None:
        for report in REPORTS:
            (output_dir / report).unlink(missing_ok=True)
        shutil.rmtree(output_dir / BASE_FOLDER, ignore_errors=True)
        write_text(output_dir / "training_args.json", training_args.to_json_string())
        write_text(run_file, json.dumps(run))
    return checkpoint


def make_trainer(
    options: TrainingOptions, training_args: SFTConfig, model_args: ModelConfig
) -> tuple[LlavaHrTrainer, str | None]:
    """
    The trainer, and the checkpoint that the run resumes from if there is one. Finds all errors in starting point,
    stage, data and options, those in the data before it loads the model.

    Raises:
        ValueError: If starting point, stage, data and options do not fit each other; the message says what to do.
        OSError: If something cannot be read or written; names the path.
    """
    stage, output_dir = STAGES[options.stage], Path(training_args.output_dir)
    check_options(options, training_args, model_args)
    with training_args.main_process_first(local=False):
        checkpoint = find_checkpoint(options, training_args, model_args)
    if training_args.learning_rate is None:
        training_args.learning_rate = stage.lora_learning_rate if model_args.use_peft else stage.learning_rate

    revision = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    start = find_start(model_args.model_name_or_path, **revision)
    config = load_config(stage, start.base, options.low_res_size, **start.kwargs)
    sides: dict[str, Any] = {"size": options.size, "low_res_size": options.low_res_size, "unpad": options.unpad}
    processor = load_processor(stage, model_args.model_name_or_path, **sides, **revision)
    lengths = [length for length in (training_args.max_length, config.context_length) if length is not None]
    limit = LengthLimit(processor, min(lengths)) if lengths else None
    with training_args.main_process_first(desc="reading the data"):
        batch_size = training_args.train_batch_size * training_args.world_size
        train_dataset = load_data(options.get_data_config(stage, output_dir), limit, batch_size)
        eval_dataset = None
        if training_args.eval_strategy != "no":
            eval_dataset = load_data(options.get_data_config(stage, output_dir, is_eval=True), limit, batch_size)

    model = load_model(training_args, model_args, config, processor, start)
    if not model_args.use_peft:
        freeze(model, stage, options.frozen)
    trainer = LlavaHrTrainer(
        model=model,
        args=training_args,
        data_collator=LlavaHrDataCollator(
            processor,
            assistant_only_loss=training_args.assistant_only_loss,
            pad_to_multiple_of=training_args.pad_to_multiple_of,
            pixel_dtype=torch.bfloat16 if training_args.bf16 or model_args.dtype == "bfloat16" else torch.float32,
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args) if start.adapter is None else None,
    )
    trainer.learning_rates = options.learning_rates
    if training_args.bf16 or model_args.dtype == "float32":
        trainer.keep_trained_in_float32()
    return trainer, checkpoint


def load_model(
    training_args: SFTConfig, model_args: ModelConfig, config: LlavaHrConfig, processor: LlavaHrProcessor, start: Start
) -> PreTrainedModel | PeftModel:
    """Loads the starting point to train with `config`; for LoRA, writes a base for the result where needed."""
    set_seed(training_args.seed)  # inserted adapters start at random
    model = AutoModelForImageTextToText.from_pretrained(
        start.base,
        config=copy.deepcopy(config),  # loading adds what quantization needs
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        **start.kwargs,
    )
    if model_args.use_peft and not fits(start, config, processor):
        full_base = Path(training_args.output_dir, BASE_FOLDER)
        with training_args.main_process_first(local=False):
            if training_args.should_save and not full_base.exists():
                write_base(full_base, start, config, model, processor)
        model.name_or_path = str(full_base)  # PEFT notes it in the result
    if start.adapter is not None:
        return load_adapter(model, start.adapter, model_args)
    if model_args.use_peft:
        model_args.lora_target_modules = model_args.lora_target_modules or LORA_TARGET_MODULES
        model_args.lora_modules_to_save = model_args.lora_modules_to_save or get_modules_to_save(config)
    return model


def check_options(options: TrainingOptions, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Raises a `ValueError` for options that exclude each other, and for those without effect."""
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: the folder or Hub id of the model to start from.")
    if model_args.use_peft and STAGES[options.stage].lora_learning_rate is None:
        raise ValueError(f"`use_peft` does not go with `stage: {options.stage}`, which trains little anyway.")
    if model_args.use_peft and options.frozen:
        raise ValueError(
            "`frozen` does not go with `use_peft`. Name what is trained beside it: `lora_modules_to_save`."
        )
    parser = make_parser()
    for reason, names in UNSUPPORTED.items():
        for name in names:
            default = parser.get_default(name)
            if vars(training_args).get(name, default) != default:
                raise ValueError(f"`{name}` must stay {default}, but is {getattr(training_args, name)!r}: {reason}.")
    if training_args.eval_strategy != "no" and options.eval_data_path is None:
        raise ValueError(f"`eval_strategy` is {training_args.eval_strategy.value}, but `eval_data_path` is missing.")


def main(options: TrainingOptions, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """Trains, and saves the result in `output_dir`. Raises what [`make_trainer`] raises."""
    trainer, checkpoint = make_trainer(options, training_args, model_args)
    output_dir = Path(training_args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_result()
    if options.stage == "pretrain" and training_args.should_save:
        save_trained_part(STAGES[options.stage], output_dir, output_dir / "projector.safetensors")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    run_command(lambda: main(*make_parser().parse_args_and_config()))
