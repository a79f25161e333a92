# SPDX-License-Identifier: Apache-2.0
"""
A checkpoint of real size: 7B in the published layout, of random values. It is converted, loaded, run, and trained for
one step with QLoRA, all on a CPU. `-s` prints the seconds.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.measure import computes_bfloat16
from benchmarks.models import SHAPES, make_contenders
from modeling_llava_hr.utils import get_4bit_config


ROOT = Path(__file__).parent.parent.parent
ORIGINAL = ROOT / "tests" / "fixtures" / "reference" / "stage2-1024" / "checkpoint"
IMAGE = ROOT / "examples" / "pictures" / "street.jpg"
TEXT = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
VOCABULARY = 32000
CONVERTER = "conversion.convert_llava_hr_weights_to_hf"
# Where bfloat16 is emulated, the model runs in 4 bits, too, and computes in float32
DTYPE = torch.bfloat16 if computes_bfloat16() else torch.float32
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
# Names here -> names in an original checkpoint (docs/architecture.md)
TOWER = "model.vision_tower"
NAMES = (
    (rf"{TOWER}\.high_res_tower\.timm_model\.(.*)", rf"{TOWER}.slow_vision_tower.vision_tower.\1"),
    (rf"{TOWER}\.embeddings\.(.*)", rf"{TOWER}.fast_vision_tower.vision_tower.vision_model.embeddings.\1"),
    (rf"{TOWER}\.pre_layernorm\.(.*)", rf"{TOWER}.fast_vision_tower.vision_tower.vision_model.pre_layrnorm.\1"),
    (rf"{TOWER}\.layers\.(.*)", rf"{TOWER}.fast_vision_tower.vision_tower.vision_model.encoder.layers.\1"),
    (rf"{TOWER}\.mr_adapters\.(.*)", rf"{TOWER}.align_stages_latent.\1"),
    (rf"{TOWER}\.fusion\.low_res_proj", rf"{TOWER}.align_stages.0.fast_proj"),
    (rf"{TOWER}\.fusion\.high_res_proj", rf"{TOWER}.align_stages.0.slow_proj"),
    (r"low_res_mapping\.depthwise", "fast_conv"),
    (r"low_res_mapping\.pointwise", "fast_proj"),
    (r"high_res_mapping\.fc1", "slow_conv"),
    (r"high_res_mapping\.fc2", "slow_proj"),
    (r"gate\.fc1", "gate.0"),
    (r"gate\.fc2", "gate.2"),
    (r"(blocks\.\d+)\.gamma", r"\1.weight"),
    (r"model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
    (r"model\.language_model\.", "model."),
)
# Of the ConvNeXt's head, which is not used; the language model's angles come from older versions of transformers
UNUSED = {
    f"{TOWER}.slow_vision_tower.vision_tower.head.norm.weight": (1536,),
    f"{TOWER}.slow_vision_tower.vision_tower.head.pre_logits.fc.weight": (3072, 1536),
    f"{TOWER}.slow_vision_tower.vision_tower.head.fc.weight": (768, 3072),
    f"{TOWER}.fast_vision_tower.vision_tower.vision_model.embeddings.class_embedding": (1024,),
    f"{TOWER}.fast_vision_tower.vision_tower.vision_model.post_layernorm.weight": (1024,),
    **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (64,) for layer in range(32)},
}


def get_available_bytes() -> int:
    """Memory that programs can have without swapping; 0 where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def get_peak_of_commands() -> int:
    """The most memory that one of the commands so far has had, in bytes. Mapped files count."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def get_original_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by their names in an original checkpoint."""
    model = make_contenders(SHAPES["full"], ["llava-hr-1024"], "meta", torch.bfloat16)["llava-hr-1024"].model
    shapes = dict(UNUSED)
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            shape = (VOCABULARY, shape[1])  # without the image token
        elif name.endswith("position_embedding.weight"):
            shape = (shape[0] + 1, shape[1])  # with the class token
        elif re.search(r"mr_adapters\.\d\.(high_res_mapping|low_res_mapping\.pointwise).*weight", name):
            shape = (*shape, 1, 1)  # a convolution
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        shapes[name] = shape
    return shapes


