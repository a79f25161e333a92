# SPDX-License-Identifier: Apache-2.0
"""
Converts checkpoints of the released LLaVA-HR code to this package's format:

    python -m conversion.convert_llava_hr_weights_to_hf --checkpoint favor123/llava-hr-7b-sft-1024 --output llava-hr-7b

Stage 1 of the released code leaves only projector and fusion behind (`mm_projector.bin`). `--base` names the model
that they were trained in: a folder made by `conversion.assemble` from the same towers and language model, or a
converted checkpoint.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import AutoProcessor, CLIPVisionConfig, GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

from conversion._common import (
    DTYPES,
    IMAGE_TOKEN,
    POSITION_KEY,
    TIMM_PREFIX,
    VIT_KEYS,
    WEIGHT_FILES,
    ConversionError,
    Entry,
    Key,
    add_image_token,
    check,
    check_finite,
    check_output,
    count,
    extend_embeddings,
    find_source,
    find_weight_files,
    get_generation_config,
    get_processor,
    infer_timm_config,
    load_tokenizer,
    plan,
    pointwise_to_linear,
    read_json,
    read_tensors,
    run,
    save,
)
from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, LlavaHrProcessor


PROJECTOR_FILE = "mm_projector.bin"
VIT_HEAD_SIZE = 64  # of every CLIP ViT; the number of heads cannot be read from the tensors
# What a stage-1 checkpoint brings
STAGE_1_WEIGHTS = ("model.multi_modal_projector.", "model.vision_tower.fusion.")
EMBEDDINGS = ("model.language_model.embed_tokens.weight", "lm_head.weight")

_VIT = r"model\.vision_tower\.fast_vision_tower\.vision_tower\.vision_model\."
_CNN = r"model\.vision_tower\.slow_vision_tower\.vision_tower\."
_ADAPTER = r"model\.vision_tower\.align_stages_latent\.(\d+)\."
# stage 1 of the released code writes its names with or without "model."
_FUSION = r"(?:model\.)?vision_tower\.align_stages\.0\."
_PROJECTOR = r"(?:model\.)?mm_projector\."

# Names of the released code (left) and of this package
ORIGINAL_KEYS = (
    Key(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", reason="computed"),
    Key(r"model\.((?:embed_tokens|layers|norm)\..+)", r"model.language_model.\1"),
    Key(r"lm_head\.weight", "lm_head.weight"),
    Key(_PROJECTOR + r"0\.(weight|bias)", r"model.multi_modal_projector.linear_1.\1"),
    Key(_PROJECTOR + r"2\.(weight|bias)", r"model.multi_modal_projector.linear_2.\1"),
    Key(_FUSION + r"fast_proj\.(weight|bias)", r"model.vision_tower.fusion.low_res_proj.\1"),
    Key(_FUSION + r"slow_proj\.(weight|bias)", r"model.vision_tower.fusion.high_res_proj.\1"),
    Key(_ADAPTER + r"fast_conv\.(weight|bias)", r"model.vision_tower.mr_adapters.\1.low_res_mapping.depthwise.\2"),
    Key(
        _ADAPTER + r"fast_proj\.(weight|bias)",
        r"model.vision_tower.mr_adapters.\1.low_res_mapping.pointwise.\2",
        change=pointwise_to_linear,
    ),
    Key(
        _ADAPTER + r"slow_conv\.(weight|bias)",
        r"model.vision_tower.mr_adapters.\1.high_res_mapping.fc1.\2",
        change=pointwise_to_linear,
    ),
    Key(
        _ADAPTER + r"slow_proj\.(weight|bias)",
        r"model.vision_tower.mr_adapters.\1.high_res_mapping.fc2.\2",
        change=pointwise_to_linear,
    ),
    Key(_ADAPTER + r"gate\.0\.(weight|bias)", r"model.vision_tower.mr_adapters.\1.gate.fc1.\2"),
    Key(_ADAPTER + r"gate\.2\.(weight|bias)", r"model.vision_tower.mr_adapters.\1.gate.fc2.\2"),
    Key(_CNN + r"stages\.(\d+)\.blocks\.(\d+)\.weight", TIMM_PREFIX + r"stages.\1.blocks.\2.gamma"),
    Key(_CNN + r"((?:stem|stages)\..+)", TIMM_PREFIX + r"\1"),
    Key(_CNN + r"head\..+", reason="the feature map is taken before the classifier"),
    *(key._replace(pattern=_VIT + key.pattern) for key in (POSITION_KEY, *VIT_KEYS)),
)

# Of the base model of a stage-1 checkpoint: all but what the checkpoint brings
BASE_KEYS = (
    Key(r"model\.(?:multi_modal_projector|vision_tower\.fusion)\..+", reason=f"replaced by {PROJECTOR_FILE}"),
    Key(r"(.+)", r"\1"),
)

# Settings of the released code that this package does not have, with the one value that all published models use
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
        ConversionError: If a setting that the conversion needs is missing, or one has a value that this package lacks.
    """
    original = read_json(folder / "config.json")
    odd = [field for field in (*TEXT_FIELDS, "input_image_size") if not isinstance(original.get(field), int)]
    odd += [field for field in ("vision_tower_slow",) if not isinstance(original.get(field), str)]
    if odd:
        raise ConversionError(
            f"{folder / 'config.json'} is not that of a LLaVA-HR checkpoint: it lacks {', '.join(odd)}, or the values "
            f"are no numbers (of `vision_tower_slow`: no name)."
        )
    for field, value in FIXED_SETTINGS.items():
        if original.get(field, value) != value:
            raise ConversionError(f"config.json has {field} = {original[field]!r}; only {value!r} can be converted.")
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
        ConversionError: If a tensor that tells a size is missing, or sizes contradict each other.
    """
    adapters = count(shapes, r"model\.vision_tower\.mr_adapters\.(\d+)\..+")
    has_adapters = not original.get("freeze_vision", adapters == 0)
    vision_config = _infer_vision_config(shapes)
    timm_shapes = {name.removeprefix(TIMM_PREFIX): s for name, s in shapes.items() if name.startswith(TIMM_PREFIX)}
    gate = shapes.get("model.vision_tower.mr_adapters.0.gate.fc2.bias", (1,))
    fields = {field: original[field] for field in (*TEXT_FIELDS, *TEXT_FIELDS_OPTIONAL) if field in original}
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
        raise ConversionError(f"config.json: {' '.join(str(error).split())}") from error


def _infer_vision_config(shapes: dict[str, torch.Size]) -> CLIPVisionConfig:
    prefix = "model.vision_tower."
    telling = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "layers.0.mlp.fc1.weight")
    missing = [prefix + name for name in telling if len(shapes.get(prefix + name, ())) < 2]
    if missing:
        raise ConversionError(f"The sizes of the ViT cannot be told: {', '.join(missing)} missing or mis-shaped.")
    (hidden_size, *_, patch_size), (positions, _), (intermediate_size, _) = (shapes[prefix + name] for name in telling)
    side = round(positions**0.5)
    if side**2 != positions or hidden_size % VIT_HEAD_SIZE:
        raise ConversionError(
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
    # a name of timm's with a tag, perhaps behind an organisation or a folder
    return original.get("vision_tower_slow", "").rstrip("/").split("/")[-1].split(".")[0]


def _get_processor(original: dict, config: LlavaHrConfig, tokenizer: PreTrainedTokenizerBase) -> LlavaHrProcessor:
    aspect_ratio = "pad" if original.get("image_aspect_ratio") == "pad" else "crop"
    return get_processor(config, tokenizer, original["input_image_size"], STRIDE, aspect_ratio)


def load_model(
    config: LlavaHrConfig, entries: Sequence[Entry], faults: Sequence[str], vocab_size: int, dtype: str
) -> LlavaHrForConditionalGeneration:
    """
    Builds the model without memory, checks all names and shapes, then reads file after file.

    Args:
        config ([`LlavaHrConfig`]): Configuration of the model.
        entries (`Sequence[Entry]`): The tensors to use.
        faults (`Sequence[str]`): What was found wrong before.
        vocab_size (`int`): Rows of the embeddings in the checkpoint, which are extended to those of `config`.
        dtype (`str`): `"auto"` (the widest that occurs, usually the only one) or a key of `DTYPES`.

    Returns:
        [`LlavaHrForConditionalGeneration`] on the CPU.

    Raises:
        ConversionError: If checkpoint and model do not fit.
    """
    with torch.device("meta"):
        model = LlavaHrForConditionalGeneration(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    new_size = config.text_config.vocab_size
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    if new_size != vocab_size:
        expected |= {name: torch.Size((vocab_size, *expected[name][1:])) for name in EMBEDDINGS}
    check(entries, expected, faults)

    target = DTYPES.get(dtype)
    if target is None:
        target = entries[0].meta.dtype
        for entry in entries:
            target = torch.promote_types(target, entry.meta.dtype)
    state_dict, tensors, file = {}, {}, None
    for entry in tqdm(entries, desc="Reading weights", unit="tensor"):
        if entry.file != file:
            file, tensors = entry.file, read_tensors(entry.file)
        tensor = tensors[entry.source]
        tensor = (entry.change(tensor) if entry.change else tensor).to(target)
        if entry.name in EMBEDDINGS and new_size != vocab_size:
            tensor = extend_embeddings(tensor, new_size)
        state_dict[entry.name] = tensor
    check_finite(state_dict)
    if config.tie_word_embeddings:
        state_dict["lm_head.weight"] = state_dict[EMBEDDINGS[0]]
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    return model


def convert(checkpoint: str, output: str, base: str | None = None, dtype: str = "auto") -> None:
    """
    Converts a checkpoint. See the command line's help for the arguments.

    Raises:
        ConversionError: If the checkpoint cannot be converted; nothing is written then.
    """
    output_folder = Path(output).expanduser()
    check_output(output_folder)
    source = find_source(checkpoint, "checkpoint", (*WEIGHT_FILES, PROJECTOR_FILE))
    folder = source if source.is_dir() else source.parent
    files = find_weight_files(source, (*WEIGHT_FILES, PROJECTOR_FILE))
    if not files:
        raise ConversionError(f"--checkpoint: {source} has none of {', '.join((*WEIGHT_FILES, PROJECTOR_FILE))}.")
    entries, dropped, faults = plan(files, ORIGINAL_KEYS)
    is_stage_1 = all(entry.name.startswith(STAGE_1_WEIGHTS) for entry in entries)
    if is_stage_1 and base is None:
        raise ConversionError(f"{files[0]} holds projector and fusion at most: name the rest of the model by --base.")
    if base is not None and not is_stage_1:
        raise ConversionError(f"--base is only for {PROJECTOR_FILE}, but {source} has complete weights.")
    if base is not None:
        model, processor, base_dropped = _convert_stage_1(folder, base, dtype, entries, faults)
        dropped |= base_dropped
    else:
        model, processor = _convert_full(folder, dtype, entries, faults)
    notes = [f"dropped {number} tensors: {reason}" for reason, number in Counter(dropped.values()).items()]
    if not is_stage_1 and (folder / PROJECTOR_FILE).is_file():
        notes.append(f"ignored {PROJECTOR_FILE}: the complete weights contain what it holds")
    save(model, processor, output_folder, notes)


def _convert_full(
    folder: Path, dtype: str, entries: Sequence[Entry], faults: Sequence[str]
) -> tuple[LlavaHrForConditionalGeneration, LlavaHrProcessor]:
    original = read_original_config(folder)
    tokenizer = load_tokenizer(folder)
    old_size = original["vocab_size"]
    new_size = add_image_token(tokenizer, old_size)
    shapes = {entry.name: entry.meta.shape for entry in entries}
    config = infer_config(original, shapes, new_size, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    processor = _get_processor(original, config, tokenizer)
    model = load_model(config, entries, faults, old_size, dtype)
    model.generation_config = get_generation_config(tokenizer, old_size, new_size)
    return model, processor


def _convert_stage_1(
    folder: Path, base: str, dtype: str, entries: Sequence[Entry], faults: Sequence[str]
) -> tuple[LlavaHrForConditionalGeneration, LlavaHrProcessor, dict[str, str]]:
    base_folder = find_source(base, "base", WEIGHT_FILES)
    base_files = find_weight_files(base_folder)
    if not base_files or read_json(base_folder / "config.json").get("model_type") != LlavaHrConfig.model_type:
        raise ConversionError(f"--base: {base_folder} is not in this package's format. See conversion.assemble.")
    config = LlavaHrConfig.from_pretrained(base_folder)
    processor = AutoProcessor.from_pretrained(base_folder)
    if (folder / "config.json").is_file():
        original = read_original_config(folder)
        architecture = _architecture(original)
        if architecture != config.high_res_vision_config.architecture:
            raise ConversionError(
                f"--base: the high-resolution tower of {base_folder} is {config.high_res_vision_config.architecture}, "
                f"but the checkpoint was trained with {architecture}."
            )
        processor.image_processor = _get_processor(original, config, processor.tokenizer).image_processor
    base_entries, dropped, base_faults = plan(base_files, BASE_KEYS)
    vocab_size = config.text_config.vocab_size
    model = load_model(config, [*entries, *base_entries], [*faults, *base_faults], vocab_size, dtype)
    model.generation_config = GenerationConfig.from_pretrained(base_folder)
    return model, processor, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description="Converts a checkpoint of the released LLaVA-HR code.")
    parser.add_argument("--checkpoint", required=True, help=f"folder, Hub id, or the path of a {PROJECTOR_FILE}")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--base", help=f"folder or Hub id of the model that a {PROJECTOR_FILE} belongs to")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of the result; auto: as stored")
    run(convert, vars(parser.parse_args()))


if __name__ == "__main__":
    main()
