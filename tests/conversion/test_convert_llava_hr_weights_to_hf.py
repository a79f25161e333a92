# SPDX-License-Identifier: Apache-2.0
"""The converter against recorded checkpoints and outputs of the released code (tests/fixtures/reference/README.md)."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import timm
import torch
from chats import tokenize
from converted_checkpoints import (
    FORMS,
    NUM_IMAGE_TOKENS,
    REFERENCE,
    STAGES,
    assert_nothing_written,
    read_cases,
    read_original,
)
from forked_commands import CONVERT, assert_one_message
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from conversion.convert_llava_hr_weights_to_hf import convert
from conversion.parts import infer_timm_config
from modeling_llava_hr import LlavaHrConfig
from modeling_llava_hr.image_processing_llava_hr import make_low_res_view
from modeling_llava_hr.utils import new_file


# --- what the released code computes ---


def load_twice(folder: Path, tmp_path: Path):
    """Model and processor after two more rounds of saving and loading, float32, images prepared by PIL."""
    for index in range(2):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        processor = AutoProcessor.from_pretrained(folder)
        folder = tmp_path / f"round{index}"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return model, processor


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_outputs(stage, converted, tmp_path):
    # Tolerance 1e-4, and exact tokens: what the README of the recordings expects of a float32 implementation
    model, processor = load_twice(converted[stage], tmp_path)
    expected = load_file(REFERENCE / stage / "expected.safetensors")

    def assert_recorded(actual, name):
        torch.testing.assert_close(actual, expected[name], atol=1e-4, rtol=1e-4)

    for case in read_cases(stage):
        if "turns" not in case:
            continue  # stage 1's own prompt form: tested with the processor
        name, step = case["name"], case["logits_step"]
        inputs = tokenize(processor, case["messages"], add_generation_prompt="greedy_ids" in case)
        with torch.no_grad():
            outputs = model(**inputs)
        logits = outputs.logits[0, :, :1000]  # the recorded model has no image token
        assert_recorded(logits[-1], f"{name}.logits_last")
        assert_recorded(logits[::step], f"{name}.logits_every_{step}")
        if case["images"]:
            assert_recorded(outputs.image_outputs.pooler_output[:, ::7], f"{name}.projected")
        if name == "case0":
            assert_recorded(outputs.image_outputs.high_res_features, "case0.high_res_features")
            assert_recorded(outputs.image_outputs.last_hidden_state[:, ::7], "case0.vision_features")
            tower, pixel_values = model.model.vision_tower, inputs["pixel_values"]
            view = make_low_res_view(pixel_values, tower.get_low_res_size(pixel_values))
            with torch.no_grad():
                assert_recorded(tower.pre_layernorm(tower.embeddings(view))[:, ::7], "case0.low_res_embeddings")
        if "greedy_ids" in case:
            assert generate(model, inputs) == case["greedy_ids"]
        else:
            labels = []
            for i, label in zip(case["input_ids_before_expansion"], case["labels_before_expansion"], strict=True):
                labels += [-100] * NUM_IMAGE_TOKENS[stage] if i == -200 else [label]
            with torch.no_grad():
                loss = model(**inputs, labels=torch.tensor([labels])).loss
            assert loss.item() == pytest.approx(case["loss"], abs=1e-4)


def generate(model, inputs) -> list[int]:
    """Twelve greedy tokens, as many as were recorded."""
    tokens = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_greedy_tokens_with_the_torchvision_backend(stage, converted):
    """Its pixels differ from the recorded ones by up to 2/255, the recorded tokens' margins allow for that."""
    model = AutoModelForImageTextToText.from_pretrained(converted[stage], dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(converted[stage])
    assert processor.image_processor.backend == "torchvision"
    for case in read_cases(stage):
        if "greedy_ids" in case:
            assert generate(model, tokenize(processor, case["messages"])) == case["greedy_ids"]


# --- weights ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", STAGES)
def test_all_forms_give_the_same_weights(form, stage, write_original, converted, tmp_path):
    convert(str(write_original(stage, form)), str(tmp_path / "out"))
    expected = load_file(converted[stage] / "model.safetensors")
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_every_weight_is_used_or_dropped_for_a_reason(converted, capsys, tmp_path):
    original = read_original("stage2-1024")
    convert(str(REFERENCE / "stage2-1024" / "checkpoint"), str(tmp_path / "out"))
    result = load_file(tmp_path / "out" / "model.safetensors")
    # counted by hand from the list of names: 2 inv_freq, 6 of the ConvNeXt's head, class embedding, post-layernorm
    assert len(original) - len(result) == 2 + 6 + 1 + 2
    text = capsys.readouterr().out
    for line in ("dropped 2 tensors: computed", "dropped 6 tensors", "dropped 1 tensors"):
        assert line in text
    # nothing but the extended embeddings, the 1x1 convolutions and the position table's class row changes
    table = "model.vision_tower.fast_vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
    original[table] = original[table][1:]
    dropped = re.compile(r"inv_freq|\.head\.|class_embedding|post_layernorm")
    kept = {name: tensor for name, tensor in original.items() if not dropped.search(name)}
    sums = [
        sum(tensor.double().sum() for name, tensor in tensors.items() if not re.search("embed_tokens|lm_head", name))
        for tensors in (kept, result)
    ]
    assert sums[0].item() == pytest.approx(sums[1].item(), rel=1e-9)


def test_added_vocabulary(converted):
    folder = converted["stage2-1024"]
    original, result = read_original("stage2-1024"), load_file(folder / "model.safetensors")
    config = LlavaHrConfig.from_pretrained(folder)
    assert config.image_token_id == 1000  # behind the 1000 tokens of the recorded vocabulary
    assert config.text_config.vocab_size == 1024  # the next multiple of 64
    for old, new in (("model.embed_tokens", "model.language_model.embed_tokens"), ("lm_head", "lm_head")):
        weight = original[f"{old}.weight"]
        assert torch.equal(result[f"{new}.weight"][:1000], weight)
        mean = weight.double().mean(0).expand(24, -1)
        # half a unit in bfloat16's last place
        torch.testing.assert_close(result[f"{new}.weight"][1000:].double(), mean, rtol=2**-8, atol=1e-6)
    assert GenerationConfig.from_pretrained(folder).suppress_tokens == list(range(1000, 1024))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype(dtype, write_original, tmp_path):
    convert(str(write_original("stage1-384")), str(tmp_path / "out"), dtype=dtype)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    assert LlavaHrConfig.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


# --- configuration ---


def test_sizes_come_from_the_tensors(converted):
    shapes = json.loads((REFERENCE / "stage2-1024" / "cases.json").read_text())["tower_shapes"]
    config = LlavaHrConfig.from_pretrained(converted["stage2-1024"])
    for name, value in shapes["vit"].items():
        assert getattr(config.vision_config, name) == value
    assert config.vision_config.num_attention_heads == 2  # width 128, head size 64
    assert config.vision_config.hidden_act == "quick_gelu"
    assert config.high_res_vision_config.model_args == shapes["convnext"]
    assert config.mr_adapter_layers == [2, 4, 6]  # 8 layers in four groups
    assert LlavaHrConfig.from_pretrained(converted["stage1-384"]).mr_adapter_layers == []


def test_x_variant_keeps_its_epsilon(write_original, tmp_path):
    folder = write_original(vision_tower_slow="convnext_xxlarge.clip_laion2b_soup")
    convert(str(folder), str(tmp_path / "out"))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    tower = model.model.vision_tower.high_res_tower.timm_model
    # timm defines convnext_xxlarge with 1e-5, all others with 1e-6
    assert {m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("architecture", ["convnext_large_mlp", "convnext_xxlarge"])
def test_published_towers_need_no_model_args(architecture):
    with torch.device("meta"):
        tower = timm.create_model(architecture)
    config = infer_timm_config(architecture, {name: tensor.shape for name, tensor in tower.state_dict().items()})
    assert config.architecture == architecture and config.model_args is None


def test_gate_per_channel(write_original, tmp_path):
    tensors = read_original("stage2-1024")
    for name in [name for name in tensors if ".gate.2." in name]:
        tensors[name] = tensors[name].repeat_interleave(128, dim=0)
    convert(str(write_original(tensors=tensors)), str(tmp_path / "out"))
    assert LlavaHrConfig.from_pretrained(tmp_path / "out").mr_adapter_gate == "channel"


@pytest.mark.parametrize(
    "high_res, low_res, original_ratio, ratio",  # the table of sizes in the paper's released code
    [(768, 336, "pad", "pad"), (1024, 448, None, "crop"), (1536, 672, "anyres", "crop")],
)
def test_image_processor(high_res, low_res, original_ratio, ratio, write_original, tmp_path):
    folder = write_original(input_image_size=high_res, image_aspect_ratio=original_ratio)
    convert(str(folder), str(tmp_path / "out"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"height": high_res, "width": high_res}
    assert processor.low_res_size is None and processor.get_low_res_size() == low_res
    assert processor.image_aspect_ratio == ratio


# --- tokenizer ---


@pytest.mark.parametrize("legacy", [False, True, None])
def test_tokenizer(legacy, write_original, tmp_path):
    folder = write_original(legacy=legacy)
    convert(str(folder), str(tmp_path / "out0"))
    for index in range(2):
        AutoTokenizer.from_pretrained(tmp_path / f"out{index}").save_pretrained(tmp_path / f"out{index + 1}")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out2")
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.padding_side) == ("<unk>", 0, "left")
    assert tokenizer.model_max_length == 2496  # of the recorded tokenizer_config.json

    # sentencepiece itself: the pieces between special tokens, each with a mark of the start of a text. Without
    # `legacy` (a missing value meant true) only the first piece has it: encode behind a known word and cut that off.
    model = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    parts = ["A chat. USER: Hi 4711", "USER: what?\n Ünïcode 字 ", "end  of it"]
    guard = model.encode("<unk>")
    later = [model.encode("<unk>" + part)[len(guard) :] if legacy is False else model.encode(part) for part in parts]
    expected = [1, *model.encode(parts[0]), 2, *later[1], 2, *later[2]]
    assert tokenizer("</s>".join(parts)).input_ids == expected


# --- stage 1 alone ---


@pytest.fixture
def base(converted, tmp_path) -> Path:
    """The recorded stage-1 model as it was before training: projector and fusion zeroed."""
    folder = shutil.copytree(converted["stage1-384"], tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "multi_modal_projector" in name or "vision_tower.fusion" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("as_file", [True, False])
def test_stage_1_projector(prefix, as_file, base, converted, tmp_path):
    folder = tmp_path / "projector"
    folder.mkdir()
    source = REFERENCE / "stage1-384" / "checkpoint"
    tensors = torch.load(source / "mm_projector.bin", weights_only=True)
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    torch.save(tensors, folder / "mm_projector.bin")
    shutil.copy(source / "config.json", folder)
    convert(str(folder / "mm_projector.bin" if as_file else folder), str(tmp_path / "out"), base=str(base))
    actual, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", converted["stage1-384"]))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for name in ("generation_config.json", "tokenizer.json", "config.json", "processor_config.json"):
        assert (tmp_path / "out" / name).read_text() == (converted["stage1-384"] / name).read_text()


def test_stage_1_projector_needs_its_base(base, converted, write_original, tmp_path):
    projector, output = str(REFERENCE / "stage1-384" / "checkpoint" / "mm_projector.bin"), tmp_path / "out"
    with pytest.raises(ValueError, match="--base"):
        convert(projector, str(output))
    with pytest.raises(ValueError, match=r"--base is for LoRA and mm_projector\.bin"):
        convert(str(REFERENCE / "stage1-384" / "checkpoint"), str(output), base=str(base))
    with pytest.raises(ValueError, match="is not in this package's format"):
        convert(projector, str(output), base=str(write_original("stage1-384")))
    with pytest.raises(ValueError, match=r"slow_proj\.weight: shape \[128, 48\], expected \[128, 96\]"):
        convert(projector, str(output), base=str(converted["stage2-1024"]))
    assert_nothing_written(output)


# --- faults ---

VIT = "model.vision_tower.fast_vision_tower.vision_tower.vision_model"
ADAPTERS = "model.vision_tower.align_stages_latent"
GATE = f"{ADAPTERS}.1.gate.0.weight"


@pytest.mark.parametrize(
    "changes, messages",  # tensors by name, `None` for one that is missing
    [
        ({"lm_head.weight": None}, ["lm_head.weight: missing"]),
        (
            {"model.embed_tokens.weight": None, f"{VIT}.encoder.layers.3.mlp.fc2.bias": None},
            ["2 faults", "model.language_model.embed_tokens.weight: missing", "layers.3.mlp.fc2.bias: missing"],
        ),
        (
            {"model.extra": torch.zeros(2), "other": torch.zeros(1)},
            ["model.extra: unexpected", "other: unexpected"],
        ),
        ({"lm_head.weight": torch.zeros(999, 64)}, ["lm_head.weight: shape [999, 64], expected [1000, 64]"]),
        ({GATE: torch.zeros(64, 255)}, [f"{GATE}: shape [64, 255], expected [64, 256]"]),
        ({GATE: torch.zeros(64, 256, dtype=torch.int8)}, [f"{GATE}: dtype torch.int8"]),
        ({"mm_projector.0.bias": torch.zeros(64)}, ["mm_projector.0.bias: comes twice"]),
        (
            {
                f"{ADAPTERS}.0.slow_proj.weight": torch.zeros(128, 96, 3, 3),
                f"{ADAPTERS}.0.slow_conv.weight": torch.zeros(96 * 96),
            },
            ["slow_proj.weight: shape [128, 96, 3, 3]", "slow_conv.weight: shape [9216]"],
        ),
        (
            {f"{VIT}.embeddings.patch_embedding.weight": None},
            ["sizes of the ViT", "embeddings.patch_embedding.weight"],
        ),
        (
            {name: None for name in read_original("stage2-1024") if f"{ADAPTERS}.2." in name},
            ["12 faults", "mr_adapters.2.gate.fc1.weight: missing"],
        ),
    ],
)
def test_tensors_that_do_not_fit(changes, messages, write_original, tmp_path):
    tensors = {name: tensor for name, tensor in (read_original("stage2-1024") | changes).items() if tensor is not None}
    with pytest.raises(ValueError) as error:
        convert(str(write_original(tensors=tensors)), str(tmp_path / "out"))
    assert all(message in str(error.value) for message in messages), str(error.value)
    assert_nothing_written(tmp_path / "out")


def test_shards_that_repeat_a_tensor(write_original, tmp_path):
    folder = write_original(form="bin_shards")
    shards = sorted(folder.glob("*.bin"))
    first, second = (torch.load(shard, weights_only=True) for shard in shards[:2])
    name = next(iter(first))
    torch.save(second | {name: first[name]}, shards[1])
    with pytest.raises(ValueError, match=f"{name}: comes twice"):
        convert(str(folder), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"vision_tower_slow": None}, "lacks vision_tower_slow"),
        ({"hidden_size": None, "input_image_size": None}, "lacks hidden_size, input_image_size"),
        ({"vision_tower_slow": "convnext_gigantic.x"}, "does not know the architecture 'convnext_gigantic'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end = True"),
        ({"input_image_size": 1000}, "1000"),
        ({"hidden_size": "wide"}, "lacks hidden_size, or the values are not numbers"),
        ({"hidden_act": 3}, "config.json: "),
        ({"freeze_vision": True}, "align_stages_latent.0.slow_conv.weight: unexpected"),
    ],
)
def test_config_that_does_not_fit(config, message, write_original, tmp_path):
    with pytest.raises(ValueError) as error:
        convert(str(write_original(**config)), str(tmp_path / "out"))
    assert message in str(error.value)
    assert_nothing_written(tmp_path / "out")


