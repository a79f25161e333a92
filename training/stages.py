# SPDX-License-Identifier: Apache-2.0
"""The two stages of training (section 5.2 of the paper and the released scripts), and how they are applied."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, PreTrainedModel

from modeling_llava_hr import LlavaHrConfig, LlavaHrProcessor
from modeling_llava_hr.configuration_llava_hr import get_mr_adapter_layers
from modeling_llava_hr.processing_llava_hr import PLAIN_CHAT_TEMPLATE, VICUNA_V1_CHAT_TEMPLATE, get_chat_template
from modeling_llava_hr.utils import new_file


@dataclass(frozen=True)
class Stage:
    """A stage of training."""

    trainable: str  # regular expression that the names of the trained parameters match from their start
    mr_adapters: bool  # whether the model has MR-Adapters; missing ones are inserted, zero-initialised
    chat_template: str  # prompt form
    size: int  # side of the image in pixels
    image_aspect_ratio: str  # how an image is made square: "pad" or "crop"
    learning_rate: float  # peak
    lora_learning_rate: float | None = None  # peak with LoRA; `None` if the stage has no LoRA
    unpad: bool = False  # whether the tokens of the padding are dropped


STAGES = {
    "pretrain": Stage(
        trainable=r"model\.(multi_modal_projector|vision_tower\.fusion)\.",
        mr_adapters=False,
        chat_template=PLAIN_CHAT_TEMPLATE,
        size=384,
        image_aspect_ratio="crop",
        learning_rate=1e-3,
    ),
    "finetune": Stage(
        trainable="",
        mr_adapters=True,
        chat_template=VICUNA_V1_CHAT_TEMPLATE,
        size=1024,
        image_aspect_ratio="pad",
        learning_rate=2e-5,
        lora_learning_rate=2e-4,
    ),
}

# LoRA is for the language model only; "q_proj" by itself would match CLIP's layers as well
LORA_TARGET_MODULES = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"


def load_config(
    stage: Stage, model_name_or_path: str, low_res_size: int | None = None, **kwargs: Any
) -> LlavaHrConfig:
    """
    The configuration that a stage trains with: that of the starting point, with `low_res_size` (the side of the
    low-resolution view in pixels, by default that of the released rule). If the stage has MR-Adapters and the starting
    point does not, they are added at the starts of the last three quarters of the ViT. `kwargs` are those of
    `AutoConfig`.

    Raises:
        ValueError: If the starting point is not a LLaVA-HR, or has adapters although the stage has none.
    """
    config = AutoConfig.from_pretrained(model_name_or_path, **kwargs)
    if not isinstance(config, LlavaHrConfig):
        raise ValueError(
            f"`model_name_or_path` must be a LLaVA-HR model, but {model_name_or_path!r} is of type "
            f"{config.model_type!r}. Put one together with `python -m conversion.assemble`."
        )
    if config.mr_adapter_layers and not stage.mr_adapters:
        raise ValueError(
            f"`stage: pretrain` starts from a model without MR-Adapters, but {model_name_or_path!r} has some before "
            f"the layers {config.mr_adapter_layers}. Use `stage: finetune`, or a model from conversion.assemble."
        )
    if stage.mr_adapters and not config.mr_adapter_layers:
        config.mr_adapter_layers = get_mr_adapter_layers(config.vision_config.num_hidden_layers)
    config.low_res_size = low_res_size
    return config


def load_processor(
    stage: Stage,
    model_name_or_path: str,
    size: int | None = None,
    low_res_size: int | None = None,
    unpad: bool | None = None,
    **kwargs: Any,
) -> LlavaHrProcessor:
    """
    The processor of a starting point, with the prompt form and the image sides of a stage. The arguments are those of
    [`load_config`], plus `size` (the side of the image in pixels) and `unpad`, which override the stage's.
    """
    size = size or stage.size
    processor = AutoProcessor.from_pretrained(model_name_or_path, **kwargs)
    processor.chat_template = get_chat_template(processor.tokenizer, stage.chat_template)
    processor.image_processor = AutoImageProcessor.from_pretrained(
        model_name_or_path,
        size={"height": size, "width": size},
        low_res_size=low_res_size,
        image_aspect_ratio=stage.image_aspect_ratio,
        unpad=stage.unpad if unpad is None else unpad,
        **kwargs,
    )
    return processor


def freeze(model: PreTrainedModel, stage: Stage, frozen: list[str]) -> None:
    """
    Freezes all parameters that the stage does not train, and those whose names `frozen` matches from the start. Raises
    a `ValueError` if an expression matches no parameter or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in frozen:
        if not any(re.match(pattern, name) for name in names):
            raise ValueError(f"`frozen` has {pattern!r}, which matches no parameter. Names begin like {names[0]!r}.")
    for name, parameter in model.named_parameters():
        is_frozen = any(re.match(pattern, name) for pattern in frozen)
        parameter.requires_grad_(not is_frozen and re.match(stage.trainable, name) is not None)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Nothing is left to train: `frozen` ({frozen}) covers all that the stage trains.")


def save_trained_part(stage: Stage, folder: Path, file: Path) -> None:
    """Copies the weights that a stage trained from the saved model in `folder` into one safetensors file."""
    tensors = {}
    for weights in sorted(folder.glob("model*.safetensors")):
        with safe_open(weights, framework="pt") as source:
            names = [name for name in source.keys() if re.match(stage.trainable, name)]
            tensors.update({name: source.get_tensor(name) for name in names})
    with new_file(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
