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
"""A run of tiny shapes, what is trained in it, and the figures that are derived from what was measured."""

import pytest
import torch

from benchmarks import training
from benchmarks._common import Timing
from benchmarks._models import make_contender
from benchmarks.training import TrainingArguments


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_run_compares_both_stages_and_draws(run_benchmark, tiny):
    results = run_benchmark(training, "--repeats", "2", "--warmup", "0")
    for stage, text_tokens in (("pretrain", 30), ("finetune", 280)):
        entries = results[stage]
        assert {name: entry["tokens"] - text_tokens for name, entry in entries.items()} == {
            **{"llava-hr-384": 9, "llava-hr-768": 9, "llava-hr-1024": 16, "llava-hr-1536": 36},
            **{"llava-1.5-336": 9, "llava-1.5-448": 16, "llava-1.5-672": 36, "llava-1.5-1022": 81},
        }
        for entry in entries.values():
            assert 0 < entry["seconds"]["low"] <= entry["seconds"]["high"]
            assert entry["peak_bytes"] > 4 * 3 * max(entry["sides"].values()) ** 2
    model = make_contender(tiny, "llava-hr-1024", "cpu", torch.float32).model
    projector = count(model.model.multi_modal_projector)
    assert results["pretrain"]["llava-1.5-1022"]["trained_parameters"] == projector
    fused = projector + count(model.model.vision_tower.fusion)
    assert results["pretrain"]["llava-hr-1024"]["trained_parameters"] == fused
    assert results["finetune"]["llava-hr-1024"]["trained_parameters"] == count(model)
    assert [target["met"] in (True, False) for target in results["targets"]] == [True, True]


def test_targets_compare_round_by_round():
    timings = {"llava-hr-384": Timing([10, 5]), "llava-hr-1024": Timing([11, 5.5]), "llava-1.5-1022": Timing([44, 22])}
    targets = training.find_targets(timings)
    assert [target["measured"]["median"] for target in targets] == pytest.approx([1.1, 0.25])
    assert [target["met"] for target in targets] == [True, True]
    del timings["llava-1.5-1022"]  # as if memory had not sufficed
    assert len(training.find_targets(timings)) == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_changes_what_the_stage_trains(tiny, method, checkpointing):
    arguments = TrainingArguments(method=method, gradient_checkpointing=checkpointing)
    contender = make_contender(tiny, "llava-hr-1024", "cpu", torch.float32)
    optimizer = training.prepare({"x": contender}, "finetune", arguments)
    before = {name: parameter.detach().clone() for name, parameter in contender.model.named_parameters()}
    training.step(contender.model, training.make_batch(contender, "finetune", 2), optimizer)
    changed = {name for name, p in contender.model.named_parameters() if not torch.equal(p, before[name])}
    projector = "model.multi_modal_projector.linear_1.weight"
    language_model = "model.language_model.layers.0.mlp.up_proj"
    if method == "lora":
        trained = ("lora_", "multi_modal_projector", "fusion", "mr_adapters")
        assert projector in changed and f"{language_model}.lora_B.default.weight" in changed
        assert all(any(part in name for part in trained) for name in changed)
    else:
        assert {projector, f"{language_model}.weight", "model.vision_tower.layers.0.mlp.fc1.weight"} <= changed
    assert all(parameter.grad is None for parameter in contender.model.parameters())


def test_the_loss_is_on_text_alone(tiny):
    contender = make_contender(tiny, "llava-hr-1024", "cpu", torch.float32)
    labels = training.make_batch(contender, "pretrain", 2)["labels"]
    assert (labels != -100).sum() == 2 * 30 and labels.shape == (2, 16 + 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"method": "sgd"}, "--method must be one of full, full_8bit, lora"), ({"dtype": "half"}, "--dtype must be")],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**options)
