# SPDX-License-Identifier: Apache-2.0
"""The model card of `examples.publish`: `model_card.md`, filled in from a folder and the command line."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from huggingface_hub import (
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)

from conversion.checkpoints import read_json
from modeling_llava_hr import LlavaHrForConditionalGeneration, LlavaHrProcessor, get_num_image_tokens


TEMPLATE = Path(__file__).with_suffix(".md")
TRANSFORMERS_VERSION = "5.18"  # the oldest that runs the code, as in setup.cfg
TAGS = ["llava_hr", "llava", "vision", "multimodal", "high-resolution", "custom_code"]


def _many(text: str):
    return field(default_factory=list, metadata={"action": "extend", "help": text})


@dataclass
class CardArguments:
    """
    What the card says in addition to what the folder tells.

    Args:
        license (`str`, *optional*): The Hub's identifier of the weights' licence.
        base_model, dataset (`list[str]`): Hub ids of what the model was made from, and trained on.
        run (`list[str]`): Folders of `training.train`, in order; by default the model's if it is one.
        evaluation (`str`, *optional*):
            Result of `training.tiny.evaluate`; by default `evaluation.json` in the model's folder if it exists.
        evaluation_dataset (`str`, *optional*):
            Hub id of the FinePrint data of `evaluation`. With it the figures are also written to
            `.eval_results/fineprint.yaml`, the form that the Hub reads.
    """

    license: str | None = field(default=None, metadata={"help": "the Hub's identifier of a licence, such as llama2"})
    base_model: list[str] = _many("Hub ids of the models that this one was made from")
    dataset: list[str] = _many("Hub ids of the training data")
    run: list[str] = _many("folders of training.train that led to the model, in order")
    evaluation: str | None = field(default=None, metadata={"help": "result of training.tiny.evaluate"})
    evaluation_dataset: str | None = field(default=None, metadata={"help": "Hub id of the data of --evaluation"})


@dataclass
class Results:
    """Files for the repository, rows of the card's table (`name`, `value`, `notes`), the command for FinePrint."""

    files: dict[str, bytes] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    command: str | None = None


def hide_folders(text: str) -> str:
    """Reduces absolute paths to their last part, as a machine's folders are private."""
    return re.sub(r"(?<![\w.~:/-])~?/(?:[^\s/]+/)*(?=[^\s/])", "", text)