def write_checkpoint(folder: Path) -> int:
    """A 7B checkpoint in the published layout; returns its number of parameters."""
    shutil.copytree(
        ORIGINAL, folder, ignore=lambda _, names: [name for name in names if name.startswith(("py", "mm"))]
    )
    config = json.loads((folder / "config.json").read_text()) | TEXT
    config |= {"mm_hidden_size": 1024, "num_hidden_layers": 32, "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config))
    # one draw for all tensors: drawing seven billion numbers takes minutes
    values = torch.randn(VOCABULARY * 4096).mul_(0.02).bfloat16()
    shapes = get_original_shapes()
    first = [name for name in shapes if re.match(r"model\.(embed|layers\.(1?\d|2[0-2])\.)", name)]
    weight_map = {name: SHARDS[name not in first] for name in shapes}
    for shard in SHARDS:
        names = [name for name in shapes if weight_map[name] == shard]
        # a clone: a view would be saved with all of the values
        tensors = {name: values[: torch.Size(shapes[name]).numel()].clone().view(shapes[name]) for name in names}
        torch.save(tensors, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def run(module: str, *options: str | Path) -> None:
    """Runs a command of this project and prints its seconds."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", module, *map(str, options)], cwd=ROOT, check=True)
    print(f"{module}: {time.monotonic() - start:.0f} s")


def generate(folder: Path) -> None:
    """Loads the model and generates four tokens at 384 px, in a process of its own: training needs the memory."""
    start = time.monotonic()
    quantization = None if DTYPE == torch.bfloat16 else get_4bit_config(DTYPE)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=DTYPE, quantization_config=quantization)
    processor = AutoProcessor.from_pretrained(folder)
    print(f"loading: {time.monotonic() - start:.0f} s, {DTYPE}, {model.get_memory_footprint() / 1e9:.2f} GB")
    content = [{"type": "image", "path": str(IMAGE)}, {"type": "text", "text": "What is shown?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"size": 384, "low_res_size": 336},
    ).to(DTYPE)
    start = time.monotonic()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    print(f"four tokens: {time.monotonic() - start:.0f} s")
    assert output.sequences.shape[1] == inputs["input_ids"].shape[1] + 4
    assert len(output.logits) == 4 and all(logits.isfinite().all() for logits in output.logits)


@pytest.fixture
def folder(tmp_path):
    """A folder whose 30 GB do not stay."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(get_available_bytes() < 20e9, reason="needs 20 GB of memory")
def test_a_checkpoint_of_real_size_is_converted_run_and_trained(folder):
    # towers 0.30 + 0.20 G, adapters and fusion 0.02 G, projector 0.02 G, Vicuna-7B 6.74 G
    assert write_checkpoint(folder / "original") == pytest.approx(7.28e9, rel=0.005)
    subprocess.run([sys.executable, "-m", CONVERTER, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    libraries = get_peak_of_commands()
    run(CONVERTER, "--checkpoint", folder / "original", "--output", folder / "model")
    peak = get_peak_of_commands()
    shards = [max(file.stat().st_size for file in (folder / name).iterdir()) for name in ("original", "model")]
    print(f"memory: {peak / 1e9:.1f} GB; shards {shards[0] / 1e9:.1f} and {shards[1] / 1e9:.1f} GB")
    extended = 2 * (VOCABULARY + 64) * TEXT["hidden_size"]  # embeddings, beside those of the shard
    assert shards[1] < 5.1e9 and peak < sum(shards) + libraries + extended
    shutil.rmtree(folder / "original")
    subprocess.run(
        [sys.executable, __file__, folder / "model"], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )

    row = {"id": "0", "image": IMAGE.name, "conversations": []}
    for role, text in (("human", "<image>\nWhat is shown?"), ("gpt", "A street.")):
        row["conversations"].append({"from": role, "value": text})
    (folder / "data.json").write_text(json.dumps([row]))
    options = {
        "config": ROOT / "training" / "configs" / "finetune_7b_qlora.yaml",
        "model_name_or_path": folder / "model",
        "data_path": folder / "data.json",
        "image_folder": IMAGE.parent,
        "output_dir": folder / "trained",
        **{"lora_r": 16, "lora_alpha": 32, "size": 384, "low_res_size": 336, "max_steps": 1, "warmup_steps": 0},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0},
        **{"use_cpu": True, "report_to": "none", "save_steps": 1},
        **{"dtype": str(DTYPE).removeprefix("torch."), "bf16": DTYPE == torch.bfloat16},
    }
    run("training.train", *(part for name, value in options.items() for part in (f"--{name}", value)))
    (checkpoint,) = (folder / "trained").glob("checkpoint-1")
    (entry,) = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"][:1]
    print(f"loss {entry['loss']:.3f}")
    assert 5 < entry["loss"] < 20  # near ln 32001 = 10.4: random weights know nothing
    assert (checkpoint / "adapter_model.safetensors").stat().st_size > 1e6


if __name__ == "__main__":
    generate(Path(sys.argv[1]))
