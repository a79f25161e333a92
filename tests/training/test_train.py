# SPDX-License-Identifier: Apache-2.0
"""Both stages on a miniature: what moves, what stays, and that runs end the same however they are run."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Features, Image, List
from peft import PeftConfig, PeftModel
from row_forms import FILES, MESSAGES, ROWS, write_rows
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, pipeline

from modeling_llava_hr.processing_llava_hr import PLAIN_CHAT_TEMPLATE, get_chat_template
from training.data import DataConfig, load_data
from training.stages import STAGES
from training.train import UNSUPPORTED, make_parser
from training.trainer import LlavaHrDataCollator


ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "examples" / "tiny-llava-hr"
NAMES = ["pretrain_7b", "finetune_7b", "pretrain_13b_x", "finetune_13b_x", "finetune_7b_lora", "finetune_7b_qlora"]
CONFIGS = [ROOT / "training" / "configs" / f"{name}.yaml" for name in NAMES]
CONFIGS += [ROOT / "training" / "tiny" / f"{name}.yaml" for name in ("pretrain", "finetune")]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL sets it
]


def load_weights(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    return tmp_path_factory.mktemp("trainings")


@pytest.fixture(scope="module")
def pretrained(mini, miniature, data, trainings):
    options = ("--max_steps", "12", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3")
    mini.train("pretrain", miniature, data / "captions.json", trainings / "pretrained", *options)
    return trainings / "pretrained"


@pytest.fixture(scope="module")
def finetuned(mini, pretrained, data, trainings):
    options = ("--max_steps", "12", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3")
    mini.train("finetune", pretrained, data / "train.jsonl", trainings / "finetuned", *options)
    return trainings / "finetuned"


def test_pretraining_moves_projector_and_fusion_alone(mini, miniature, pretrained):
    before, after = load_weights(miniature), load_weights(pretrained)
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(after[name].float(), before[name].float())}
    expected = {name for name in after if "multi_modal_projector" in name or "vision_tower.fusion" in name}
    assert moved == expected and len(moved) == 8
    losses = mini.losses(pretrained)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    saved = load_file(pretrained / "projector.safetensors")  # the trained weights as one small file
    assert saved.keys() == moved and all(torch.equal(tensor, after[name]) for name, tensor in saved.items())


def test_finetuning_inserts_adapters_and_moves_everything(mini, pretrained, finetuned):
    before, after = load_weights(pretrained), load_weights(finetuned)
    config = AutoConfig.from_pretrained(finetuned)
    assert config.mr_adapter_layers == [1, 2, 3]  # 4 layers
    adapters = {name for name in after if "mr_adapters" in name}
    assert after.keys() - before.keys() == adapters
    assert not [name for name in before if torch.equal(after[name], before[name])]
    for name in adapters:  # the last layer of both mappings starts at zero
        if re.search(r"low_res_mapping\.pointwise|high_res_mapping\.fc2", name):
            assert after[name].abs().max() > 0
    losses = mini.losses(finetuned)
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


def test_finetuning_goes_on_with_growing_views_and_frozen_parts(mini, finetuned, data, tmp_path):
    options = ("--max_steps", "2", "--size", "256", "--low_res_size", "112", "--learning_rate", "1e-3")
    frozen = ("--frozen", r"model\.vision_tower\.high_res_tower\.", r"model\.language_model\.")
    mini.train("finetune", finetuned, data / "train.jsonl", tmp_path, *options, *frozen)
    before, after = load_weights(finetuned), load_weights(tmp_path)
    assert before.keys() == after.keys()
    stayed = {name for name in after if torch.equal(after[name], before[name])}
    expected = {name for name in after if "high_res_tower" in name or "language_model" in name}
    assert expected <= stayed
    assert all(".gate." in name for name in stayed - expected)  # tanh may be saturated
    image_processor = AutoProcessor.from_pretrained(tmp_path).image_processor
    assert (image_processor.size.height, image_processor.low_res_size) == (256, 112)
    assert AutoConfig.from_pretrained(tmp_path).low_res_size == 112  # what the model makes itself


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        ("pretrain", (), "starts from a model without MR-Adapters"),
        ("pretrain", ("--use_peft",), "`use_peft` does not go with `stage: pretrain`"),
        ("finetune", ("--frozen", "nothing"), "matches no parameter"),
        ("finetune", ("--frozen", "model", "lm_head"), "Nothing is left to train"),
        ("finetune", ("--use_peft", "--frozen", "model"), "`frozen` does not go with `use_peft`"),
        ("finetune", ("--size", "100"), "must be a positive multiple of"),
    ],
)
def test_what_does_not_fit_is_refused(mini, finetuned, data, tmp_path, stage, options, message):
    file = "captions.json" if stage == "pretrain" else "train.jsonl"
    with pytest.raises(ValueError, match=message):
        mini.train(stage, finetuned, data / file, tmp_path, *options)


def test_a_starting_point_of_another_kind_is_refused(mini, data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="must be a LLaVA-HR model, but .* is of type 'llama'"):
        mini.train("pretrain", tmp_path, data / "captions.json", tmp_path / "output")


def test_gradient_accumulation_equals_a_larger_batch(mini, pretrained, data, tmp_path):
    shared = ("--max_steps", "3", "--learning_rate", "1e-3")
    mini.train("finetune", pretrained, data / "train.jsonl", tmp_path / "1", *shared, *batch(4))
    mini.train("finetune", pretrained, data / "train.jsonl", tmp_path / "2", *shared, *batch(2, 2))
    assert mini.losses(tmp_path / "2") == pytest.approx(mini.losses(tmp_path / "1"), rel=1e-5)
    assert_close(tmp_path / "2", tmp_path / "1")


def batch(size, accumulation=1):
    return "--per_device_train_batch_size", str(size), "--gradient_accumulation_steps", str(accumulation)


def assert_close(folder, expected_folder, atol=1e-4):
    expected = load_weights(expected_folder)
    for name, tensor in load_weights(folder).items():
        # Adam's first steps have the size of the learning rate even where a gradient is rounding alone
        atol_here = 5e-3 if "k_proj.bias" in name else atol
        torch.testing.assert_close(tensor, expected[name], atol=atol_here, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_broken_rows_are_refused_or_left_out(mini, finetuned, data, tmp_path):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows[2]["image"] = "images/nowhere.png"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = (finetuned, tmp_path / "rows.jsonl", tmp_path / "output")
    options = ("--max_steps", "1", "--image_folder", str(data), *batch(4))
    with pytest.raises(ValueError, match=r"row 2 \(id '2'\): image .*nowhere.png' is missing"):
        mini.train("finetune", *paths, *options)
    mini.train("finetune", *paths, *options, "--skip_broken", "true")
    (skipped,) = map(json.loads, (tmp_path / "output" / "skipped_rows.jsonl").read_text().splitlines())
    assert (skipped["row"], skipped["id"]) == (2, "2")
    evaluation = ("--eval_data_path", str(tmp_path / "rows.jsonl"), "--eval_strategy", "steps")
    evaluation += ("--skip_broken", "true", "--restart", "true")
    mini.train("finetune", finetuned, data / "train.jsonl", tmp_path / "output", *options, *evaluation)
    assert json.loads((tmp_path / "output" / "skipped_eval_rows.jsonl").read_text()) == skipped
    assert (tmp_path / "output" / "skipped_rows.jsonl").read_text() == ""


def test_wrong_data_is_one_message_before_the_model_is_loaded(finetuned, data, tmp_path):
    for file in finetuned.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"conversations": []}')
    command = [sys.executable, "-m", "training.train", "--stage", "finetune", "--bf16", "false", "--use_cpu", "true"]
    paths = [
        "--model_name_or_path",
        tmp_path,
        "--data_path",
        tmp_path / "rows.jsonl",
        "--output_dir",
        tmp_path / "out",
    ]
    ended = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert f"error: 1 of 1 rows in {tmp_path / 'rows.jsonl'} are broken:" in ended.stderr


@pytest.mark.parametrize("has_image", [True, False])
def test_data_of_one_kind(mini, finetuned, data, tmp_path, has_image):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows if ("image" in row) is has_image))
    options = ("--max_steps", "2", "--learning_rate", "1e-3", "--image_folder", str(data), *batch(4))
    mini.train("finetune", finetuned, tmp_path / "rows.jsonl", tmp_path / "output", *options)
    before, after = load_weights(finetuned), load_weights(tmp_path / "output")
    moved = {name.split(".")[1] for name in after if not torch.equal(after[name], before[name])}
    vision = {"vision_tower", "multi_modal_projector"} if has_image else set()
    assert moved == {"language_model", "weight"} | vision  # lm_head.weight


def test_a_stream_trains_and_goes_on(mini, finetuned, data, tmp_path):
    """A data set as the Hub has them, read on demand; loaded by worker processes where it is not streamed."""
    samples = list(load_data(DataConfig(str(data / "train.jsonl"))))
    features = Features({"messages": MESSAGES, "images": List(Image())})
    rows = {"messages": [], "images": []}
    for sample in samples:
        messages = [{"role": m["role"], "content": m["content"][-1]["text"]} for m in sample["messages"]]
        rows["messages"].append(messages)
        rows["images"].append(sample["images"])
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    shared = (finetuned, tmp_path / "rows.parquet")
    options = ("--streaming", "--learning_rate", "1e-3", "--save_steps", "2", *batch(4))
    mini.train("finetune", *shared, tmp_path / "whole", *options, "--max_steps", "4")
    for max_steps in ("2", "4"):
        mini.train("finetune", *shared, tmp_path / "parts", *options, "--max_steps", max_steps)
    assert mini.losses(tmp_path / "parts") == mini.losses(tmp_path / "whole")

    options = ("--max_steps", "2", "--learning_rate", "1e-3", *batch(4))
    for name, workers in (("none", "0"), ("two", "2")):
        mini.train("finetune", *shared, tmp_path / name, *options, "--dataloader_num_workers", workers)
    assert mini.losses(tmp_path / "two") == mini.losses(tmp_path / "none")


def run_command(command, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE}
    return subprocess.run(
        [*map(str, command), *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_two_processes_equal_one(mini, pretrained, data, tmp_path):
    """One of them with texts alone: rows in their order, two with a image for each two without."""
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    kinds = [[row for row in rows if ("image" in row) is has_image] for has_image in (True, False)]
    pairs = [row for start in (0, 2, 4) for kind in kinds for row in kind[start : start + 2]]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    shared = ("--image_folder", str(data), "--max_steps", "3", "--learning_rate", "1e-3")
    shared += ("--train_sampling_strategy", "sequential")
    mini.train("finetune", pretrained, file, tmp_path / "1", *shared, *batch(4))

    paths = ("--model_name_or_path", pretrained, "--data_path", file, "--output_dir", tmp_path / "2")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    arguments = ("--stage", "finetune", *paths, *mini.options, *shared, *batch(2))
    result = run_command((*torchrun, "-m", "training.train"), *arguments)
    assert result.returncode == 0, result.stderr
    assert mini.losses(tmp_path / "2") == pytest.approx(mini.losses(tmp_path / "1"), rel=1e-4)
    assert_close(tmp_path / "2", tmp_path / "1")


# Runs training and kills itself without a word, at the beginning of a step or while a checkpoint is half written
KILLED_TRAINING = """
import os, pathlib, signal, sys, torch
from training.train import main, make_parser
from training.trainer import LlavaHrTrainer

