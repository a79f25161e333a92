# SPDX-License-Identifier: Apache-2.0
"""Both stages on a miniature: what moves, what stays, and that runs end the same however they are run."""

import itertools
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from chats import chat, tokenize
from converted_checkpoints import ROOT
from datasets import Dataset, Features, Image, List
from forked_commands import assert_one_message
from peft import PeftConfig, PeftModel
from row_forms import MESSAGES
from safetensors.torch import load_file
from small_training import OPTIONS, get_losses
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, pipeline

from modeling_llava_hr.processing_llava_hr import PLAIN_CHAT_TEMPLATE, get_chat_template
from training.data import DataConfig, load_data
from training.stages import STAGES
from training.train import UNSUPPORTED, main, make_parser
from training.trainer import LlavaHrDataCollator


NAMES = ["pretrain_7b", "finetune_7b", "pretrain_13b_x", "finetune_13b_x", "finetune_7b_lora", "finetune_7b_qlora"]
CONFIGS = [ROOT / "training" / "configs" / f"{name}.yaml" for name in NAMES]
CONFIGS += [ROOT / "training" / "tiny" / f"{name}.yaml" for name in ("pretrain", "finetune")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL sets it
]


def get_words(stage, model, data_path, output_dir, **options):
    """The command line of a stage with batches of 4; `options` win over those for tests."""
    paths = {"model_name_or_path": model, "data_path": data_path, "output_dir": output_dir}
    words = list(OPTIONS)
    for name, value in {"stage": stage, **paths, "per_device_train_batch_size": 4, **options}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def parse(*args, **options):
    return make_parser().parse_args_and_config(get_words(*args, **options))


def train(*args, **options):
    """Runs a stage in this process; the arguments are those of `get_words`."""
    main(*parse(*args, **options))


def run_python(*words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)


def load_weights(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def get_moved(before, after):
    """Names of the weights of `after` that are not those of `before`, which has all of them."""
    before, after = load_weights(before), load_weights(after)
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(after[name].float(), before[name].float())}


@pytest.fixture(scope="session")
def chats(data):
    return data / "train.jsonl"


