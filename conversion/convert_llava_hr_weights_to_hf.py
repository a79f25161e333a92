# SPDX-License-Identifier: Apache-2.0
"""
Converts checkpoints of the released LLaVA-HR code to this package's format:

    python -m conversion.convert_llava_hr_weights_to_hf --checkpoint favor123/llava-hr-7b-sft-1024 --output llava-hr-7b

Stage 1 of the released code saves only projector and fusion (`mm_projector.bin`). `--base` names the model that they
were trained in: a folder made by `conversion.assemble` from the same towers and language model, or a converted
checkpoint.

A LoRA checkpoint (`adapter_model.bin`, `non_lora_trainables.bin`) is merged into its `--base`: the language model that
it was trained from, or a folder made by `conversion.assemble` if the towers were frozen.

Memory: at most one shard of the checkpoint and one of the result (`--max_shard_size`).
"""

import argparse
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    logging,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from conversion.checkpoints import (
    DTYPES,
    WEIGHT_FILES,
    Plan,
    check_entries,
    find_not_finite,
    find_source,
    find_weight_files,
    plan,
    raise_not_finite,
    read_json,
    read_tensors,
)
from conversion.keys import EMBEDDINGS, ORIGINAL_KEYS, PROJECTOR_AND_FUSION, TIMM_PREFIX, Key
from conversion.lora import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    TRAINABLE_KEYS,
    TRAINABLES_FILE,
    Update,
    read_updates,
)
from conversion.parts import (
    add_image_token,
    count,
    extend_embeddings,
    get_generation_config,
    get_processor,
    infer_timm_config,
    load_tokenizer,
    print_summary,
)
from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, LlavaHrProcessor
from modeling_llava_hr.processing_llava_hr import IMAGE_TOKEN
from modeling_llava_hr.utils import check_new_folder, new_folder, run_command


PROJECTOR_FILE = "mm_projector.bin"
VIT_HEAD_SIZE = 64  # of every CLIP ViT; the number of heads cannot be read from the tensors

# A base in this package's format
OWN_KEYS = (Key(r"(.+)", r"\1"),)

# Settings of the released code that are fixed here, with the value that all published models use
FIXED_SETTINGS = {"is_multipath_encoder": True, "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
# Pixels per position of the ConvNeXt's feature map
STRIDE = 32
TEXT_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_FIELDS_OPTIONAL = (
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def read_original_config(folder: Path) -> dict:
    """
    Reads the `config.json` of the released code.

    Raises:
        ValueError: If a setting that the conversion needs is missing, or one has an unsupported value.
    """
    original = read_json(folder / "config.json")
    odd = [name for name in (*TEXT_FIELDS, "input_image_size") if not isinstance(original.get(name), int)]
    odd += [name for name in ("vision_tower_slow",) if not isinstance(original.get(name), str)]
    if odd:
        raise ValueError(
            f"{folder / 'config.json'} is not a LLaVA-HR checkpoint's: it lacks {', '.join(odd)}, or the values are "
            f"not numbers (a name for `vision_tower_slow`)."
        )
    for name, value in FIXED_SETTINGS.items():
        if original.get(name, value) != value:
            raise ValueError(f"config.json has {name} = {original[name]!r}; only {value!r} can be converted.")
    return original


def infer_config(original: dict, shapes: dict[str, torch.Size], vocab_size: int, image_token_id: int) -> LlavaHrConfig:
    """
    Configuration of the converted model. The towers' names in an original config say nothing about their sizes, so
    those are read from the tensors and no tower is downloaded.

    Args:
        original (`dict`): The original `config.json`.
        shapes (`dict[str, torch.Size]`): Shapes of the tensors by this package's names.
        vocab_size (`int`): Rows of the embeddings after conversion.
        image_token_id (`int`): Id of the image token.

    Returns:
        [`LlavaHrConfig`]

    Raises:
        ValueError: If a tensor that determines a size is missing, or sizes contradict each other.
    """
    adapters = count(shapes, r"model\.vision_tower\.mr_adapters\.(\d+)\..+")
    has_adapters = not original.get("freeze_vision", adapters == 0)
    vision_config = _infer_vision_config(shapes)
    timm_shapes = {name.removeprefix(TIMM_PREFIX): s for name, s in shapes.items() if name.startswith(TIMM_PREFIX)}
    gate = shapes.get("model.vision_tower.mr_adapters.0.gate.fc2.bias", (1,))
    fields = {name: original[name] for name in (*TEXT_FIELDS, *TEXT_FIELDS_OPTIONAL) if name in original}
    try:
        return LlavaHrConfig(
            vision_config=vision_config,
            high_res_vision_config=infer_timm_config(_architecture(original), timm_shapes),
            text_config=LlamaConfig(**{**fields, "vocab_size": vocab_size}),
            image_token_id=image_token_id,
            mr_adapter_layers=None if has_adapters else [],
            mr_adapter_gate="scalar" if gate == (1,) else "channel",
        )
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from error


def _infer_vision_config(shapes: dict[str, torch.Size]) -> CLIPVisionConfig:
    prefix = "model.vision_tower."
    telling = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "layers.0.mlp.fc1.weight")
    missing = [prefix + name for name in telling if len(shapes.get(prefix + name, ())) < 2]
    if missing:
        raise ValueError(f"The sizes of the ViT are unknown: {', '.join(missing)} missing or mis-shaped.")
    (hidden_size, *_, patch_size), (positions, _), (intermediate_size, _) = (shapes[prefix + name] for name in telling)
    side = round(positions**0.5)
    if side**2 != positions or hidden_size % VIT_HEAD_SIZE:
        raise ValueError(
            f"The ViT must have a class token, a square of positions and a width that is a multiple of "
            f"{VIT_HEAD_SIZE}, but has {positions} positions beside the class token and the width {hidden_size}."
        )
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=count(shapes, r"model\.vision_tower\.layers\.(\d+)\..+"),
        num_attention_heads=hidden_size // VIT_HEAD_SIZE,
        image_size=side * patch_size,
        patch_size=patch_size,
    )


