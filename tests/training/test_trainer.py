# SPDX-License-Identifier: Apache-2.0
"""Batches of one kind, complete checkpoints, and the sharding that training/accelerate configures."""

import json
import shutil
import zipfile
from collections import Counter

import pytest
import torch
import torch.multiprocessing
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from converted_checkpoints import ROOT
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForImageTextToText

from training.data import DataConfig, load_data
from training.stages import STAGES, load_config, load_processor
from training.trainer import (
    LlavaHrDataCollator,
    ModalityLengthGroupedSampler,
    complete_or_absent,
    find_last_complete_checkpoint,
)


def make_sampler(num_images, num_texts, batch_size=4, group_size=8, epoch=0, seed=0):
    has_image = [index < num_images for index in range(num_images + num_texts)]
    lengths = [7 * index % 101 for index in range(num_images + num_texts)]
    return ModalityLengthGroupedSampler(lengths, has_image, batch_size, group_size, seed, lambda: epoch)


@pytest.mark.parametrize(("num_images", "num_texts"), [(40, 16), (37, 5), (3, 0), (0, 9), (1, 1)])
def test_batches_have_one_kind_and_every_sample(num_images, num_texts):
    sampler = make_sampler(num_images, num_texts)
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % 4 == 0
    counts = Counter(order)
    assert counts.keys() == set(range(num_images + num_texts))
    for start in range(0, len(order), 4):
        assert len({index < num_images for index in order[start : start + 4]}) == 1
    # no more is repeated than fills a batch of each kind
    assert sum(count for index, count in counts.items() if index < num_images) < num_images + 4
    assert sum(count for index, count in counts.items() if index >= num_images) < num_texts + 4


def test_texts_of_a_step_have_similar_lengths():
    sampler = make_sampler(800, 0)
    order = [sampler.lengths[index] for index in sampler]
    spreads = [max(order[start : start + 8]) - min(order[start : start + 8]) for start in range(0, 800, 8)]
    assert sum(spreads) / len(spreads) < 20  # of 101; 80 without grouping
    assert order != sorted(order) and order != sorted(order, reverse=True)


def test_order_depends_on_seed_and_epoch_alone():
    order = list(make_sampler(40, 16))
    torch.rand(3)
    assert list(make_sampler(40, 16)) == order
    assert list(make_sampler(40, 16, epoch=1)) != order
    assert list(make_sampler(40, 16, seed=7)) != order
    assert list(make_sampler(40, 16, batch_size=2)) == order  # the same steps on more processes


@pytest.fixture(scope="module")
def stage2(converted_stage1):
    """The miniature as stage 2 starts with it, and its processor for small views."""
    torch.manual_seed(0)
    config = load_config(STAGES["finetune"], str(converted_stage1), low_res_size=56)
    model = AutoModelForImageTextToText.from_pretrained(converted_stage1, config=config, dtype=torch.float32)
    return model, load_processor(STAGES["finetune"], str(converted_stage1), 128, 56)


@pytest.fixture(scope="module")
def samples(data):
    """Samples with images, and samples without."""
    samples = list(load_data(DataConfig(str(data / "train.jsonl"))))
    return [[sample for sample in samples if bool(sample["images"]) is has_image] for has_image in (True, False)]


def test_texts_alone_give_the_same_loss_and_a_gradient_for_everything(stage2, samples):
    model, processor = stage2
    batch = LlavaHrDataCollator(processor, assistant_only_loss=True)(samples[1][:3])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 1
    text = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask", "labels")}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(model(**text).loss.item(), rel=1e-6)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [n for n, p in model.named_parameters() if "vision_tower" in n and p.grad.abs().max() > 0] == []