event, number, *arguments = sys.argv[1:]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

training_step, save = LlavaHrTrainer.training_step, torch.save

def killed_training_step(self, *args, **kwargs):
    if event == "step" and self.state.global_step == int(number):
        kill()
    return training_step(self, *args, **kwargs)

def killed_save(value, file, **kwargs):
    save(value, file, **kwargs)
    if event == "save" and str(file).endswith(f"checkpoint-{number}/optimizer.pt"):
        os.truncate(file, 1000)
        kill()

LlavaHrTrainer.training_step, torch.save = killed_training_step, killed_save
main(*make_parser().parse_args_and_config(arguments))
"""


def test_a_killed_run_goes_on_to_the_same_end(mini, pretrained, data, tmp_path):
    shared = ("--max_steps", "8", "--save_steps", "2", "--learning_rate", "1e-3", *batch(4, 2))
    mini.train("finetune", pretrained, data / "train.jsonl", tmp_path / "undisturbed", *shared)

    run = tmp_path / "killed"
    paths = ("--model_name_or_path", str(pretrained), "--data_path", str(data / "train.jsonl"))
    arguments = ("--stage", "finetune", *paths, "--output_dir", str(run), *mini.options, *shared)
    for event, number, complete in (("step", 3, [2]), ("save", 6, [2, 4])):
        result = run_command((sys.executable, "-c", KILLED_TRAINING), event, number, *arguments)
        assert result.returncode == -signal.SIGKILL, result.stderr
        checkpoints = {path.name for path in run.glob("checkpoint-*")}
        assert checkpoints == {f"checkpoint-{step}" for step in (complete if event == "step" else [*complete, number])}
        assert not (run / "model.safetensors").exists()
    # an epoch is 4 steps: it resumes in the second one
    mini.train("finetune", pretrained, data / "train.jsonl", run, *shared)
    assert mini.losses(run) == mini.losses(tmp_path / "undisturbed")
    expected = load_weights(tmp_path / "undisturbed")
    for name, tensor in load_weights(run).items():
        assert torch.equal(tensor, expected[name]), name
    assert {path.name for path in run.iterdir()} == {path.name for path in (tmp_path / "undisturbed").iterdir()}


def test_the_same_command_after_the_end_changes_nothing(mini, pretrained, data, tmp_path):
    shared = ("--max_steps", "3", "--learning_rate", "1e-3", *batch(4))
    weights = []
    for _ in range(2):
        mini.train("finetune", pretrained, data / "train.jsonl", tmp_path, *shared)
        weights.append(load_weights(tmp_path))
        assert len(mini.losses(tmp_path)) == 3
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_restart_starts_afresh(mini, pretrained, data, tmp_path):
    shared = ("--learning_rate", "1e-3", *batch(4))
    mini.train("finetune", pretrained, data / "train.jsonl", tmp_path, *shared, "--max_steps", "3")
    mini.train(
        "finetune", pretrained, data / "train.jsonl", tmp_path, *shared, "--max_steps", "2", "--restart", "true"
    )
    assert len(mini.losses(tmp_path)) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_checkpoints_of_another_run_are_not_gone_on_from(mini, miniature, pretrained, data):
    with pytest.raises(ValueError, match="has checkpoints of another run.*restart: true"):
        mini.train("finetune", miniature, data / "train.jsonl", pretrained)


def test_copies_of_checkpoints_are_left_alone(mini, pretrained, data, tmp_path):
    arguments = ("finetune", pretrained, data / "train.jsonl", tmp_path, *batch(4))
    mini.train(*arguments, "--max_steps", "1")
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-1-best")
    mini.train(*arguments, "--max_steps", "2")
    mini.train(*arguments, "--max_steps", "1", "--restart", "true")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-1-best"]


@pytest.mark.parametrize("options", [(), ("--restart", "true")])
def test_folders_that_are_not_its_own_stay(mini, pretrained, data, tmp_path, options):
    weights = tmp_path / "checkpoint-1000" / "unet.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"another program's")
    with pytest.raises(ValueError, match="has checkpoint-1000, which this command did not write"):
        mini.train("finetune", pretrained, data / "train.jsonl", tmp_path, *options)
    assert weights.read_bytes() == b"another program's"


def test_a_full_disk_names_the_path_and_keeps_what_was_there(mini, pretrained, data, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of a file."""
    shared = ("--learning_rate", "1e-3", *batch(4))
    mini.train("finetune", pretrained, data / "train.jsonl", tmp_path, *shared, "--max_steps", "2")
    before = load_weights(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written.*resumes from the newest complete"):
            mini.train("finetune", pretrained, data / "train.jsonl", tmp_path, *shared, "--max_steps", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    after = load_weights(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before)
    mini.train("finetune", pretrained, data / "train.jsonl", tmp_path, *shared, "--max_steps", "4")
    assert len(mini.losses(tmp_path)) == 4


@pytest.mark.parametrize("quantized", [False, True])
def test_lora_trains_adapters_fully_reloads_and_merges(mini, pretrained, data, tmp_path, quantized):
    options = ("--max_steps", "4", "--learning_rate", "1e-2", *batch(4), "--use_peft")
    options += ("--load_in_4bit",) if quantized else ()
    mini.train("finetune", pretrained, data / "train.jsonl", tmp_path, *options)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name for name in saved if "lora_" not in name} == {
        f"base_model.model.{name}"
        for name in load_base(tmp_path).state_dict()
        if re.search(r"mr_adapters|vision_tower\.fusion|multi_modal_projector", name)
    }
    assert all("language_model" in name for name in saved if "lora_" in name)
    assert min(tensor.abs().max() for name, tensor in saved.items() if "lora_B" in name) > 0  # it starts at zero

    base = load_base(tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = make_inputs(AutoProcessor.from_pretrained(tmp_path))
    with torch.no_grad():
        adapted = model(**inputs).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, adapted, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**inputs).logits, adapted, atol=1e-4, rtol=1e-4)
        assert (load_base(tmp_path)(**inputs).logits - adapted).abs().max() > 0.01
    if quantized:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        base = load_base(tmp_path, quantization_config=config)
        with torch.no_grad():
            logits = PeftModel.from_pretrained(base, tmp_path).eval()(**inputs).logits
        assert torch.nn.functional.cosine_similarity(logits, adapted, dim=-1).min() > 0.9


