# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from modeling_llava_hr import get_num_image_tokens
from training.fineprint import FinePrintArguments
from training.pretrain_language_model import PretrainLanguageModelArguments
from training.pretrain_towers import PretrainTowersArguments
from training.train import make_parser
from training.train_tiny import PATCH_SIZE, PRESETS, UNUSED, TrainTinyArguments, get_low_res_size, get_steps, silence


PARSERS = {
    "training.fineprint": FinePrintArguments,
    "training.pretrain_language_model": PretrainLanguageModelArguments,
    "training.pretrain_towers": PretrainTowersArguments,
}


# The option's new name does not exist in transformers 5.17
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pathway", UNUSED)
def test_every_command_can_be_parsed(preset, pathway):
    for step in get_steps(TrainTinyArguments(preset=preset, pathway=pathway, blind=pathway == "both")):
        module, options = step.command[2], step.command[3:]
        if module in PARSERS:
            HfArgumentParser(PARSERS[module]).parse_args_into_dataclasses(options)
        elif module == "training.train" and preset == "cpu":  # `bf16` of the other needs its GPU
            make_parser().parse_args_and_config(options)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_stage_starts_from_the_one_before(preset):
    steps = [step for step in get_steps(TrainTinyArguments(preset=preset)) if step.command[2] != "training.fineprint"]
    made = [step.done.parent for step in steps]
    starts = [re.search(r"--model_name_or_path=(\S+)", " ".join(step.command)) for step in steps]
    assert [Path(start[1]) for start in starts if start] == made[2:-1]


@pytest.mark.parametrize("preset", PRESETS)
def test_both_views_have_whole_patches(preset):
    for course in (PRESETS[preset].pretrain, *PRESETS[preset].finetune):
        num_tokens = get_num_image_tokens(get_low_res_size(course.size), PATCH_SIZE)
        assert num_tokens == (course.size // 32) ** 2


def test_silence_sets_one_half_of_the_fusion_to_zero(tmp_path):
    names = ("low_res_proj.weight", "low_res_proj.bias", "high_res_proj.weight", "high_res_proj.bias")
    weights = {f"model.vision_tower.fusion.{name}": torch.ones(2) for name in names} | {
        "lm_head.weight": torch.ones(2)
    }
    save_file(weights, tmp_path / "model.safetensors")
    silence(tmp_path, "low_res")
    zero = {name for name, weight in load_file(tmp_path / "model.safetensors").items() if not weight.any()}
    assert zero == {"model.vision_tower.fusion.high_res_proj.weight", "model.vision_tower.fusion.high_res_proj.bias"}