def count_parameters(model: LlavaHrForConditionalGeneration) -> dict[str, str]:
    """Millions of parameters of each part; together they are the model."""

    def count(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    numbers = {
        "vit": count(tower) - count(tower.high_res_tower, tower.mr_adapters, tower.fusion),
        "cnn": count(tower.high_res_tower),
        "adapters": count(tower.mr_adapters),
        "projector": count(tower.fusion, projector),
        "language_model": model.num_parameters() - count(tower, projector),
    }
    return {name: f"{number / 1e6:,.2f} M" for name, number in numbers.items()}


def describe_run(folder: Path) -> str:
    """A sentence about a folder of `training.train`: its `run.json`, newest state, and arguments if saved."""
    run = read_json(folder / "run.json")
    start, data = run.get("model_name_or_path"), run.get("data_path")
    facts = [hide_folders(f"**{run.get('stage')}** from `{start}` on `{data}`")]
    states = [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("trainer_state.json")]
    if states:
        state = max(map(read_json, states), key=lambda state: state["global_step"])
        facts += [f"{state['global_step']:,} steps", f"{state['epoch']:.3g} epochs"]
        if log := [entry for entry in state["log_history"] if "loss" in entry]:
            facts.append(f"learning rate up to {max(entry['learning_rate'] for entry in log):.2g}")
            facts.append(f"last loss {log[-1]['loss']:.3g}")
    if (folder / "training_args.json").is_file():
        args = read_json(folder / "training_args.json")
        batch = f"{args['per_device_train_batch_size']} x {args['gradient_accumulation_steps']}"
        facts.append(f"{batch} samples per step and process")
        facts.append(f"optimizer {args['optim']}, {args['lr_scheduler_type']} schedule, seed {args['seed']}")
    return f"{facts[0]}: {', '.join(facts[1:])}." if facts[1:] else f"{facts[0]}."


def read_results(folder: Path, arguments: CardArguments) -> Results:
    """
    Results of evaluations: FinePrint's, and those in the folder in the Hub's form, `.eval_results/*.yaml`.

    Args:
        folder (`Path`): The model.
        arguments ([`CardArguments`]): Where FinePrint's result and data are.

    Raises:
        ValueError: If a file does not have the form that it should have; names it.
    """
    results = Results()
    evaluation = Path(arguments.evaluation or folder / "evaluation.json")
    if arguments.evaluation or evaluation.is_file():
        content, entries = read_json(evaluation), []
        try:
            results.command = hide_folders(content["command"])
            for kind, figures in content["accuracy"].items():
                value = round(100 * figures["accuracy"], 2)
                notes = f"standard error {100 * figures['standard_error']:.1f}, {figures['num_questions']} questions"
                results.rows.append({"name": f"FinePrint, {kind}", "value": f"{value} %", "notes": notes})
                if kind in ("fine", "coarse"):
                    notes = f"exact match in percent, {notes}"
                    entries.append(EvalResultEntry(arguments.evaluation_dataset, kind, value, notes=notes))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{evaluation} is not a result of training.tiny.evaluate ({error!r}).") from None
        if arguments.evaluation_dataset:
            text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            results.files[".eval_results/fineprint.yaml"] = text.encode()
    elif arguments.evaluation_dataset:
        raise ValueError("--evaluation_dataset names the data of --evaluation, but that is missing.")
    for file in sorted(folder.glob(".eval_results/*.yaml")):
        try:
            entries = parse_eval_result_entries(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{file} is not in the Hub's form ({error!r}).") from None
        results.files.setdefault(f".eval_results/{file.name}", file.read_bytes())
        for entry in entries:
            name = f"[{entry.dataset_id}](https://huggingface.co/datasets/{entry.dataset_id}), {entry.task_id}"
            results.rows.append({"name": name, "value": entry.value, "notes": entry.notes or ""})
    return results


def make_card(
    folder: Path,
    repo: str,
    arguments: CardArguments,
    model: LlavaHrForConditionalGeneration,
    processor: LlavaHrProcessor,
    results: Results,
    full_model: str | None = None,
    has_4bit_variant: bool = False,
) -> str:
    """
    The model card. A README.md in the folder is kept unless a trainer generated it: its text unchanged, its metadata
    too except for what the arguments say.

    Args:
        folder (`Path`): The model's folder.
        repo (`str`): The repository that the card is for.
        arguments ([`CardArguments`]): What the user says.
        model ([`LlavaHrForConditionalGeneration`]): The model; on the meta device.
        processor ([`LlavaHrProcessor`]): Its processor.
        results ([`Results`]): See [`read_results`].
        full_model (`str`, *optional*): Repository of the full weights if the card is for a 4-bit variant.
        has_4bit_variant (`bool`): Whether there is one in a repository of its own.

    Returns:
        `str`: Content of README.md.

    Raises:
        ValueError: If the metadata of a README.md, or a folder of training, cannot be read.
    """
    said = {"license": arguments.license, "base_model": arguments.base_model, "datasets": arguments.dataset}
    if full_model:
        said |= {"base_model": [full_model], "base_model_relation": "quantized"}
    said = {name: value for name, value in said.items() if value}
    data = ModelCardData(pipeline_tag="image-text-to-text", library_name="transformers", tags=TAGS, **said)

    if (folder / "README.md").is_file() and not full_model:
        try:
            card = ModelCard.load(folder / "README.md")
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{folder / 'README.md'} has metadata that cannot be read: {error}") from None
        tags = card.data.tags or []
        if "generated_from_trainer" not in tags:
            for name, value in {**data.to_dict(), "tags": [*tags, *(tag for tag in TAGS if tag not in tags)]}.items():
                card.data[name] = value
            return str(card)

    runs = arguments.run or ([folder] if (folder / "run.json").is_file() else [])
    views = processor.image_processor
    card = ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        repo=repo,
        name=repo.split("/")[1],
        full_model=full_model,
        has_4bit_variant=has_4bit_variant,
        is_4bit="quantization_config" in model.config.to_dict(),
        transformers_version=TRANSFORMERS_VERSION,
        size=views.size["height"],
        low_res_size=views.get_low_res_size(),
        num_tokens=get_num_image_tokens(views.get_low_res_size(), views.patch_size),
        image_aspect_ratio=views.image_aspect_ratio,
        config=model.config,
        vit=model.config.vision_config,
        cnn=model.config.high_res_vision_config,
        text=model.config.text_config.get_text_config(),
        parameters=count_parameters(model),
        runs=[describe_run(Path(run)) for run in runs],
        results=results.rows,
        command=results.command,
    )
    return str(card).rstrip() + "\n"