def test_a_lora_result_opens_like_any_adapter_folder(mini, pretrained, data, tmp_path):
    """Stage 2 inserted MR-Adapters that the base lacks; a second LoRA run continues, a full one starts merged."""
    options = ("--max_steps", "2", "--learning_rate", "1e-2", *batch(4))
    first, second, full = tmp_path / "first", tmp_path / "second", tmp_path / "full"
    mini.train("finetune", pretrained, data / "train.jsonl", first, *options, "--use_peft")
    processor, inputs = AutoProcessor.from_pretrained(first), make_inputs(AutoProcessor.from_pretrained(first))
    expected = PeftModel.from_pretrained(load_base(first), first).eval()
    for folder in (first, first / "checkpoint-2"):
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        assert model.config.mr_adapter_layers == [1, 2, 3]
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, atol=1e-5, rtol=1e-5)
    pipe = pipeline("image-text-to-text", model=str(first), device="cpu")
    assert pipe.processor.image_processor.to_dict() == processor.image_processor.to_dict()
    assert pipe.processor.chat_template == processor.chat_template
    question = [{"role": "user", "content": [{"type": "image", "path": str(data / "images" / "0.png")}]}]
    answer = pipe(question, max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    command = ("examples.ask", "--model", first, "--image", data / "images" / "0.png", "--max_new_tokens", "3")
    assert run_command((sys.executable, "-m"), *command).returncode == 0 and isinstance(answer, str)

    mini.train("finetune", first, data / "train.jsonl", second, *options, "--use_peft")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert {name for name in after if re.search("lora_B|multi_modal_projector|fusion", name)} <= moved
    assert PeftConfig.from_pretrained(second).base_model_name_or_path == str(first / "_base")
    assert AutoModelForImageTextToText.from_pretrained(second).config.mr_adapter_layers == [1, 2, 3]
    with pytest.raises(ValueError, match="`lora_r` is 3, but .* was trained with 16"):
        mini.train("finetune", first, data / "train.jsonl", tmp_path / "x", *options, "--use_peft", "--lora_r", "3")

    first = first.rename(tmp_path / "moved")  # together with its base
    mini.train("finetune", first, data / "train.jsonl", full, *options, "--learning_rate", "0")
    merged = AutoModelForImageTextToText.from_pretrained(full).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, expected(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_a_lora_result_names_its_base_as_it_was_given(mini, pretrained, finetuned, data, tmp_path, monkeypatch):
    """`_base` for one without MR-Adapters, the starting point itself for one that has all."""
    monkeypatch.chdir(tmp_path)
    for name, start, base in (("a", pretrained, "a/_base"), ("b", finetuned, "finetuned")):
        (tmp_path / start.name).symlink_to(start)
        options = ("--max_steps", "1", "--use_peft", *batch(4))
        mini.train("finetune", Path(start.name), data / "train.jsonl", Path(name), *options)
        assert PeftConfig.from_pretrained(name).base_model_name_or_path == base
        AutoModelForImageTextToText.from_pretrained(name)


def load_base(folder, **kwargs):
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    return AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32, **kwargs).eval()


def make_inputs(processor):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 60, 60), generator=generator, dtype=torch.uint8)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Which color?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("form", [*ROWS, *FILES])
def test_every_form_trains(mini, tmp_path, form):
    """Two steps of the tiny model, and the loss does not depend on the form."""
    options = ("--max_steps", "2", "--image_folder", str(tmp_path), "--learning_rate", "1e-3", *batch(2))
    options += ("--train_sampling_strategy", "sequential", "--size", "256", "--low_res_size", "112")
    losses = []
    for name in ("llava", form):
        mini.train("finetune", TINY, write_rows(name, tmp_path), tmp_path / f"{name} output", *options)
        losses.append(mini.losses(tmp_path / f"{name} output"))
        shutil.rmtree(tmp_path / "llava output", ignore_errors=True)
    assert len(losses[1]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_padding_and_maximum_length_are_kept(mini, finetuned, data, tmp_path, monkeypatch):
    shapes = []
    call = LlavaHrDataCollator.torch_call

    def torch_call(self, examples):
        batch = call(self, examples)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(LlavaHrDataCollator, "torch_call", torch_call)
    options = ("--max_steps", "4", "--pad_to_multiple_of", "64", *batch(4))
    mini.train("finetune", finetuned, data / "train.jsonl", tmp_path / "output", *options)
    assert all(length % 64 == 0 for _, length in shapes) and shapes
    with pytest.raises(ValueError, match="(?s)24 of 32 rows .* tokens, more than 70"):
        mini.train("finetune", finetuned, data / "train.jsonl", tmp_path / "short", *options, "--max_length", "70")


@pytest.mark.parametrize("name", sorted(itertools.chain(*UNSUPPORTED.values())))
def test_fields_without_effect_are_refused_by_name(mini, finetuned, data, tmp_path, name):
    other = {"packing_strategy": "wrapped", "dataset_text_field": "chat", "length_column_name": "size"}
    other |= {"truncation_mode": "keep_end", "dataset_num_proc": "2", "pad_token": "</s>"}
    other |= {"dataset_kwargs": '{"a": 1}', "model_init_kwargs": '{"a": 1}', "include_for_metrics": "loss"}
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=f"`{name}` must stay "):
        mini.train("finetune", finetuned, data / "train.jsonl", tmp_path, f"--{name}", other.get(name, "true"))


