# SPDX-License-Identifier: Apache-2.0
"""LoRA results that open like any PEFT adapter folder, also where the base alone is another model."""

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig

from conversion._common import find_source, find_weight_files, new_folder
from modeling_llava_hr import LlavaHrConfig, LlavaHrProcessor


BASE_FOLDER = "_base"  # `push_to_hub` leaves out what begins with an underscore
WEIGHT_FILES = ("model.safetensors.index.json", "model.safetensors")


def find_base(model_name_or_path: str, **kwargs: Any) -> tuple[str, dict[str, Any], str | None]:
    """
    The base model of a starting point.

    Args:
        model_name_or_path (`str`): Folder or Hub id of a model or adapter.
        kwargs: `revision` and others for `from_pretrained`.

    Returns:
        `tuple`: The base, `kwargs` for it, and `model_name_or_path` if it is an adapter, else `None`.
    """
    is_model = os.path.isfile(os.path.join(model_name_or_path, "config.json"))
    if is_model or find_adapter_config_file(model_name_or_path, revision=kwargs.get("revision")) is None:
        return model_name_or_path, kwargs, None
    adapter = PeftConfig.from_pretrained(model_name_or_path, revision=kwargs.get("revision"))
    return adapter.base_model_name_or_path, {**kwargs, "revision": None}, model_name_or_path


def load_adapter(model: PreTrainedModel, adapter: str, options: ModelConfig) -> PreTrainedModel | PeftModel:
    """
    Puts an earlier LoRA result on its base: to train it further with `use_peft`, else merged.

    Raises:
        ValueError: If `options` ask for another LoRA than the adapter is.
    """
    model = PeftModel.from_pretrained(model, adapter, is_trainable=options.use_peft)
    if not options.use_peft:
        return model.merge_and_unload()
    lora, default = model.peft_config["default"], ModelConfig()
    for name, value in (("lora_r", lora.r), ("lora_alpha", lora.lora_alpha), ("lora_dropout", lora.lora_dropout)):
        if getattr(options, name) not in (value, getattr(default, name)):
            raise ValueError(
                f"`{name}` is {getattr(options, name)}, but {adapter} was trained with {value}, and its training "
                f"continues. Use {value}, or merge it into its base first to start another LoRA."
            )
    return model


def fits(base: str, config: LlavaHrConfig, processor: LlavaHrProcessor, **kwargs: Any) -> bool:
    """Whether `base` has the MR-Adapters, sides and processor that training with LoRA uses."""
    saved = AutoProcessor.from_pretrained(base, **kwargs)
    saved_config = LlavaHrConfig.from_pretrained(base, revision=kwargs.get("revision"))
    return (
        saved_config.mr_adapter_layers == config.mr_adapter_layers
        and saved_config.low_res_size == config.low_res_size
        and saved.chat_template == processor.chat_template
        and saved.image_processor.to_dict() == processor.image_processor.to_dict()
    )


def write_base(
    folder: Path, base: str, config: LlavaHrConfig, model: PreTrainedModel, processor: LlavaHrProcessor
) -> None:
    """
    Writes the base of a LoRA result: links to the weights of `base`, the inserted MR-Adapters, their configuration
    and the processor. So `from_pretrained`, `pipeline` and PEFT find all of it in the usual way.

    Args:
        folder (`Path`): New folder; complete or absent.
        base (`str`): Folder or Hub id of the base model.
        config ([`LlavaHrConfig`]): Its configuration with the inserted adapters, not quantized.
        model ([`PreTrainedModel`]): Has the inserted adapters.
        processor ([`LlavaHrProcessor`]): Saved beside the weights.
    """
    source = find_source(base, "model_name_or_path", WEIGHT_FILES)
    weights: dict[str, str] = {}
    with new_folder(folder) as partial:
        for index, file in enumerate(find_weight_files(source, WEIGHT_FILES)):
            name = f"model-{index:05}.safetensors"
            with safe_open(file, framework="pt") as tensors:
                weights.update(dict.fromkeys(tensors.keys(), name))
            try:
                os.link(file.resolve(), partial / name)
            except OSError:  # another file system
                os.symlink(file.resolve(), partial / name)
        inserted = {name: t for name, t in model.state_dict().items() if "mr_adapters" in name and name not in weights}
        if inserted:
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in inserted.items()}
            save_file(tensors, partial / "model-mr-adapters.safetensors", metadata={"format": "pt"})
            weights.update(dict.fromkeys(inserted, "model-mr-adapters.safetensors"))
        index_file = {"metadata": {}, "weight_map": weights}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=2))
        config.save_pretrained(partial)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        processor.save_pretrained(partial)
