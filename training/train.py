# SPDX-License-Identifier: Apache-2.0
"""
Trains LLaVA-HR with TRL, both stages:

    python -m training.train --config training/configs/pretrain_7b.yaml --output_dir llava-hr-7b-pretrain
    python -m training.train --config training/configs/finetune_7b.yaml --model_name_or_path llava-hr-7b-pretrain

The same command started again goes on from the newest complete checkpoint. Every field of `SFTConfig` and of
`ModelConfig` is an option, in the YAML file or on the command line, which wins.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForImageTextToText, set_seed
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from modeling_llava_hr import LlavaHrConfig
from modeling_llava_hr.processing_llava_hr import PLAIN_CHAT_TEMPLATE

from .data import load_data, write_whole
from .stages import (
    LORA_TARGET_MODULES,
    STAGES,
    freeze,
    get_modules_to_save,
    load_config,
    load_processor,
    save_trained_part,
)
from .trainer import (
    LlavaHrDataCollator,
    LlavaHrTrainer,
    find_last_complete_checkpoint,
    has_state,
    list_checkpoints,
)


# Which broken rows were left out of training and evaluation data
REPORTS = ("skipped_rows.json", "skipped_eval_rows.json")


@dataclass
class TrainingOptions:
    """
    What training LLaVA-HR needs beyond TRL's `SFTConfig` and `ModelConfig`.

    Args:
        stage (`str`): `"pretrain"` (projector and fusion alone) or `"finetune"` (with MR-Adapters, everything).
        data_path (`str`): Training data, see [`~training.data.load_data`].
        eval_data_path (`str`, *optional*): Evaluation data of the same kind.
        image_folder (`str`, *optional*): Where names of pictures begin; by default the folder of the data file.
        streaming (`bool`, *optional*, defaults to `False`): Whether `datasets` reads on demand; needs `max_steps`.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Leave broken rows out, and write which into `skipped_rows.json` (of evaluation data
            `skipped_eval_rows.json`), rather than refuse the data.
        restart (`bool`, *optional*, defaults to `False`): Remove the checkpoints in `output_dir` and start afresh.
        size (`int`, *optional*): Side of the image in pixels, if not the stage's.
        low_res_size (`int`, *optional*):
            Side of the low-resolution view in pixels, if not that of the released rule. Saved with the model.
        frozen (`list[str]`, *optional*):
            Regular expressions for names of parameters that stay as they are, besides those the stage freezes.
    """

    stage: str = field(metadata={"choices": list(STAGES), "help": "Stage of training."})
    data_path: str = field(metadata={"help": "Training data: a LLaVA JSON file or anything that `datasets` loads."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Evaluation data of the same kind."})
    image_folder: str | None = field(default=None, metadata={"help": "Where names of pictures begin."})
    streaming: bool = field(default=False, metadata={"help": "Read on demand what `datasets` loads."})
    skip_broken: bool = field(default=False, metadata={"help": "Leave broken rows out and write down which."})
    restart: bool = field(default=False, metadata={"help": "Start afresh: remove the checkpoints in `output_dir`."})
    size: int | None = field(default=None, metadata={"help": "Side of the image in pixels."})
    low_res_size: int | None = field(default=None, metadata={"help": "Side of the low-resolution view in pixels."})
    frozen: list[str] = field(default_factory=list, metadata={"help": "Regular expressions for frozen parameters."})


def make_parser() -> TrlParser:
    """The parser, with the defaults of `SFTConfig` that do not fit pictures or this project replaced."""
    parser = TrlParser((TrainingOptions, SFTConfig, ModelConfig))
    parser.set_defaults(
        learning_rate=None,  # the stage's
        max_length=None,  # would cut image tokens
        assistant_only_loss=True,
        remove_unused_columns=False,  # samples are made from columns that the model does not know
        train_sampling_strategy="group_by_length",
        report_to=["tensorboard"],
        # every batch uses every parameter, see LlavaHrDataCollator
        ddp_find_unused_parameters=False,
    )
    return parser


def find_checkpoint(options: TrainingOptions, training_args: SFTConfig, model_args: ModelConfig) -> str | None:
    """
    The checkpoint that this run goes on from, after removing what interrupted runs left half written (with `restart`,
    all checkpoints).

    Raises:
        ValueError: If the checkpoints in `output_dir` are another run's, or not of this command.
    """
    output_dir = Path(training_args.output_dir)
    run = {"stage": options.stage, "model_name_or_path": model_args.model_name_or_path, "data_path": options.data_path}
    run_file = output_dir / "run.json"
    checkpoint = None if options.restart else find_last_complete_checkpoint(output_dir)
    earlier = json.loads(run_file.read_text()) if run_file.exists() else None
    if earlier is None and (strange := list_checkpoints(output_dir)):
        raise ValueError(
            f"`output_dir` ({output_dir}) has {strange[-1].name}, which this command did not write: there is no "
            "run.json. Name another folder."
        )
    if checkpoint is not None and earlier != run:
        raise ValueError(
            f"`output_dir` ({output_dir}) has checkpoints of another run: {earlier}, not {run}. Name another folder, "
            "or remove them with `restart: true`."
        )
    if training_args.should_save:
        if earlier is not None:
            shutil.rmtree(output_dir / "incomplete", ignore_errors=True)
        for folder in list_checkpoints(output_dir):
            if options.restart or not has_state(folder):
                shutil.rmtree(folder)
        if checkpoint is None:
            for report in REPORTS:
                (output_dir / report).unlink(missing_ok=True)
            output_dir.mkdir(parents=True, exist_ok=True)
            write_whole(output_dir / "training_args.json", training_args.to_json_string())
            write_whole(run_file, json.dumps(run))
    return checkpoint


def make_trainer(
    options: TrainingOptions, training_args: SFTConfig, model_args: ModelConfig
) -> tuple[LlavaHrTrainer, LlavaHrConfig, str | None]:
    """
    All that can go wrong with starting point, stage, data and options goes wrong here, the data before the model is
    loaded.

    Returns:
        `tuple`: The trainer, the model's configuration, and the checkpoint that the run goes on from if there is one.

    Raises:
        ValueError: If starting point, stage, data and options do not fit each other; the message says what to do.
        OSError: If something cannot be read or written; names the path.
    """
    stage = STAGES[options.stage]
    if model_args.model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing: the folder or Hub id of the model to start from.")
    if model_args.use_peft and stage.lora_learning_rate is None:
        raise ValueError(f"`use_peft` does not go with `stage: {options.stage}`, which trains little anyway.")
    if model_args.use_peft and options.frozen:
        raise ValueError(
            "`frozen` does not go with `use_peft`. Name what is trained beside it: `lora_modules_to_save`."
        )
    output_dir = Path(training_args.output_dir)
    with training_args.main_process_first(local=False):
        checkpoint = find_checkpoint(options, training_args, model_args)
    if training_args.learning_rate is None:
        training_args.learning_rate = stage.lora_learning_rate if model_args.use_peft else stage.learning_rate

    revision = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    config = load_config(stage, model_args.model_name_or_path, options.low_res_size, **revision)
    processor = load_processor(stage, model_args.model_name_or_path, options.size, options.low_res_size, **revision)
    with training_args.main_process_first(desc="reading the data"):
        train_dataset, eval_dataset = (
            load_data(
                path,
                options.image_folder,
                plain=stage.chat_template == PLAIN_CHAT_TEMPLATE,
                skip_broken=options.skip_broken,
                report=output_dir / report,
                streaming=options.streaming,
                batch_size=training_args.train_batch_size * training_args.world_size,
            )
            if path is not None
            else None
            for path, report in zip((options.data_path, options.eval_data_path), REPORTS, strict=True)
        )

    set_seed(training_args.seed)  # inserted adapters start at random
    model = AutoModelForImageTextToText.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
        **revision,
    )
    if model_args.use_peft:
        model_args.lora_target_modules = model_args.lora_target_modules or LORA_TARGET_MODULES
        model_args.lora_modules_to_save = model_args.lora_modules_to_save or get_modules_to_save(config)
    else:
        freeze(model, stage, options.frozen)
    trainer = LlavaHrTrainer(
        model=model,
        args=training_args,
        data_collator=LlavaHrDataCollator(processor, assistant_only_loss=training_args.assistant_only_loss),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    if training_args.bf16 or model_args.dtype == "float32":
        trainer.keep_trained_in_float32()
    return trainer, config, checkpoint


def run(options: TrainingOptions, trainer: LlavaHrTrainer, config: LlavaHrConfig, checkpoint: str | None) -> None:
    """
    Trains and saves the result in `output_dir`. See [`make_trainer`] for the arguments.

    Raises:
        OSError: If the result cannot be written; names the path.
    """
    training_args, output_dir = trainer.args, Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint)
    # with LoRA the base model does not know of the adapters that were inserted
    trainer.save_result(config if isinstance(trainer.model, PeftModel) else None)
    if options.stage == "pretrain" and training_args.should_save:
        save_trained_part(STAGES[options.stage], output_dir, output_dir / "projector.safetensors")
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def main(options: TrainingOptions, training_args: SFTConfig, model_args: ModelConfig) -> None:
    """[`make_trainer`], then [`run`]."""
    run(options, *make_trainer(options, training_args, model_args))


if __name__ == "__main__":
    try:
        options, *others = make_parser().parse_args_and_config()
        prepared = make_trainer(options, *others)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    try:
        run(options, *prepared)
    except OSError as error:
        sys.exit(f"error: {error}")