def test_evaluation_data_of_a_config_can_be_unset(mini, finetuned, data, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"eval_data_path: {tmp_path / 'nowhere.jsonl'}")
    options = ("--config", str(config), "--max_steps", "1", *batch(4))
    mini.train("finetune", finetuned, data / "train.jsonl", tmp_path / "unused", *options)
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        mini.train("finetune", finetuned, data / "train.jsonl", tmp_path / "x", *options, "--eval_strategy", "steps")
    unset = ("--eval_data_path", "none", "--eval_strategy", "steps")
    with pytest.raises(ValueError, match="`eval_strategy` is steps, but `eval_data_path` is missing"):
        mini.train("finetune", finetuned, data / "train.jsonl", tmp_path / "y", *options, *unset)


def test_splits_and_configurations_are_chosen(data):
    words = ["--stage", "finetune", "--data_path", "D", "--output_dir", "x", "--use_cpu", "true"]
    words += ["--dataset_config", "a", "--dataset_revision", "main", "--dataset_train_split", "small"]
    for more, expected in (
        (["--eval_data_path", "D"], ("D", "a", "test", "main")),
        (["--eval_data_path", "D", "--eval_dataset_config", "b"], ("D", "b", "test", "main")),
        (["--eval_data_path", "E", "--dataset_test_split", "dev"], ("E", None, "dev", None)),
    ):
        options, *_ = make_parser().parse_args_and_config([*words, *more])
        train = options.get_data_config(STAGES["finetune"], Path("x"))
        assert (train.data_path, train.name, train.split, train.revision) == ("D", "a", "small", "main")
        config = options.get_data_config(STAGES["finetune"], Path("x"), is_eval=True)
        assert (config.data_path, config.name, config.split, config.revision) == expected