@pytest.fixture(scope="module")
def pretrained(converted_stage1, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("pretrained")
    options = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    train("pretrain", converted_stage1, data / "captions.json", output, **options)
    return output


@pytest.fixture(scope="module")
def finetuned(pretrained, chats, tmp_path_factory):
    output = tmp_path_factory.mktemp("finetuned")
    options = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
    train("finetune", pretrained, chats, output, **options)
    return output


def test_pretraining_moves_projector_and_fusion_alone(converted_stage1, pretrained):
    after, moved = load_weights(pretrained), get_moved(converted_stage1, pretrained)
    expected = {name for name in after if "multi_modal_projector" in name or "vision_tower.fusion" in name}
    assert moved == expected and len(moved) == 8
    losses = get_losses(pretrained)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    saved = load_file(pretrained / "projector.safetensors")  # the trained weights as one small file
    assert saved.keys() == moved and all(torch.equal(tensor, after[name]) for name, tensor in saved.items())


def test_finetuning_inserts_adapters_and_moves_everything(pretrained, finetuned):
    before, after = load_weights(pretrained), load_weights(finetuned)
    config = AutoConfig.from_pretrained(finetuned)
    assert config.mr_adapter_layers == [1, 2, 3]  # 4 layers
    adapters = {name for name in after if "mr_adapters" in name}
    assert after.keys() - before.keys() == adapters
    assert not [name for name in before if torch.equal(after[name], before[name])]
    for name in adapters:  # the last layer of both mappings starts at zero
        if re.search(r"low_res_mapping\.pointwise|high_res_mapping\.fc2", name):
            assert after[name].abs().max() > 0
    losses = get_losses(finetuned)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_each_stage_saves_its_prompt_form_and_views(pretrained, finetuned):
    plain, chat = AutoProcessor.from_pretrained(pretrained), AutoProcessor.from_pretrained(finetuned)
    assert plain.chat_template == get_chat_template(plain.tokenizer, PLAIN_CHAT_TEMPLATE)
    assert chat.chat_template == get_chat_template(chat.tokenizer)
    assert (plain.image_processor.image_aspect_ratio, chat.image_processor.image_aspect_ratio) == ("crop", "pad")
    assert (chat.image_processor.size.height, chat.image_processor.get_low_res_size()) == (128, 56)


def test_stages_are_those_of_the_paper():
    """Section 5.2 of the paper and the released scripts."""
    stages = {name: (s.learning_rate, s.size, s.image_aspect_ratio) for name, s in STAGES.items()}
    assert stages == {"pretrain": (1e-3, 384, "crop"), "finetune": (2e-5, 1024, "pad")}


def test_finetuning_goes_on_with_growing_views_and_frozen_parts(finetuned, chats, tmp_path):
    frozen = (r"model\.vision_tower\.high_res_tower\.", r"model\.language_model\.")
    options = {"size": 256, "low_res_size": 112, "learning_rate": 1e-3, "frozen": frozen}
    train("finetune", finetuned, chats, tmp_path, max_steps=2, **options)
    stayed = load_weights(tmp_path).keys() - get_moved(finetuned, tmp_path)
    expected = {name for name in load_weights(tmp_path) if "high_res_tower" in name or "language_model" in name}
    assert expected <= stayed
    assert all(".gate." in name for name in stayed - expected)  # tanh may be saturated
    image_processor = AutoProcessor.from_pretrained(tmp_path).image_processor
    assert (image_processor.size.height, image_processor.low_res_size) == (256, 112)
    assert AutoConfig.from_pretrained(tmp_path).low_res_size == 112  # what the model makes itself


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("pretrain", {}, "starts from a model without MR-Adapters"),
        ("pretrain", {"use_peft": True}, "`use_peft` does not go with `stage: pretrain`"),
        ("finetune", {"frozen": "nothing"}, "matches no parameter"),
        ("finetune", {"frozen": ("model", "lm_head")}, "Nothing is left to train"),
        ("finetune", {"use_peft": True, "frozen": "model"}, "`frozen` does not go with `use_peft`"),
        ("finetune", {"size": 100}, "must be a positive multiple of"),
    ],
)
def test_what_does_not_fit_is_refused(finetuned, data, tmp_path, stage, options, message):
    file = "captions.json" if stage == "pretrain" else "train.jsonl"
    with pytest.raises(ValueError, match=message):
        train(stage, finetuned, data / file, tmp_path, **options)


def test_a_starting_point_of_another_kind_is_refused(data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="must be a LLaVA-HR model, but .* is of type 'llama'"):
        train("pretrain", tmp_path, data / "captions.json", tmp_path / "output")