# --- the command ---


def test_command(commands, tmp_path):
    arguments = ("--checkpoint", REFERENCE / "stage1-384" / "checkpoint", "--output", tmp_path / "out")
    ended = commands.run(CONVERT, *arguments)
    assert ended.status == 0, ended.output
    assert "M parameters, torch.bfloat16" in ended.output and "Converting weights: 100%" in ended.output
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.model_type == "llava_hr"
    # an existing result is never overwritten
    assert_one_message(commands.run(CONVERT, *arguments), f"error: --output: {tmp_path / 'out'} exists")


def test_an_unknown_repository_is_named(commands, tmp_path):
    ended = commands.run(CONVERT, "--checkpoint", "nobody/nothing", "--output", tmp_path / "out")
    sentence = "error: --checkpoint: 'nobody/nothing' is not a folder or file here"
    assert_one_message(ended, sentence, "does not exist, is private")
    assert_nothing_written(tmp_path / "out")


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="only Linux has a mount point in a known place")
def test_a_mount_point_is_refused_before_anything_is_read(tmp_path):
    """A whole folder cannot be put in its place by one renaming."""
    with pytest.raises(ValueError, match="--output: /proc is a mount point"):
        convert(str(tmp_path / "nothing"), "/proc")


TERMINATED = """
import os, signal, sys
from conversion.convert_llava_hr_weights_to_hf import convert
from modeling_llava_hr.utils import run_command

checkpoint, output, name = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".out.incomplete/config.json"):
        os.kill(os.getpid(), getattr(signal, name))

sys.addaudithook(hook)
run_command(convert, checkpoint, output)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGTERM, which only POSIX systems have")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_terminated_and_interrupted_runs_clean_up(commands, write_original, tmp_path, name, status):
    ended = commands.run(None, write_original("stage1-384"), tmp_path / "out", name, code=TERMINATED)
    assert ended.status == status, ended.output
    assert "Traceback" not in ended.output
    assert_nothing_written(tmp_path / "out")


def test_output_that_is_there_already(write_original, tmp_path):
    folder, output = write_original("stage1-384"), tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("kept")
    with pytest.raises(ValueError, match=f"{output} exists"):
        convert(str(folder), str(output))
    assert (output / "precious").read_text() == "kept"
    (output / "precious").unlink()
    convert(str(folder), str(output))  # an empty folder is as good as none
    assert (output / "config.json").is_file()


PEAK = """
import sys
from pathlib import Path
from conversion.convert_llava_hr_weights_to_hf import convert
for checkpoint in sys.argv[1:]:
    convert(checkpoint, checkpoint + "-out", dtype="float32", max_shard_size="50MB")
    print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's account of memory")
