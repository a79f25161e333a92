# SPDX-License-Identifier: Apache-2.0
"""The converter against recorded checkpoints and outputs of the released code (tests/fixtures/reference/README.md)."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sentencepiece
import timm
import torch
from converted_checkpoints import FORMS, REFERENCE, STAGES, assert_nothing_written, read_original
from PIL import Image
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


ROOT = Path(__file__).parents[2]


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


def make_messages(turns) -> list[dict]:
    """Chat turns of cases.json -> messages; the recorded prompts have their tags at the front, a line each."""
    messages = []
    for question, answer in turns:
        text = question.replace("<image>\n", "")
        images = [{"type": "image"}] * question.count("<image>")
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": text}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def expand(ids: list[int], num_image_tokens: int, image_value: int) -> list[int]:
    """The recorded ids or labels with the one placeholder -200 (or its label) written out."""
    return [value for i in ids for value in ([image_value] * num_image_tokens if i == -200 else [i])]


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_outputs(stage, converted, tmp_path):
    # Tolerance 1e-4, and exact ids: what the README of the recordings expects of a float32 implementation
    model, processor = load_twice(converted[stage], tmp_path)
    cases = json.loads((REFERENCE / stage / "cases.json").read_text())
    expected = load_file(REFERENCE / stage / "expected.safetensors")
    image_token_id = model.config.image_token_id
    num_image_tokens = {"stage1-384": 576, "stage2-1024": 1024}[stage]  # design: (L / 14)^2

    for case in cases["cases"]:
        if "turns" not in case:
            continue  # stage 1's own prompt form: tested with the processor
        name = case["name"]
        images = [Image.open(REFERENCE / stage / "images" / file) for file in case["images"]]
        is_complete = case["turns"][-1][1] is not None
        prompt = processor.apply_chat_template(make_messages(case["turns"]), add_generation_prompt=not is_complete)
        inputs = processor(text=prompt, images=images or None, return_tensors="pt", add_special_tokens=False)
        ids = expand(case["input_ids_before_expansion"], num_image_tokens, image_token_id)
        assert inputs.input_ids[0].tolist() == ids
        assert len(ids) == case["sequence_length"]

        with torch.no_grad():
            outputs = model(**inputs, output_hidden_states=False)
        logits = outputs.logits[0, :, :1000]  # the recorded model has no image token
        torch.testing.assert_close(logits[-1], expected[f"{name}.logits_last"], atol=1e-4, rtol=1e-4)
        step = case["logits_step"]
        torch.testing.assert_close(logits[::step], expected[f"{name}.logits_every_{step}"], atol=1e-4, rtol=1e-4)
        if images:
            pixel_values = inputs["pixel_values"]
            with torch.no_grad():
                features = model.get_image_features(pixel_values, return_dict=True)
            projected = features.pooler_output[:, ::7]
            torch.testing.assert_close(projected, expected[f"{name}.projected"], atol=1e-4, rtol=1e-4)
        if name == "case0":
            high_res = features.high_res_features
            torch.testing.assert_close(high_res, expected["case0.high_res_features"], atol=1e-4, rtol=1e-4)
            fused = features.last_hidden_state[:, ::7]
            torch.testing.assert_close(fused, expected["case0.vision_features"], atol=1e-4, rtol=1e-4)
            tower = model.model.vision_tower
            with torch.no_grad():
                embeddings = tower.pre_layernorm(
                    tower.embeddings(make_low_res_view(pixel_values, tower.get_low_res_size(pixel_values)))
                )[:, ::7]
            torch.testing.assert_close(embeddings, expected["case0.low_res_embeddings"], atol=1e-4, rtol=1e-4)
        if is_complete:
            labels = expand_labels(case, num_image_tokens)
            with torch.no_grad():
                loss = model(**inputs, labels=torch.tensor([labels])).loss
            assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
        else:
            new = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
            assert new[0, len(ids) :].tolist() == case["greedy_ids"]


@pytest.mark.parametrize("stage", STAGES)
def test_recorded_greedy_tokens_with_the_torchvision_backend(stage, converted):
    """Its pixels differ from the recorded ones by up to 2/255, the recorded tokens' margins allow for that."""
    model = AutoModelForImageTextToText.from_pretrained(converted[stage], dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(converted[stage])
    assert processor.image_processor.backend == "torchvision"
    for case in json.loads((REFERENCE / stage / "cases.json").read_text())["cases"]:
        if "greedy_ids" not in case:
            continue
        images = [Image.open(REFERENCE / stage / "images" / file) for file in case["images"]]
        prompt = processor.apply_chat_template(make_messages(case["turns"]), add_generation_prompt=True)
        inputs = processor(text=prompt, images=images, return_tensors="pt", add_special_tokens=False)
        new = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert new[0, inputs["input_ids"].shape[1] :].tolist() == case["greedy_ids"]


def expand_labels(case: dict, num_image_tokens: int) -> list[int]:
    """Recorded labels written out: nothing is learned at an image."""
    labels = []
    for i, label in zip(case["input_ids_before_expansion"], case["labels_before_expansion"], strict=True):
        labels += [-100] * num_image_tokens if i == -200 else [label]
    return labels


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
    total = sum(t.double().sum() for n, t in original.items() if "embed_tokens" not in n and "lm_head" not in n)
    cut = sum(
        t.double().sum()
        for n, t in original.items()
        if "inv_freq" in n or ".head." in n or "class_embedding" in n or "post_layernorm" in n
    )
    cut += (
        original[
            "model.vision_tower.fast_vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"
        ][0]
        .double()
        .sum()
    )
    kept = sum(t.double().sum() for n, t in result.items() if "embed_tokens" not in n and "lm_head" not in n)
    assert kept.item() == pytest.approx((total - cut).item(), rel=1e-9)


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
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
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
    folder = tmp_path / "base"
    shutil.copytree(converted["stage1-384"], folder)
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
    torch.save(
        {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "mm_projector.bin"
    )
    shutil.copy(source / "config.json", folder)
    convert(str(folder / "mm_projector.bin" if as_file else folder), str(tmp_path / "out"), base=str(base))
    actual, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", converted["stage1-384"]))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for name in ("generation_config.json", "tokenizer.json", "config.json", "processor_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
            (converted["stage1-384"] / name).read_text()
        )


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

_EMBED = "model.embed_tokens.weight"
_LAYER = "model.vision_tower.fast_vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc2.bias"
_GATE = "model.vision_tower.align_stages_latent.1.gate.0.weight"


def _without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def _with(**changes):
    return lambda tensors: tensors.update({name.replace("__", "."): tensor for name, tensor in changes.items()})


def _drop_adapter(tensors):
    for name in [name for name in tensors if "align_stages_latent.2." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    "change, messages",
    [
        (
            _without(_EMBED, _LAYER),
            ["model.language_model.embed_tokens.weight: missing", "layers.3.mlp.fc2.bias: missing"],
        ),
        (_without("lm_head.weight"), ["lm_head.weight: missing"]),
        (_drop_adapter, ["12 faults", "mr_adapters.2.gate.fc1.weight: missing"]),
        (_with(model__extra=torch.zeros(2), other=torch.zeros(1)), ["model.extra: unexpected", "other: unexpected"]),
        (_with(lm_head__weight=torch.zeros(999, 64)), ["lm_head.weight: shape [999, 64], expected [1000, 64]"]),
        (_with(**{_GATE: torch.zeros(64, 255)}), [f"{_GATE}: shape [64, 255], expected [64, 256]"]),
        (_with(**{_GATE: torch.zeros(64, 256, dtype=torch.int8)}), [f"{_GATE}: dtype torch.int8"]),
        (_with(mm_projector__0__bias=torch.zeros(64)), ["mm_projector.0.bias: comes twice"]),
        (
            _with(
                model__vision_tower__align_stages_latent__0__slow_proj__weight=torch.zeros(128, 96, 3, 3),
                model__vision_tower__align_stages_latent__0__slow_conv__weight=torch.zeros(96 * 96),
            ),
            ["slow_proj.weight: shape [128, 96, 3, 3]", "slow_conv.weight: shape [9216]"],
        ),
        (
            _without(
                "model.vision_tower.fast_vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"
            ),
            ["sizes of the ViT", "embeddings.patch_embedding.weight"],
        ),
    ],
)
def test_tensors_that_do_not_fit(change, messages, write_original, tmp_path):
    tensors = read_original("stage2-1024")
    change(tensors)
    folder = write_original(tensors=tensors)
    with pytest.raises(ValueError) as error:
        convert(str(folder), str(tmp_path / "out"))
    for message in messages:
        assert message in str(error.value)
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


def run_command(*arguments, code: str = "", **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own, or `code`."""
    what = ["-c", textwrap.dedent(code)] if code else ["-m", "conversion.convert_llava_hr_weights_to_hf"]
    return subprocess.run(
        [sys.executable, *what, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command(tmp_path):
    arguments = ["--checkpoint", REFERENCE / "stage1-384" / "checkpoint", "--output", tmp_path / "out"]
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    assert "M parameters, torch.bfloat16" in result.stdout
    assert "Converting weights: 100%" in result.stderr
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.model_type == "llava_hr"

    again = run_command(*arguments)  # an existing result is never overwritten
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith(f"error: --output: {tmp_path / 'out'} exists")
    assert "Traceback" not in again.stderr


@pytest.fixture
def online(hub, write_original, tmp_path) -> dict[str, str]:
    """The repository someone/llava-hr holds the recorded stage-1 checkpoint in shards; returns the environment."""
    folder = write_original("stage1-384", "bin_shards")
    hub.commits["someone/llava-hr"] = {"0" * 40: {path.name: path.read_bytes() for path in folder.iterdir()}}
    home = str(tmp_path / "home")
    return {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": home}


def test_command_with_a_repository(online, converted, tmp_path):
    arguments = ("--checkpoint", "someone/llava-hr", "--output", tmp_path / "out")
    result = run_command(*arguments, **online)
    assert result.returncode == 0, result.stderr
    actual, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", converted["stage1-384"]))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_command_with_an_unknown_repository(online, tmp_path):
    arguments = ("--checkpoint", "nobody/nothing", "--output", tmp_path / "out")
    result = run_command(*arguments, **online)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: --checkpoint: 'nobody/nothing' is not a folder or file here")
    assert "does not exist, is private" in message
    assert "Traceback" not in result.stderr
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
def test_terminated_and_interrupted_runs_clean_up(write_original, tmp_path, name, status):
    result = run_command(write_original("stage1-384"), tmp_path / "out", name, code=TERMINATED)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.incomplete").exists()


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
def test_memory_is_a_shard_of_the_checkpoint_and_one_of_the_result(form, write_original, tmp_path):
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
    result = run_command(small, large, code=PEAK)
    assert result.returncode == 0, result.stderr
    model = sum(file.stat().st_size for file in Path(f"{large}-out").glob("*.safetensors"))
    start, peak = (int(line.split()[1]) * 1024 for line in result.stdout.splitlines() if line.startswith("peak"))
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
