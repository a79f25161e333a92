# SPDX-License-Identifier: Apache-2.0
"""LoRA results that open like any PEFT adapter folder, even if training changed more than their base has."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig

from modeling_llava_hr import LlavaHrConfig, LlavaHrProcessor
from modeling_llava_hr.utils import new_folder


BASE_FOLDER = "_base"  # `push_to_hub` omits names that begin with an underscore


class Start(NamedTuple):
    """A starting point: a model, arguments for its `from_pretrained`, and the LoRA result on it if there is one."""

    base: str
    kwargs: dict[str, Any]
    adapter: str | None


def get_modules_to_save(config: LlavaHrConfig) -> list[str]:
    """Names of the modules that are trained fully beside LoRA, and saved with it."""
    adapters = [f"mr_adapters.{index}" for index in range(len(config.mr_adapter_layers or []))]
    return [*adapters, "vision_tower.fusion", "multi_modal_projector"]


def find_start(model_name_or_path: str, **kwargs: Any) -> Start:
    """The base and the adapter of a model or a LoRA result, which may have been moved together with its `_base`."""
    is_model = os.path.isfile(os.path.join(model_name_or_path, "config.json"))
    if is_model or find_adapter_config_file(model_name_or_path, revision=kwargs.get("revision")) is None:
        return Start(model_name_or_path, kwargs, None)
    base = PeftConfig.from_pretrained(model_name_or_path, revision=kwargs.get("revision")).base_model_name_or_path
    moved = os.path.join(model_name_or_path, BASE_FOLDER)
    if not os.path.exists(base) and os.path.isdir(moved):
        base = moved
    return Start(base, {**kwargs, "revision": None}, model_name_or_path)


def load_adapter(model: PreTrainedModel, adapter: str, options: ModelConfig) -> PreTrainedModel | PeftModel:
    """Adds an earlier LoRA result to `model`: merged, or with `use_peft` to train it further."""
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
    lora.base_model_name_or_path = model.base_model.model.name_or_path
    return model


def fits(start: Start, config: LlavaHrConfig, processor: LlavaHrProcessor) -> bool:
    """Whether the starting point's base has the MR-Adapters, sides and processor that training with LoRA uses."""
    saved = AutoProcessor.from_pretrained(start.base, **start.kwargs)
    saved_config = LlavaHrConfig.from_pretrained(start.base, revision=start.kwargs["revision"])
    return (
        saved_config.mr_adapter_layers == config.mr_adapter_layers
        and saved_config.low_res_size == config.low_res_size
        and saved.chat_template == processor.chat_template
        and saved.image_processor.to_dict() == processor.image_processor.to_dict()
    )


def write_base(
    folder: Path, start: Start, config: LlavaHrConfig, model: PreTrainedModel, processor: LlavaHrProcessor
) -> None:
    """
    Writes the base of a LoRA result into a new folder, atomically: links to the weights of the starting point's base,
    the MR-Adapters that were inserted into `model`, `config` (not quantized) and `processor`. So `from_pretrained`,
    `pipeline` and PEFT load it in the usual way.
    """
    base, pattern, weights = start.base, "model*.safetensors", dict[str, str]()
    if not os.path.isdir(base):  # loading the model has downloaded it
        base = snapshot_download(base, revision=start.kwargs["revision"], allow_patterns=pattern)
    with new_folder(folder) as partial:
        for index, file in enumerate(sorted(Path(base).glob(pattern))):
            name = f"model-{index:05}.safetensors"
            with safe_open(file, framework="pt") as tensors:
                weights.update(dict.fromkeys(tensors.keys(), name))
            try:
                os.link(file.resolve(), partial / name)
            except OSError:  # another file system
                os.symlink(file.resolve(), partial / name)
        state = {name: t for name, t in model.state_dict().items() if "mr_adapters" in name and name not in weights}
        if inserted := {name: tensor.cpu().contiguous().clone() for name, tensor in state.items()}:
            save_file(inserted, partial / "model-mr-adapters.safetensors", metadata={"format": "pt"})
            weights.update(dict.fromkeys(inserted, "model-mr-adapters.safetensors"))
        (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
        config.save_pretrained(partial)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(partial)
        processor.save_pretrained(partial)