@pytest.mark.parametrize("form", ["bin_shards", "safetensors_shards"])
def test_memory_is_a_shard_of_the_checkpoint_and_one_of_the_result(form, commands, write_original, tmp_path):
    # The language model is made so large that it is nearly everything: 8 layers of 12.6 million parameters
    tensors = read_original("stage1-384")
    layer = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.")}
    sizes = {64: 1024, 128: 2816}
    for name, tensor in list(tensors.items()):
        if "vision_tower" not in name and "inv_freq" not in name:
            width = 128 if "mm_projector.0.weight" in name else None  # the ViT's, not the MLP's
            shape = [size if size == width else sizes.get(size, size) for size in tensor.shape]
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            if name in layer:
                tensors |= {name.replace(".0.", f".{n}.", 1): tensors[name].clone() for n in range(8)}
    small = write_original("stage1-384", form).rename(tmp_path / "small")
    large = write_original("stage1-384", form, tensors, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8)
    shard = max(file.stat().st_size for file in large.iterdir())
    ended = commands.run(None, small, large, code=PEAK)
    assert ended.status == 0, ended.output
    model = sum(file.stat().st_size for file in Path(f"{large}-out").glob("*.safetensors"))
    start, peak = (int(line.split()[1]) * 1024 for line in ended.output.splitlines() if line.startswith("peak"))
    assert model > 400e6 and 3 * shard > 200e6
    # 24 MB: allocator and bookkeeping
    assert peak - start < shard + 50e6 + 24e6 < model / 2


def test_shards_are_the_model(write_original, converted, tmp_path):
    folder = write_original("stage2-1024", "bin_shards")
    convert(str(folder), str(tmp_path / "out"), max_shard_size="1MB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(shards) > 3 and set(index["weight_map"].values()) == set(shards)
    expected = load_file(converted["stage2-1024"] / "model.safetensors")
    assert index["weight_map"].keys() == expected.keys()
    assert all(torch.equal(shards[shard][name], expected[name]) for name, shard in index["weight_map"].items())
    sizes = [tensor.numel() * tensor.element_size() for tensor in expected.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    largest = max(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert largest < max(1e6, *sizes) + 20_000  # headers
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(os.name != "posix", reason="only POSIX systems have a umask")
def test_files_follow_the_umask(write_original, tmp_path):
    before = os.umask(0o027)
    try:
        convert(str(write_original("stage1-384")), str(tmp_path / "out"))
        with new_file(tmp_path / "out" / "other.safetensors") as file:
            save_file({"weight": torch.ones(1)}, file)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}
