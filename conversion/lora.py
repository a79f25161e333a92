# SPDX-License-Identifier: Apache-2.0
"""LoRA checkpoints of the released code, which are merged into their base during conversion."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from conversion.checkpoints import Plan, find_weight_files, read_json, read_tensors
from conversion.keys import ORIGINAL_KEYS, look_up


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Projector, fusion and any other parts that were trained fully beside LoRA
TRAINABLES_FILE = "non_lora_trainables.bin"
LORA_PREFIX = r"base_model\.model\."
# Names in the trainables file, with or without PEFT's prefix
TRAINABLE_KEYS = tuple(key._replace(pattern=f"(?:{LORA_PREFIX})?{key.pattern}") for key in ORIGINAL_KEYS)

# Settings of PEFT that the released code does not use, each with the values that have no effect
UNUSED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "modules_to_save": (None, []),
}


class Update(NamedTuple):
    """
    A low-rank update of a weight, `scale * b @ a` (LoRA, arXiv 2106.09685, section 4.1: `scale = alpha / rank`).

    Args:
        a (`torch.Tensor` of shape `(rank, in_features)`): "lora_A".
        b (`torch.Tensor` of shape `(out_features, rank)`): "lora_B".
        scale (`float`): Its factor.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """`(out_features, in_features)` -> the same in float32, updated."""
        return weight.float().addmm(self.b.float(), self.a.float(), alpha=self.scale)


def read_updates(folder: Path, plan: Plan) -> tuple[dict[str, Update], list[str]]:
    """
    Reads a LoRA adapter.

    Args:
        folder (`Path`): Has `adapter_config.json` and the adapter's weights.
        plan ([`Plan`]): Where the weights to update come from.

    Returns:
        `tuple`: The updates by the model's names; the faults: unexpected or missing names, shapes that do not fit.

    Raises:
        ValueError: If a file is missing, or the adapter is not plain LoRA.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    for name, values in UNUSED.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{ADAPTER_CONFIG} has {name} = {config[name]!r}; only {values[0]!r} can be merged.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"{folder / ADAPTER_CONFIG} must have the numbers `r` and `lora_alpha`.")
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    files = find_weight_files(folder, ADAPTER_FILES)
    if not files:
        raise ValueError(f"{folder} has none of {', '.join(ADAPTER_FILES)}.")

    shapes = {entry.name: entry.meta.shape for entry in plan.entries}
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    faults = []
    for source, tensor in read_tensors(files[0]).items():
        match = re.fullmatch(rf"{LORA_PREFIX}(.+)\.lora_([AB])(?:\.default)?\.weight", source)
        name = (match and look_up(f"{match[1]}.weight", ORIGINAL_KEYS)[1]) or ""
        if match is None or name not in shapes:
            faults.append(f"{source}: unexpected")
            continue
        out_features, *in_features = shapes[name]
        expected = [rank, *in_features] if match[2] == "A" else [out_features, rank]
        if [*tensor.shape] != expected:
            faults.append(f"{source}: shape {[*tensor.shape]}, expected {expected}")
        pairs.setdefault(name, {})[match[2]] = tensor
    faults += [f"{name}: one half of its LoRA update is missing" for name, pair in pairs.items() if len(pair) < 2]
    if not pairs:
        faults.append(f"{files[0].name} has no LoRA update")
    return {name: Update(pair["A"], pair["B"], scale) for name, pair in pairs.items() if len(pair) == 2}, faults
