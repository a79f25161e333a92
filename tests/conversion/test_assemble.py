# SPDX-License-Identifier: Apache-2.0
"""`conversion.assemble` with small real parts: transformers' CLIP and SigLIP, open_clip, timm, Llama, Qwen2."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import sentencepiece
import timm
import torch
import transformers
from chats import chat, tokenize
from converted_checkpoints import REFERENCE, assert_nothing_written
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from small_training import OPTIONS, make_data
from tiny_configs import TEXT_SIZES, VIT_SIZES, make_bpe_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from conversion.assemble import assemble
from conversion.convert_llava_hr_weights_to_hf import convert


CHECKPOINT = REFERENCE / "stage1-384" / "checkpoint"
TRUNK = "model.vision_tower.high_res_tower.timm_model."
RED = Image.new("RGB", (80, 50), "red")


def save_timm_tower(folder: Path, architecture: str) -> dict[str, torch.Tensor]:
    """As timm's repositories are laid out; returns its weights."""
    tower = timm.create_model(architecture, num_classes=7)
    folder.mkdir()
    save_file(tower.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": architecture, "num_classes": 7}))
    return tower.state_dict()


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Path]:
    """Folders of the parts by kind, all with random weights."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPModel(CLIPConfig(vision_config=VIT_SIZES, text_config=text)).save_pretrained(root / "clip")
    CLIPVisionModel.from_pretrained(root / "clip").save_pretrained(root / "clip_vision")
    # 61 pixels are no multiple of 14, as 384 of so400m-patch14-384
    SiglipVisionModel(SiglipVisionConfig(**{**VIT_SIZES, "image_size": 61})).save_pretrained(root / "siglip")
    BertModel(BertConfig(**text, vocab_size=64)).save_pretrained(root / "bert")

    save_timm_tower(root / "timm", "convnext_atto")
    save_timm_tower(root / "resnet", "resnet10t")
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "mlp", "image_size": 64},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    }
    (root / "open_clip").mkdir()
    torch.save(open_clip.CLIP(**model_cfg).state_dict(), root / "open_clip" / "open_clip_pytorch_model.bin")
    (root / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))

    LlamaForCausalLM(LlamaConfig(**TEXT_SIZES, vocab_size=1000)).save_pretrained(root / "llama")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(CHECKPOINT / name, root / "llama")
    config = Qwen2Config(**TEXT_SIZES, vocab_size=384, tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(root / "qwen2")
    make_bpe_tokenizer().save_pretrained(root / "qwen2")
    return {folder.name: folder for folder in root.iterdir()}


def run_assemble(parts, output, vision_tower="clip", high_res_tower="open_clip", language_model="llama", **kwargs):
    """Assembles parts by their kinds and returns the weights of the result."""
    towers = {"vision_tower": vision_tower, "high_res_tower": high_res_tower, "language_model": language_model}
    assemble(**{option: str(parts.get(kind, kind)) for option, kind in towers.items()}, output=str(output), **kwargs)
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("vision_tower", ["clip", "clip_vision", "siglip"])
def test_vision_tower_is_taken_over(vision_tower, parts, tmp_path):
    result = run_assemble(parts, tmp_path / "out", vision_tower=vision_tower)
    expected = {}
    for name, tensor in load_file(parts[vision_tower] / "model.safetensors").items():
        if name.startswith(("vision_model.embeddings", "vision_model.pre", "vision_model.encoder", "embeddings")):
            expected[name.removeprefix("vision_model.")] = tensor
        elif name.startswith(("pre_layrnorm", "encoder")):
            expected[name] = tensor
    if vision_tower != "siglip":
        del expected["embeddings.class_embedding"]
        expected["embeddings.position_embedding.weight"] = expected["embeddings.position_embedding.weight"][1:]
    for old, new in (("encoder.layers", "layers"), ("pre_layrnorm", "pre_layernorm")):
        expected = {name.replace(old, new): tensor for name, tensor in expected.items()}
    own = ("embeddings.", "layers.", "pre_layernorm.")
    taken = {name.removeprefix("model.vision_tower."): tensor for name, tensor in result.items()}
    taken = {name: tensor for name, tensor in taken.items() if name.startswith(own)}
    assert taken.keys() == expected.keys()
    assert all(torch.equal(taken[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["open_clip_bin", "open_clip_safetensors", "timm", "timm_file", "resnet"])
def test_high_res_tower_is_taken_over(form, parts, tmp_path):
    folder, options = parts[form.split("_")[0] if form.startswith(("timm", "resnet")) else "open_clip"], {}
    if form.startswith("open_clip"):
        weights = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
        expected = {n.removeprefix("visual.trunk."): t for n, t in weights.items() if n.startswith("visual.trunk.")}
    else:
        expected = load_file(folder / "model.safetensors")
    if form == "open_clip_safetensors":
        folder = tmp_path / "safetensors"
        folder.mkdir()
        shutil.copy(parts["open_clip"] / "open_clip_config.json", folder)
        save_file(weights, folder / "open_clip_model.safetensors")
    elif form == "timm_file":
        folder = shutil.copy(folder / "model.safetensors", tmp_path / "weights.safetensors")
        options = {"high_res_architecture": "convnext_atto"}
    result = run_assemble(parts, tmp_path / "out", high_res_tower=str(folder), **options)
    expected = {name: tensor for name, tensor in expected.items() if not name.startswith(("head.", "fc."))}
    assert {name.removeprefix(TRUNK) for name in result if name.startswith(TRUNK)} == expected.keys()
    assert all(torch.equal(result[TRUNK + name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("language_model", ["llama", "qwen2"])
def test_language_model_is_taken_over(language_model, parts, tmp_path):
    result = run_assemble(parts, tmp_path / "out", language_model=language_model)
    rows, new_rows, image_token_id = {"llama": (1000, 1024, 1000), "qwen2": (384, 384, len(make_bpe_tokenizer()))}[
        language_model
    ]
    for name, tensor in load_file(parts[language_model] / "model.safetensors").items():
        new = result[name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)]
        if "embed_tokens" in name or "lm_head" in name:
            assert new.shape[0] == new_rows
            torch.testing.assert_close(new[rows:], tensor.mean(0).expand(new_rows - rows, -1))
        assert torch.equal(new[: tensor.shape[0]], tensor)
    generation_config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation_config.suppress_tokens == [image_token_id, *range(max(rows, image_token_id + 1), new_rows)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_token_id"] == image_token_id


@pytest.mark.parametrize("language_model, image_suffix", [("llama", " "), ("qwen2", "")])
def test_result_answers(language_model, image_suffix, parts, tmp_path):
    run_assemble(parts, tmp_path / "out", language_model=language_model, adapters=True, size=128)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert f"image_suffix = '{image_suffix}'" in processor.chat_template
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token is not None
    inputs = tokenize(processor, chat("What is it?", RED))
    # 128 / 32 * 14 = 56 pixels, 4 x 4 patches
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert len(new) > 0 and not set(new.tolist()) & set(model.generation_config.suppress_tokens)


def test_new_weights_are_reported(parts, tmp_path, capsys):
    result = run_assemble(parts, tmp_path / "out", adapters=True)
    taken = sum(
        name.startswith((TRUNK, "model.language_model.", "lm_head.", "model.vision_tower.layers."))
        or "embeddings" in name
        or "pre_layernorm" in name
        for name in result
    )
    text = capsys.readouterr().out
    assert text.count("new: ") == len(result) - taken
    # 3 adapters of 6 pairs of weight and bias, 2 fusion linears, 2 projector linears
    assert text.count("new: ") == 3 * 12 + 4 + 4
    assert "new: model.vision_tower.mr_adapters.2.gate.fc1.weight" in text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mr_adapter_layers"] == [1, 2, 3]
    for name, tensor in result.items():
        if ".mr_adapters." in name and name.endswith(("pointwise.weight", "high_res_mapping.fc2.weight", ".bias")):
            assert not tensor.any(), name  # design: the last layer of f_l and f_h, and all biases
        elif name.endswith(".weight"):
            assert tensor.any(), name


def test_seed(parts, tmp_path):
    projector = "model.multi_modal_projector.linear_1.weight"
    first, again, other = (
        run_assemble(parts, tmp_path / f"out{index}", seed=seed)[projector] for index, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_dtype_is_the_widest(parts, tmp_path):
    half = tmp_path / "half"
    LlamaForCausalLM.from_pretrained(parts["llama"], dtype=torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, half)
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        result = run_assemble(parts, tmp_path / dtype, language_model=str(half), dtype=dtype)
        assert {tensor.dtype for tensor in result.values()} == {expected}


@pytest.mark.parametrize("language_model", ["llama", "qwen2"])  # output embeddings of their own, and tied ones
def test_result_is_a_base_for_stage_1(language_model, parts, tmp_path):
    result = run_assemble(parts, tmp_path / "base", language_model=language_model)
    names = {
        "model.vision_tower.fusion.low_res_proj": "vision_tower.align_stages.0.fast_proj",
        "model.vision_tower.fusion.high_res_proj": "vision_tower.align_stages.0.slow_proj",
        "model.multi_modal_projector.linear_1": "mm_projector.0",
        "model.multi_modal_projector.linear_2": "mm_projector.2",
    }
    new, projector = {}, {}
    for name, original in names.items():
        for kind in ("weight", "bias"):
            new[f"{name}.{kind}"] = projector[f"model.{original}.{kind}"] = torch.randn_like(result[f"{name}.{kind}"])
    torch.save(projector, tmp_path / "mm_projector.bin")
    convert(str(tmp_path / "mm_projector.bin"), str(tmp_path / "out"), base=str(tmp_path / "base"))
    trained = load_file(tmp_path / "out" / "model.safetensors")
    assert trained.keys() == result.keys()
    assert all(torch.equal(trained[name], new.get(name, result[name])) for name in result)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"vision_tower": "bert"}, "--vision_tower: .* is a bert, but must be clip"),
        ({"vision_tower": "/nowhere"}, "--vision_tower: '/nowhere' cannot be loaded"),
        ({"high_res_tower": "/nowhere"}, "--high_res_tower: '/nowhere' is not a folder or file here"),
        ({"high_res_tower": "clip", "high_res_architecture": "convnext_atto"}, "gamma: missing"),
        ({"high_res_architecture": "resnet10t"}, "faults: .*conv1.*: missing"),
        ({"high_res_architecture": "convnext_gigantic"}, "does not know the architecture 'convnext_gigantic'"),
        ({"high_res_tower": "bert"}, "does not tell timm's name of the architecture"),
        ({"language_model": "clip"}, "--language_model: .* cannot be loaded"),
        ({"size": 1000}, "1000"),
    ],
)
def test_parts_that_do_not_fit(kwargs, message, parts, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_assemble(parts, tmp_path / "out", **kwargs)
    assert_nothing_written(tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor([torch.nan, *[1.0] * 79]), r"not a number in 1 tensors: .*stages\.1\.blocks\.0\.gamma"),
        (None, r"stages\.1\.blocks\.0\.gamma: missing"),
    ],
)
def test_damaged_high_res_towers(value, message, parts, tmp_path):
    folder = shutil.copytree(parts["timm"], tmp_path / "timm")
    tensors = load_file(folder / "model.safetensors") | {"stages.1.blocks.0.gamma": value}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        run_assemble(parts, tmp_path / "out", high_res_tower=str(folder))
    assert_nothing_written(tmp_path / "out")


# --- prompt formats and GGUF ---


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    config = Qwen3Config(**TEXT_SIZES, head_dim=16, vocab_size=384, tie_word_embeddings=True)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    make_bpe_tokenizer("<|im_start|>", "<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gguf_file(parts, tmp_path_factory) -> Path:
    """The tiny Llama as llama.cpp would write it, its matrices in Q8_0."""
    gguf = pytest.importorskip("gguf", reason="GGUF files need the extra [conversion]")
    path = tmp_path_factory.mktemp("gguf") / "llama-q8_0.gguf"
    config, pieces = LlamaConfig.from_pretrained(parts["llama"]), sentencepiece.SentencePieceProcessor()
    pieces.load(str(parts["llama"] / "tokenizer.model"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    ids = range(pieces.vocab_size())
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    kinds = [(pieces.is_unknown, 2), (pieces.is_control, 3), (pieces.is_byte, 6)]
    writer.add_token_types([next((kind for test, kind in kinds if test(i)), 1) for i in ids])
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in load_file(parts["llama"] / "model.safetensors").items():
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, transformers the two halves
            array = array.reshape(config.num_attention_heads, 2, -1, array.shape[1]).swapaxes(1, 2)
            array = array.reshape(tensor.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_chatml(qwen3, parts, tmp_path, capsys):
    run_assemble(parts, tmp_path / "out", language_model=str(qwen3), size=128)
    assert "prompt format: chatml" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    image = {"type": "image", "image": RED}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What <image> is it?"}, image]},
        {"role": "assistant", "content": [{"type": "text", "text": "A sign."}]},
        {"role": "user", "content": "And now?"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat < image> is it?<|im_end|>\n"
        "<|im_start|>assistant\nA sign.<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    inputs = tokenize(processor, messages[:3], return_assistant_tokens_mask=True, add_generation_prompt=False)
    is_answer = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert processor.tokenizer.decode(inputs["input_ids"][0, is_answer]) == "A sign.<|im_end|>"
    for role in ("tool", "system"):
        with pytest.raises(ValueError, match="role must be 'user' or 'assistant'"):
            processor.apply_chat_template([*messages, {"role": role, "content": "x"}])
    end, other = (processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [end, other]


def test_gguf_is_dequantized(gguf_file, parts, tmp_path):
    if Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(ImportError, match="GGUF needs transformers 5.23"):
            run_assemble(parts, tmp_path / "out", language_model=str(gguf_file))
        return
    result = run_assemble(parts, tmp_path / "out", language_model=str(gguf_file))
    expected = run_assemble(parts, tmp_path / "expected")
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        # Q8_0: 255 steps in the range of each 32 values, of normal values of deviation 0.02
        atol = 0.02 * 5 / 127 / 2 if name.startswith(("model.language_model", "lm_head")) else 0
        torch.testing.assert_close(result[name], tensor, atol=atol, rtol=0)
    text = "What does it say? 4711"
    ids = [AutoProcessor.from_pretrained(tmp_path / name).tokenizer(text).input_ids for name in ("out", "expected")]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_scaled_logits_are_reported(scale, qwen3, parts, tmp_path, capsys):
    folder = shutil.copytree(qwen3, tmp_path / "granite")
    GraniteForCausalLM(GraniteConfig(**TEXT_SIZES, vocab_size=384, logits_scaling=scale)).save_pretrained(folder)
    run_assemble(parts, tmp_path / "out", language_model=str(folder), size=128)
    assert ("granite scales or caps its logits" in capsys.readouterr().out) == (scale != 1)


@pytest.mark.parametrize("language_model", ["qwen3", "gguf_file"])
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # TRL sets it
def test_result_trains_and_answers(language_model, request, parts, tmp_path, monkeypatch):
    if language_model == "gguf_file" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("GGUF needs transformers 5.23 or later")
    import datasets

    from training.train import main, make_parser

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "tables"))
    source = request.getfixturevalue(language_model)
    before = run_assemble(parts, tmp_path / "model", language_model=str(source), adapters=True)
    data = make_data(tmp_path / "data", num_rows=4) / "train.jsonl"
    arguments = ("--stage", "finetune", "--model_name_or_path", tmp_path / "model", "--data_path", data)
    arguments += ("--output_dir", tmp_path / "trained", "--max_steps", "1", "--learning_rate", "1e-3", *OPTIONS)
    main(*make_parser().parse_args_and_config(list(map(str, arguments))))
    after = load_file(tmp_path / "trained" / "model.safetensors")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert after[name].isfinite().all() and not torch.equal(after[name], before[name])
    for folder in ("model", "trained"):  # safetensors' own mode is 0600, whatever the umask
        assert len({file.stat().st_mode for file in (tmp_path / folder).iterdir() if file.is_file()}) == 1

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    processor = AutoProcessor.from_pretrained(tmp_path / "trained")
    inputs = tokenize(processor, chat("What is it?", RED))
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_chat_template_is_a_choice(qwen3, parts, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% for message in messages %}<image>{{ message['content'][1]['text'] }}{% endfor %}")
    for choice, prompt in (("vicuna_v1", "USER: <image>\nHi "), (str(own), "<image>Hi")):
        out = tmp_path / Path(choice).stem
        run_assemble(parts, out, language_model=str(qwen3), chat_template=choice)
        processor = AutoProcessor.from_pretrained(out)
        assert processor.apply_chat_template(chat("Hi", RED)).endswith(prompt)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--chat_template must be vicuna_v1, chatml or a file"),
        ("no image", "--chat_template must write an image as <image>"),
        ("{% if %}", "does not fit the chat template"),
    ],
)
def test_chat_templates_that_cannot_be_used(text, message, parts, tmp_path):
    file = tmp_path / "own.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        run_assemble(parts, tmp_path / "out", chat_template=str(file))
    with pytest.raises(ValueError, match="chatml needs <|im_start|> and <|im_end|> as tokens"):
        run_assemble(parts, tmp_path / "out", chat_template="chatml")
    assert not (tmp_path / "out").exists()