def assert_same_training(folder, expected_folder, rel):
    """Losses within `rel`, and weights within 1e-4."""
    assert get_losses(folder) == pytest.approx(get_losses(expected_folder), rel=rel)
    expected = load_weights(expected_folder)
    for name, tensor in load_weights(folder).items():
        # Adam's first steps have the size of the learning rate even where a gradient is rounding alone
        atol = 5e-3 if "k_proj.bias" in name else 1e-4
        torch.testing.assert_close(tensor, expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


HALVES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def test_gradient_accumulation_equals_a_larger_batch(pretrained, chats, tmp_path):
    for name, options in (("whole", {}), ("halves", HALVES)):
        train("finetune", pretrained, chats, tmp_path / name, max_steps=3, learning_rate=1e-3, **options)
    assert_same_training(tmp_path / "halves", tmp_path / "whole", rel=1e-5)


def test_broken_rows_are_refused_or_left_out(finetuned, data, chats, tmp_path):
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    rows[2]["image"] = "images/nowhere.png"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output, options = tmp_path / "output", {"max_steps": 1, "image_folder": data}
    with pytest.raises(ValueError, match=r"row 2 \(id '2'\): image .*nowhere.png' is missing"):
        train("finetune", finetuned, tmp_path / "rows.jsonl", output, **options)
    options |= {"skip_broken": True, "eval_data_path": tmp_path / "rows.jsonl", "eval_strategy": "steps"}
    train("finetune", finetuned, tmp_path / "rows.jsonl", output, **options)
    (skipped,) = map(json.loads, (output / "skipped_rows.jsonl").read_text().splitlines())
    assert (skipped["row"], skipped["id"]) == (2, "2")
    assert json.loads((output / "skipped_eval_rows.jsonl").read_text()) == skipped
    train("finetune", finetuned, chats, output, **options, restart=True)
    assert (output / "skipped_rows.jsonl").read_text() == ""


def test_wrong_data_is_one_message_before_the_model_is_loaded(commands, converted_stage1, tmp_path):
    shutil.copytree(converted_stage1, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "rows.jsonl").write_text('{"conversations": []}')
    words = get_words("finetune", tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "output")
    ended = commands.run("training.train", *words)
    assert_one_message(ended, f"1 of 1 rows in {tmp_path / 'rows.jsonl'} are broken:")


@pytest.mark.parametrize("has_image", [True, False])
def test_data_of_one_kind(finetuned, data, chats, tmp_path, has_image):
    rows = [line for line in chats.read_text().splitlines() if ("image" in json.loads(line)) is has_image]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    options = {"max_steps": 2, "learning_rate": 1e-3, "image_folder": data}
    train("finetune", finetuned, tmp_path / "rows.jsonl", tmp_path / "output", **options)
    moved = {name.split(".")[1] for name in get_moved(finetuned, tmp_path / "output")}
    vision = {"vision_tower", "multi_modal_projector"} if has_image else set()
    assert moved == {"language_model", "weight"} | vision  # lm_head.weight


def test_a_stream_trains_and_goes_on(finetuned, chats, tmp_path):
    """A data set as the Hub has them, read on demand; loaded by worker processes where it is not streamed."""
    rows = []
    for sample in load_data(DataConfig(str(chats))):
        messages = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in sample["messages"]]
        rows.append({"messages": messages, "images": sample["images"]})
    path, features = tmp_path / "rows.parquet", Features({"messages": MESSAGES, "images": List(Image())})
    Dataset.from_list(rows, features=features).to_parquet(path)
    options = {"streaming": True, "learning_rate": 1e-3, "save_steps": 2}
    for name, max_steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        train("finetune", finetuned, path, tmp_path / name, **options, max_steps=max_steps)
    assert get_losses(tmp_path / "parts") == get_losses(tmp_path / "whole")

    options = {"max_steps": 2, "learning_rate": 1e-3}
    for workers in (0, 2):
        train("finetune", finetuned, path, tmp_path / str(workers), **options, dataloader_num_workers=workers)
    assert get_losses(tmp_path / "2") == get_losses(tmp_path / "0")


def test_two_processes_equal_one(pretrained, data, chats, tmp_path):
    """One of them with texts alone: rows in their order, two with a image for each two without."""
    rows = chats.read_text().splitlines()
    kinds = [[row for row in rows if ("image" in json.loads(row)) is has_image] for has_image in (True, False)]
    pairs = [row for start in (0, 2, 4) for kind in kinds for row in kind[start : start + 2]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(pairs))
    options = {"image_folder": data, "max_steps": 3, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
    train("finetune", pretrained, file, tmp_path / "1", **options)
    words = get_words("finetune", pretrained, file, tmp_path / "2", **options, per_device_train_batch_size=2)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = run_python(*torchrun, "-m", "training.train", *words)
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "2", tmp_path / "1", rel=1e-4)


# Runs training and kills itself without a word while the last checkpoint is half written
KILLED_TRAINING = """
import os, signal, sys, torch
from training.train import main, make_parser

save = torch.save

def killed_save(value, file, **kwargs):
    save(value, file, **kwargs)
    if str(file).endswith("checkpoint-7/optimizer.pt"):
        os.truncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = killed_save
main(*make_parser().parse_args_and_config(sys.argv[1:]))
"""