def _architecture(original: dict) -> str:
    # timm's name with a tag, perhaps after an organisation or a folder
    return original.get("vision_tower_slow", "").rstrip("/").split("/")[-1].split(".")[0]


def _get_processor(original: dict, config: LlavaHrConfig, tokenizer: PreTrainedTokenizerBase) -> LlavaHrProcessor:
    aspect_ratio = "pad" if original.get("image_aspect_ratio") == "pad" else "crop"
    return get_processor(config, tokenizer, original["input_image_size"], STRIDE, aspect_ratio)


@dataclass
class Conversion:
    """
    The contents of the result.

    Args:
        config ([`LlavaHrConfig`]): Its configuration.
        processor ([`LlavaHrProcessor`]): Its processor.
        generation_config (`GenerationConfig`): Its defaults for generation.
        plan ([`Plan`]): Where its tensors come from.
        num_rows (`int`): Rows of the embeddings in the checkpoint, which are extended to those of `config`.
        updates (`dict[str, Update]`): LoRA updates of tensors.
    """

    config: LlavaHrConfig
    processor: LlavaHrProcessor
    generation_config: GenerationConfig
    plan: Plan
    num_rows: int
    updates: dict[str, Update] = field(default_factory=dict)


def prepare_full(folder: Path, weights: Plan, tokenizer: PreTrainedTokenizerBase | None = None) -> Conversion:
    """Prepares a complete checkpoint: its folder, its weights, and its tokenizer if that is not in the folder."""
    original = read_original_config(folder)
    tokenizer = tokenizer or load_tokenizer(folder)
    old_size = original["vocab_size"]
    new_size = add_image_token(tokenizer, old_size)
    shapes = {entry.name: entry.meta.shape for entry in weights.entries}
    config = infer_config(original, shapes, new_size, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    processor = _get_processor(original, config, tokenizer)
    return Conversion(config, processor, get_generation_config(tokenizer, old_size, new_size), weights, old_size)


def prepare_stage_1(folder: Path, weights: Plan, base: str) -> Conversion:
    """Prepares the weights of a projector file, and their base in this package's format."""
    base_folder, is_own = find_base(base)
    if not is_own:
        raise ValueError(f"--base: {base_folder} is not in this package's format. See conversion.assemble.")
    config = LlavaHrConfig.from_pretrained(base_folder)
    processor = AutoProcessor.from_pretrained(base_folder)
    if (folder / "config.json").is_file():
        original = read_original_config(folder)
        architecture = _architecture(original)
        if architecture != config.high_res_vision_config.architecture:
            raise ValueError(
                f"--base: the high-resolution tower of {base_folder} is {config.high_res_vision_config.architecture}, "
                f"but the checkpoint was trained with {architecture}."
            )
        processor.image_processor = _get_processor(original, config, processor.tokenizer).image_processor
    weights = add_base(weights, plan(find_weight_files(base_folder), OWN_KEYS), PROJECTOR_FILE)
    generation_config = GenerationConfig.from_pretrained(base_folder)
    return Conversion(config, processor, generation_config, weights, config.text_config.vocab_size)


def prepare_lora(folder: Path, base: str) -> Conversion:
    """Prepares LoRA and its base: a language model, an original checkpoint, or one in this package's format."""
    files = find_weight_files(folder, (TRAINABLES_FILE,))
    if not files:
        raise ValueError(f"{folder} has no {TRAINABLES_FILE}, the weights that were trained beside LoRA.")
    weights = plan(files, TRAINABLE_KEYS)
    base_folder, is_own = find_base(base)
    weights = add_base(
        weights, plan(find_weight_files(base_folder), OWN_KEYS if is_own else ORIGINAL_KEYS), TRAINABLES_FILE
    )
    if not any(entry.name.startswith(TIMM_PREFIX) for entry in weights.entries):
        raise ValueError(
            f"The vision towers are neither in {TRAINABLES_FILE} nor in --base: they were frozen. Name as --base a "
            "folder made by conversion.assemble from the towers and the language model."
        )
    updates, faults = read_updates(folder, weights)
    weights.faults.extend(faults)
    # the released code does not save a tokenizer with LoRA
    tokenizer = AutoProcessor.from_pretrained(base_folder).tokenizer if is_own else load_tokenizer(base_folder)
    conversion = prepare_full(folder, weights, tokenizer)
    if is_own:
        conversion.num_rows = LlavaHrConfig.from_pretrained(base_folder).text_config.vocab_size
    conversion.updates = updates
    return conversion


def find_base(base: str) -> tuple[Path, bool]:
    """
    The folder of `--base`, and whether it is in this package's format.

    Raises:
        ValueError: If it does not have weights.
    """
    folder = find_source(base, "base", WEIGHT_FILES)
    if not find_weight_files(folder):
        raise ValueError(f"--base: {folder} has none of {', '.join(WEIGHT_FILES)}.")
    return folder, read_json(folder / "config.json").get("model_type") == LlavaHrConfig.model_type


def add_base(weights: Plan, base: Plan, file: str) -> Plan:
    """Adds the tensors of the base that `file` does not replace. It always replaces projector and fusion."""
    own = {entry.name for entry in weights.entries}
    replaced = {e.source for e in base.entries if e.name in own or e.name.startswith(PROJECTOR_AND_FUSION)}
    dropped = weights.dropped | base.dropped | dict.fromkeys(replaced, f"replaced by {file}")
    entries = [*weights.entries, *(entry for entry in base.entries if entry.source not in replaced)]
    return Plan(entries, dropped, weights.faults + base.faults)


def make_model(conversion: Conversion, dtype: str) -> LlavaHrForConditionalGeneration:
    """
    The result on the meta device, after comparing all names and shapes.

    Args:
        conversion ([`Conversion`]): Its contents.
        dtype (`str`): `"auto"` (the widest in the checkpoint, usually the only one) or a key of `DTYPES`.

    Raises:
        ValueError: If checkpoint and model do not fit.
    """
    config, entries = conversion.config, conversion.plan.entries
    with torch.device("meta"):
        model = LlavaHrForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    for name in expected.keys() & EMBEDDINGS:
        expected[name] = torch.Size((conversion.num_rows, *expected[name][1:]))
    check_entries(entries, expected, conversion.plan.faults)
    widest = reduce(torch.promote_types, {entry.meta.dtype for entry in entries})
    model.generation_config = conversion.generation_config
    return model.to(DTYPES.get(dtype, widest))


def write_weights(
    model: LlavaHrForConditionalGeneration, conversion: Conversion, folder: Path, max_shard_size: str
) -> None:
    """
    Writes the weights shard by shard, in the order of the checkpoint's files.

    Args:
        model ([`LlavaHrForConditionalGeneration`]): The result, on the meta device; gives dtype and shapes.
        conversion ([`Conversion`]): Where the tensors come from.
        folder (`Path`): Folder for the shards and their index.
        max_shard_size (`str`): Such as `"5GB"`. A larger tensor gets a shard of its own.

    Raises:
        ValueError: If a value is infinite or not a number; names the tensors.
    """
    rows, result = conversion.config.text_config.vocab_size, model.state_dict()
    entries = {entry.name: entry for entry in conversion.plan.entries}
    split = split_torch_state_dict_into_shards(
        {name: result[name] for name in entries},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    file, tensors, broken = None, {}, []
    with tqdm(total=len(entries), desc="Converting weights", unit="tensor") as progress:
        for shard_name, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                entry = entries[name]
                if entry.file != file:
                    file, tensors = entry.file, read_tensors(entry.file)
                tensor = tensors[entry.source]
                tensor = entry.change(tensor) if entry.change else tensor
                if name in conversion.updates:
                    tensor = conversion.updates[name].add_to(tensor)
                tensor = tensor.to(model.dtype)
                if name in EMBEDDINGS and rows != conversion.num_rows:
                    tensor = extend_embeddings(tensor, rows)
                shard[name] = tensor.contiguous()
                progress.update()
            broken += find_not_finite(shard)
            if not broken:
                save_file(shard, folder / shard_name, metadata={"format": "pt"})
    raise_not_finite(broken)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def prepare(checkpoint: str, source: Path, base: str | None) -> Conversion:
    """Prepares a checkpoint by its kind: complete, LoRA, or projector and fusion."""
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and (folder / ADAPTER_CONFIG).is_file():
        if base is None:
            raise ValueError(f"{folder} is a LoRA checkpoint: name the language model of its training by --base.")
        find_source(checkpoint, "checkpoint", (TRAINABLES_FILE,))  # downloads it
        find_source(checkpoint, "checkpoint", ADAPTER_FILES)
        return prepare_lora(folder, base)
    names = (*WEIGHT_FILES, PROJECTOR_FILE)
    files = find_weight_files(source, names)
    if not files:
        raise ValueError(f"--checkpoint: {source} has none of {', '.join(names)}.")
    weights = plan(files, ORIGINAL_KEYS)
    is_stage_1 = all(entry.name.startswith(PROJECTOR_AND_FUSION) for entry in weights.entries)
    if is_stage_1 and base is None:
        raise ValueError(f"{files[0]} holds at most projector and fusion: name the rest of the model by --base.")
    if base is not None and not is_stage_1:
        raise ValueError(f"--base is for LoRA and {PROJECTOR_FILE}, but {source} has complete weights.")
    return prepare_full(folder, weights) if base is None else prepare_stage_1(folder, weights, base)


def convert(
    checkpoint: str, output: str, base: str | None = None, dtype: str = "auto", max_shard_size: str = "5GB"
) -> None:
    """
    Converts a checkpoint. The help of the command line describes the arguments.

    Raises:
        ValueError: If the checkpoint cannot be converted. Nothing is written then.
    """
    output_folder = Path(output).expanduser()
    check_new_folder(output_folder)
    source = find_source(checkpoint, "checkpoint", (*WEIGHT_FILES, PROJECTOR_FILE))
    conversion = prepare(checkpoint, source, base)
    model = make_model(conversion, dtype)
    with new_folder(output_folder) as partial:
        model.save_pretrained(partial, state_dict={})  # everything but the weights
        write_weights(model, conversion, partial, max_shard_size)
        conversion.processor.save_pretrained(partial)
    dropped = Counter(conversion.plan.dropped.values())
    notes = [f"dropped {number} tensors: {reason}" for reason, number in dropped.items()]
    if conversion.updates:
        notes.append(f"merged {len(conversion.updates)} LoRA updates")
    print_summary(output_folder, model, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Converts a checkpoint of the released LLaVA-HR code.")
    parser.add_argument("--checkpoint", required=True, help=f"folder, Hub id, or the path of a {PROJECTOR_FILE}")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--base", help=f"folder or Hub id of what LoRA or a {PROJECTOR_FILE} was trained from")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of the result; auto: as stored")
    parser.add_argument("--max_shard_size", default="5GB", help="of the result's weight files")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    convert(**vars(arguments))


if __name__ == "__main__":
    run_command(main)