def test_bfloat16_views_change_a_bfloat16_training_within_rounding(stage2, samples):
    """The high-resolution tower rounds its input to bfloat16 anyway; the low-resolution view is rounded once more."""
    model, processor = stage2
    exact, rounded = (
        LlavaHrDataCollator(processor, assistant_only_loss=True, pixel_dtype=dtype)(samples[0][:3])
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.keys() == rounded.keys()
    for name, values in exact.items():
        assert torch.equal(rounded[name], values.bfloat16() if values.is_floating_point() else values)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = [model(**batch) for batch in (exact, rounded)]
    assert torch.equal(*(output.image_outputs.high_res_features for output in outputs))
    assert outputs[1].loss.item() == pytest.approx(outputs[0].loss.item(), rel=2**-7)


def test_the_newest_complete_checkpoint_is_found(tmp_path):
    assert find_last_complete_checkpoint(tmp_path / "nothing") is None
    for step in (5, 10, 100):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        for rank in range(2):
            with zipfile.ZipFile(checkpoint / f"rng_state_{rank}.pth", "w") as file:
                file.writestr("data", "x")
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / "checkpoint-100-best")
    assert find_last_complete_checkpoint(tmp_path).endswith("checkpoint-100")
    (tmp_path / "checkpoint-100" / "rng_state_1.pth").write_bytes(b"half")
    assert find_last_complete_checkpoint(tmp_path).endswith("checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 1')
    assert find_last_complete_checkpoint(tmp_path).endswith("checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    assert find_last_complete_checkpoint(tmp_path) is None


def test_a_folder_that_cannot_be_written_is_removed_and_named(tmp_path):
    with pytest.raises(OSError, match="checkpoint-7 could not be written: .*No space left"):
        with complete_or_absent(tmp_path / "checkpoint-7"):
            (tmp_path / "checkpoint-7").mkdir()
            (tmp_path / "checkpoint-7" / "config.json").write_text("{}")
            with open("/dev/full", "w") as file:
                file.write("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("The weights trying to be saved contained shared tensors"),
        FileNotFoundError(2, "No such file or directory", "/data/street.png"),
    ],
)
def test_what_is_no_fault_of_writing_stays_itself(tmp_path, error):
    with pytest.raises(type(error)) as raised:
        with complete_or_absent(tmp_path / "checkpoint-7"):
            (tmp_path / "checkpoint-7").mkdir()
            raise error
    assert raised.value is error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "num_processes"),
    [("fsdp2", "FSDP", 8), ("fsdp2_multi_node", "FSDP", 16), ("zero3", "DEEPSPEED", 8)],
)
def test_accelerate_configs_parse(name, kind, num_processes):
    config = load_config_from_file(str(ROOT / "training" / "accelerate" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig) and config.distributed_type.value == kind
    assert config.num_processes == 8 * config.num_machines == num_processes


def run_sharded_step(rank, folder, layer_classes, batches):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(batches)
    )
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    mesh = torch.distributed.init_device_mesh("cpu", (len(batches),))
    wrapped = Counter()
    for module in list(model.modules()):
        if type(module).__name__ in layer_classes:
            wrapped[type(module).__name__] += 1  # the name changes with it
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loss = model(**batches[rank]).loss
    loss.backward()
    optimizer.step()
    weights = {name: parameter.full_tensor().detach() for name, parameter in model.state_dict().items()}
    torch.save({"loss": loss.detach(), "weights": weights, "wrapped": wrapped}, folder / f"result-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_step_sharded_as_configured_equals_one_process(stage2, samples, tmp_path):
    """fully_shard on two gloo processes, one with texts alone; the model names what is wrapped."""
    model, processor = stage2
    layer_classes = sorted(model._no_split_modules)
    collator = LlavaHrDataCollator(processor, assistant_only_loss=True)
    batches = [dict(collator(kind[:2])) for kind in samples]
    model.save_pretrained(tmp_path)
    # not forked: autograd refuses it where another test has used its threads
    torch.multiprocessing.spawn(run_sharded_step, (tmp_path, layer_classes, batches), nprocs=2)
    results = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=False) for rank in range(2)]

    model.zero_grad()
    losses = [model(**batch).loss for batch in batches]
    (sum(losses) / 2).backward()
    assert [result["loss"].item() for result in results] == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    depths = AutoConfig.from_pretrained(tmp_path)
    num_blocks = sum(depths.high_res_vision_config.model_args["depths"])
    assert results[0]["wrapped"] == {
        "LlamaDecoderLayer": depths.text_config.num_hidden_layers,
        "CLIPEncoderLayer": depths.vision_config.num_hidden_layers,
        "LlavaHrMixtureOfResolutionAdapter": 3,
        "LlavaHrVisionEmbeddings": 1,
        "ConvNeXtBlock": num_blocks,
    }
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 1e-2 * parameter.grad
        for result in results:
            torch.testing.assert_close(result["weights"][name], expected, atol=1e-5, rtol=1e-4, msg=name)