def test_checkpoints_of_the_model_alone_are_not_overwritten(mini, finetuned, data, tmp_path):
    arguments = ("finetune", finetuned, data / "train.jsonl", tmp_path, *batch(4), "--save_only_model", "true")
    mini.train(*arguments, "--max_steps", "1")
    with pytest.raises(ValueError, match="checkpoint-1, saved with `save_only_model`.*restart: true"):
        mini.train(*arguments, "--max_steps", "2")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    mini.train(*arguments, "--max_steps", "2", "--restart", "true")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_each_part_has_its_learning_rate(mini, finetuned, data, tmp_path):
    options = ("--max_steps", "2", "--save_steps", "1", "--learning_rate", "1e-3", "--weight_decay", "0.1", *batch(4))
    parts = ("--tower_learning_rate", "0", "--adapter_learning_rate", "1e-4", "--projector_learning_rate", "2e-3")
    mini.train("finetune", finetuned, data / "train.jsonl", tmp_path, *options, *parts)
    before, after = load_weights(finetuned), load_weights(tmp_path)
    stayed = {name for name in after if torch.equal(after[name], before[name])}
    towers = {name for name in after if re.search(r"vision_tower\.(?!fusion|mr_adapters)", name)}
    assert towers <= stayed and all(".gate." in name for name in stayed - towers)  # tanh may be saturated
    state = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=False)
    groups = [(group["lr"], group["weight_decay"], len(group["params"])) for group in state["param_groups"]]
    assert {rate for rate, _, _ in groups} == {0, 1e-4, 2e-3, 1e-3} and sum(n for *_, n in groups) == len(before)
    mini.train("finetune", finetuned, data / "train.jsonl", tmp_path, *options, *parts, "--max_steps", "3")
    assert len(mini.losses(tmp_path)) == 3


def test_answers_are_logged_at_each_evaluation(mini, finetuned, data, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ("--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--report_to", "tensorboard")
    options += ("--eval_data_path", str(data / "train.jsonl"), *batch(4))
    mini.train("finetune", finetuned, data / "train.jsonl", tmp_path, *options)
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