def test_a_killed_run_goes_on_to_the_same_end_and_stays_there(pretrained, chats, tmp_path):
    run, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    options = {"max_steps": 7, "save_steps": 2, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    train("finetune", pretrained, chats, undisturbed, **options)
    result = run_python("-c", KILLED_TRAINING, *get_words("finetune", pretrained, chats, run, **options))
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6, 7)}
    assert not (run / "model.safetensors").exists()
    # an epoch is 4 steps: it resumes and ends within the second one; then there is nothing left to do
    for _ in range(2):
        train("finetune", pretrained, chats, run, **options)
        assert get_losses(run) == get_losses(undisturbed)
        assert get_moved(undisturbed, run) == set()
        assert {path.name for path in run.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_checkpoints_of_another_run_are_not_gone_on_from(converted_stage1, pretrained, chats):
    with pytest.raises(ValueError, match="has checkpoints of another run.*restart: true"):
        train("finetune", converted_stage1, chats, pretrained)


def test_a_restart_removes_checkpoints_but_no_copies(pretrained, chats, tmp_path):
    train("finetune", pretrained, chats, tmp_path, max_steps=1)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1-best")
    train("finetune", pretrained, chats, tmp_path, max_steps=2)
    train("finetune", pretrained, chats, tmp_path, max_steps=1, restart=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-1-best"]
    assert len(get_losses(tmp_path)) == 1


@pytest.mark.parametrize("restart", [False, True])
def test_folders_that_are_not_its_own_stay(pretrained, chats, tmp_path, restart):
    weights = tmp_path / "checkpoint-1000" / "unet.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"another program's")
    with pytest.raises(ValueError, match="has checkpoint-1000, which this command did not write"):
        train("finetune", pretrained, chats, tmp_path, restart=restart)
    assert weights.read_bytes() == b"another program's"


def test_a_full_disk_names_the_path_and_keeps_what_was_there(pretrained, chats, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of a file."""
    train("finetune", pretrained, chats, tmp_path, max_steps=2)
    before = (tmp_path / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written.*resumes from the newest complete"):
            train("finetune", pretrained, chats, tmp_path, max_steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    train("finetune", pretrained, chats, tmp_path, max_steps=4)
    assert len(get_losses(tmp_path)) == 4


@torch.no_grad()
def get_logits(model, inputs):
    return model.eval()(**inputs).logits


def load_base(folder, **kwargs):
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, **kwargs)


def make_inputs(folder, data):
    return tokenize(AutoProcessor.from_pretrained(folder), chat("Which color?", data / "images" / "0.png"))


@pytest.mark.parametrize("quantized", [False, True])
def test_lora_trains_adapters_fully_reloads_and_merges(pretrained, data, chats, tmp_path, quantized):
    options = {"max_steps": 4, "learning_rate": 1e-2, "use_peft": True, "load_in_4bit": quantized}
    train("finetune", pretrained, chats, tmp_path, **options)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {
        f"base_model.model.{name}"
        for name in load_base(tmp_path).state_dict()
        if re.search(r"mr_adapters|vision_tower\.fusion|multi_modal_projector", name)
    }
    assert all("language_model" in name for name in saved if "lora_" in name)
    assert min(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name) > 0  # it starts at zero

    inputs = make_inputs(tmp_path, data)
    model = PeftModel.from_pretrained(load_base(tmp_path), tmp_path)
    adapted, merged = get_logits(model, inputs), model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for same in (merged, AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(get_logits(same, inputs), adapted, atol=1e-4, rtol=1e-4)
    assert (get_logits(load_base(tmp_path), inputs) - adapted).abs().max() > 0.01
    if quantized:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = PeftModel.from_pretrained(load_base(tmp_path, quantization_config=config), tmp_path)
        assert torch.nn.functional.cosine_similarity(get_logits(model, inputs), adapted, dim=-1).min() > 0.9


def test_a_lora_result_opens_like_any_adapter_folder(pretrained, data, chats, tmp_path):
    """Stage 2 inserted MR-Adapters that the base lacks; a second LoRA run continues, a full one starts merged."""
    options = {"max_steps": 2, "learning_rate": 1e-2}
    first, second, full = tmp_path / "first", tmp_path / "second", tmp_path / "full"
    train("finetune", pretrained, chats, first, **options, use_peft=True)
    processor, inputs = AutoProcessor.from_pretrained(first), make_inputs(first, data)
    expected = get_logits(PeftModel.from_pretrained(load_base(first), first), inputs)
    for folder in (first, first / "checkpoint-2"):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        assert model.config.mr_adapter_layers == [1, 2, 3]
        torch.testing.assert_close(get_logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    pipe = pipeline("image-text-to-text", model=str(first), device="cpu")
    assert pipe.processor.image_processor.to_dict() == processor.image_processor.to_dict()
    assert pipe.processor.chat_template == processor.chat_template
    question = [{"role": "user", "content": [{"type": "image", "path": str(data / "images" / "0.png")}]}]
    answer = pipe(question, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    words = ("--model", first, "--image", data / "images" / "0.png", "--max_new_tokens", "3")
    assert run_python("-m", "examples.ask", *words).returncode == 0 and isinstance(answer, str)

    train("finetune", first, chats, second, **options, use_peft=True)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {name for name in after if re.search("lora_B|multi_modal_projector|fusion", name)} <= moved
    assert PeftConfig.from_pretrained(second).base_model_name_or_path == str(first / "_base")
    assert AutoModelForImageTextToText.from_pretrained(second).config.mr_adapter_layers == [1, 2, 3]
    with pytest.raises(ValueError, match="`lora_r` is 3, but .* was trained with 16"):
        train("finetune", first, chats, tmp_path / "x", **options, use_peft=True, lora_r=3)

    first = first.rename(tmp_path / "moved")  # together with its base
    train("finetune", first, chats, full, max_steps=2, learning_rate=0)
    merged = AutoModelForImageTextToText.from_pretrained(full)
    torch.testing.assert_close(get_logits(merged, inputs), expected, atol=1e-4, rtol=1e-4)


def test_a_lora_result_names_its_base_as_it_was_given(pretrained, finetuned, chats, tmp_path, monkeypatch):
    """`_base` for one without MR-Adapters, the starting point itself for one that has all."""
    monkeypatch.chdir(tmp_path)
    for name, start, base in (("a", pretrained, "a/_base"), ("b", finetuned, finetuned.name)):
        Path(start.name).symlink_to(start)
        train("finetune", start.name, chats, name, max_steps=1, use_peft=True)
        assert PeftConfig.from_pretrained(name).base_model_name_or_path == base
        AutoModelForImageTextToText.from_pretrained(name)


def test_padding_and_maximum_length_are_kept(finetuned, chats, tmp_path, monkeypatch):
    shapes = []
    call = LlavaHrDataCollator.torch_call

    def torch_call(self, examples):
        batch = call(self, examples)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(LlavaHrDataCollator, "torch_call", torch_call)
    train("finetune", finetuned, chats, tmp_path / "output", max_steps=4, pad_to_multiple_of=64)
    assert all(length % 64 == 0 for _, length in shapes) and shapes
    with pytest.raises(ValueError, match="(?s)24 of 32 rows .* tokens, more than 70"):
        train("finetune", finetuned, chats, tmp_path / "short", max_length=70)


@pytest.mark.parametrize("name", sorted(itertools.chain(*UNSUPPORTED.values())))
def test_fields_without_effect_are_refused_by_name(finetuned, chats, tmp_path, name):
    other = {"packing_strategy": "wrapped", "dataset_text_field": "chat", "length_column_name": "size"}
    other |= {"truncation_mode": "keep_end", "dataset_num_proc": 2, "pad_token": "</s>"}
    other |= {"dataset_kwargs": '{"a": 1}', "model_init_kwargs": '{"a": 1}', "include_for_metrics": "loss"}
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=f"`{name}` must stay "):
        train("finetune", finetuned, chats, tmp_path, **{name: other.get(name, True)})


def test_evaluation_data_of_a_config_can_be_unset(finetuned, chats, tmp_path):
    (tmp_path / "config.yaml").write_text(f"eval_data_path: {tmp_path / 'nowhere.jsonl'}")
    options = {"config": tmp_path / "config.yaml", "max_steps": 1}
    train("finetune", finetuned, chats, tmp_path / "unused", **options)
    options["eval_strategy"] = "steps"
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        train("finetune", finetuned, chats, tmp_path / "x", **options)
    with pytest.raises(ValueError, match="`eval_strategy` is steps, but `eval_data_path` is missing"):
        train("finetune", finetuned, chats, tmp_path / "y", **options, eval_data_path="none")


def test_splits_and_configurations_are_chosen():
    shared = {"dataset_config": "a", "dataset_revision": "main", "dataset_train_split": "small"}
    for more, expected in (
        ({"eval_data_path": "D"}, ("D", "a", "test", "main")),
        ({"eval_data_path": "D", "eval_dataset_config": "b"}, ("D", "b", "test", "main")),
        ({"eval_data_path": "E", "dataset_test_split": "dev"}, ("E", None, "dev", None)),
    ):
        options, *_ = parse("finetune", "M", "D", "x", **shared, **more)
        config = options.get_data_config(STAGES["finetune"], Path("x"))
        assert (config.data_path, config.name, config.split, config.revision) == ("D", "a", "small", "main")
        config = options.get_data_config(STAGES["finetune"], Path("x"), is_eval=True)
        assert (config.data_path, config.name, config.split, config.revision) == expected


def test_checkpoints_of_the_model_alone_are_not_overwritten(finetuned, chats, tmp_path):
    train("finetune", finetuned, chats, tmp_path, save_only_model=True, max_steps=1)
    with pytest.raises(ValueError, match="checkpoint-1, saved with `save_only_model`.*restart: true"):
        train("finetune", finetuned, chats, tmp_path, save_only_model=True, max_steps=2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    train("finetune", finetuned, chats, tmp_path, save_only_model=True, max_steps=2, restart=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_each_part_has_its_learning_rate(finetuned, chats, tmp_path):
    options = {"save_steps": 1, "learning_rate": 1e-3, "weight_decay": 0.1}
    options |= {"tower_learning_rate": 0, "adapter_learning_rate": 1e-4, "projector_learning_rate": 2e-3}
    train("finetune", finetuned, chats, tmp_path, **options, max_steps=2)
    weights = load_weights(tmp_path)
    stayed = weights.keys() - get_moved(finetuned, tmp_path)
    towers = {name for name in weights if re.search(r"vision_tower\.(?!fusion|mr_adapters)", name)}
    assert towers <= stayed and all(".gate." in name for name in stayed - towers)  # tanh may be saturated
    state = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=False)
    groups = [(group["lr"], group["weight_decay"], len(group["params"])) for group in state["param_groups"]]
    assert {rate for rate, _, _ in groups} == {0, 1e-4, 2e-3, 1e-3} and sum(n for *_, n in groups) == len(weights)
    train("finetune", finetuned, chats, tmp_path, **options, max_steps=3)
    assert len(get_losses(tmp_path)) == 3


def test_answers_are_logged_at_each_evaluation(finetuned, chats, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "report_to": "tensorboard"}
    train("finetune", finetuned, chats, tmp_path, **options, eval_data_path=chats)
    output = capsys.readouterr().out
    assert output.count("'Are you sure?': ") == 2 * 3 and "(expected 'Quite sure.')" in output
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Tensors("answers/text_summary")] == [1, 2]
    assert [event.step for event in events.Scalars("eval/loss")] == [1, 2]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_configs_parse(file):
    options, training_args, model_args = make_parser().parse_args_and_config(
        ["--config", str(file), "--use_cpu", "true"]
    )
    assert options.stage == file.stem.split("_")[0]
    assert model_args.use_peft == ("lora" in file.stem) and model_args.load_in_4bit == ("qlora" in file.stem)
    assert training_args.assistant_only_loss and training_args.max_length is None
    assert training_args.report_to == ["tensorboard"]
