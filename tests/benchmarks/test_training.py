# SPDX-License-Identifier: Apache-2.0
"""A run of tiny shapes, what is trained in it, and the figures that are derived from what was measured."""

import pytest
import torch

from benchmarks import training
from benchmarks.models import CONTENDERS, get_weight_bytes, make_contenders
from benchmarks.training import TrainingArguments


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_run_compares_both_stages_and_draws(run_benchmark, contenders):
    results = run_benchmark(training, "--repeats", "2", "--warmup", "0")
    for stage, text_tokens in (("pretrain", 30), ("finetune", 280)):
        entries = results[stage]
        assert {name: entry["tokens"] - text_tokens for name, entry in entries.items()} == {
            **{"llava-hr-384": 9, "llava-hr-768": 9, "llava-hr-1024": 16, "llava-hr-1536": 36},
            **{"llava-1.5-336": 9, "llava-1.5-448": 16, "llava-1.5-672": 36, "llava-1.5-1022": 81},
        }
        for entry in entries.values():
            assert 0 < entry["seconds"]["low"] <= entry["seconds"]["high"]
    model = contenders["llava-hr-1024"].model
    projector = count(model.model.multi_modal_projector)
    assert results["pretrain"]["llava-1.5-1022"]["trained_parameters"] == projector
    fused = projector + count(model.model.vision_tower.fusion)
    assert results["pretrain"]["llava-hr-1024"]["trained_parameters"] == fused
    assert results["finetune"]["llava-hr-1024"]["trained_parameters"] == count(model)
    llava = contenders["llava-1.5-1022"].model
    trained = count(llava) - count(llava.model.vision_tower)
    assert results["finetune"]["llava-1.5-1022"]["trained_parameters"] == trained
    assert [target["met"] in (True, False) for target in results["targets"]] == [True, True]


def test_targets_compare_round_by_round():
    timings = {"llava-hr-384": [10, 5], "llava-hr-1024": [11, 5.5], "llava-1.5-1022": [44, 22]}
    targets = training.find_targets(timings)
    assert [target["measured"]["median"] for target in targets] == pytest.approx([1.1, 0.25])
    assert [target["met"] for target in targets] == [True, True]
    del timings["llava-1.5-1022"]  # as if memory had not sufficed
    assert [target["met"] for target in training.find_targets(timings)] == [True, None]
    del timings["llava-hr-1024"]
    assert [target["met"] for target in training.find_targets(timings)] == [None] * 2


@pytest.mark.parametrize(
    ("ours", "llava", "more", "met"), [(2, 0, 2, True), (4, 2, 2, True), (2, 2, 0, False), (8, 8, None, None)]
)
def test_the_largest_steps_are_compared_unless_the_search_ended_first(ours, llava, more, met):
    target = training.compare_largest({"llava-hr-1536": ours, "llava-1.5-1022": llava}, 8)
    assert (target["measured"] and target["measured"]["median"], target["met"]) == (more, met)


@pytest.mark.parametrize(("fits", "largest"), [(0, 0), (1, 1), (5, 4), (100, 8)])
def test_the_batch_is_doubled_until_memory_ends(tiny, exhaust, fits, largest):
    arguments = TrainingArguments()
    arguments.max_batch_size = 10
    exhaust(training, "step", lambda model, batch, optimizer: len(batch["input_ids"]) > fits)
    sizes = list(training.find_largest_batch(tiny, "llava-hr-384", arguments))
    assert sizes == [0, 1, 2, 4, 8][: len(sizes)] and sizes[-1] == largest
    exhaust(training, "prepare", lambda *_: True)  # not even the model fits
    assert list(training.find_largest_batch(tiny, "llava-hr-384", arguments)) == [0]


def test_the_largest_batch_is_looked_for_instead(tiny, exhaust):
    """A GPU's search, in this process; its record has each size as soon as it fits."""
    exhaust(training, "step", lambda model, batch, optimizer: batch["pixel_values"].shape[-1] == 1022)
    arguments = TrainingArguments(contenders=["llava-hr-1536", "llava-1.5-1022"])
    arguments.max_batch_size = 2
    states = [dict(results["largest_batch"]) for results in training.run(arguments)]
    ours = [{"llava-hr-1536": size} for size in (0, 1, 2)]
    assert states == [*ours, *[{"llava-hr-1536": 2, "llava-1.5-1022": 0}] * 2]


def test_a_run_continues_where_memory_does_not_suffice(tiny, exhaust):
    exhaust(training, "step", lambda model, batch, optimizer: batch["pixel_values"].shape[-1] == 1022)
    names = ["llava-hr-384", "llava-hr-1024", "llava-1.5-1022"]
    arguments = TrainingArguments(repeats=1, warmup=0, contenders=names)
    arguments.dtype = "bfloat16"
    *_, results = training.run(arguments)
    for stage in ("pretrain", "finetune"):
        assert list(results[stage]) == names
        entry = results[stage].pop("llava-1.5-1022")
        assert entry["out_of_memory"] and "seconds" not in entry
        assert all("seconds" in entry for entry in results[stage].values())
    assert results["targets"][1]["met"] is None
    assert results["omitted"].startswith("float32 master weights: weights, gradients and the step are in bfloat16")


def test_peaks_on_a_gpu(contenders, exhaust, no_gpu_statistics):
    contenders = {name: contenders[name] for name in CONTENDERS[:4]}
    arguments = TrainingArguments(repeats=1)
    arguments.device = "cuda"
    exhaust(training, "step", lambda model, batch, optimizer: batch["pixel_values"].shape[-1] == 1536)
    *_, (entries, timings) = training.run_stage("finetune", contenders, arguments)
    assert entries["llava-hr-1536"]["out_of_memory"] and "llava-hr-1536" not in timings
    model = contenders["llava-hr-384"].model
    # two moments of each parameter, and the step of each as a float32
    states = 2 * 4 * count(model) + 4 * len(list(model.parameters()))
    assert entries["llava-hr-384"]["peak_bytes"] == 100 + get_weight_bytes(model) + states


def test_eight_bits_are_for_stage_two(tiny):
    pytest.importorskip("bitsandbytes", reason="the GPU image may lack it")
    arguments = TrainingArguments(method="full_8bit")
    for stage, expected in (("pretrain", "AdamW"), ("finetune", "AdamW8bit")):
        alone = make_contenders(tiny, ["llava-hr-1024"], "cpu", torch.float32, mr_adapters=stage == "finetune")
        assert type(training.prepare(alone, stage, arguments)).__name__ == expected


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_changes_what_the_stage_trains(contenders, method, checkpointing):
    arguments = TrainingArguments(method=method)
    arguments.device = "cuda" if checkpointing else "cpu"
    contender = contenders["llava-hr-1024"]
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


def test_the_loss_is_on_text_alone(contenders):
    labels = training.make_batch(contenders["llava-hr-1024"], "pretrain", 2)["labels"]
    assert (labels != -100).sum() == 2 * 30 and labels.shape == (2, 16 + 30)
