# SPDX-License-Identifier: Apache-2.0
"""
Assembles an untrained LLaVA-HR from its parts, the starting point of training stage 1:

    python -m conversion.assemble --vision_tower openai/clip-vit-large-patch14-336 \
        --high_res_tower laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup \
        --language_model lmsys/vicuna-7b-v1.5 --output llava-hr-7b-untrained

The parts' weights are copied unchanged; projector, fusion and (with `--adapters`) MR-Adapters are new. Both views are
normalised for CLIP, as the high-resolution tower was trained.

The prompt format is ChatML if the language model's tokenizer has the ChatML tokens (Qwen, SmolLM2), otherwise that of
the released models ("vicuna_v1"). `--language_model` may also be a `.gguf` file, which is dequantized.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TimmWrapperConfig,
    logging,
)

from conversion.checkpoints import (
    DTYPES,
    UNREADABLE,
    WEIGHT_FILES,
    explain_unreadable,
    find_not_finite,
    find_source,
    find_weight_files,
    raise_faults,
    raise_not_finite,
    read_json,
    read_tensors,
)
from conversion.keys import CLIP_KEYS, CNN_KEYS, NEW_WEIGHTS, SIGLIP_KEYS, TIMM_PREFIX, Key, look_up
from conversion.parts import (
    add_image_token,
    extend_embeddings,
    get_generation_config,
    get_processor,
    infer_timm_config,
    load_tokenizer,
    print_summary,
)
from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, LlavaHrProcessor
from modeling_llava_hr.configuration_llava_hr import check_sizes
from modeling_llava_hr.processing_llava_hr import IMAGE_TOKEN, get_chat_template
from modeling_llava_hr.utils import check_new_folder, new_folder, run_command


# Model types of transformers whose ViT LLaVA-HR can use
VISION_MODEL_TYPES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
CHATML_FILE = Path(__file__).with_name("chatml.jinja")
# open_clip's complete models, timm's, and transformers' timm wrapper
CNN_WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", *WEIGHT_FILES)

StateDict = dict[str, torch.Tensor]


def rename(tensors: StateDict, keys: Sequence[Key]) -> tuple[StateDict, dict[str, str]]:
    """
    Applies a table of key names to loaded tensors.

    Args:
        tensors (`dict[str, torch.Tensor]`): Tensors by their names in the source.
        keys (`Sequence[Key]`): The table; the first matching row counts.

    Returns:
        `tuple`: The tensors by the model's names (a name that no row matches is kept); those dropped, with the reason.
    """
    renamed, dropped = {}, {}
    for source, tensor in tensors.items():
        key, name = look_up(source, keys)
        if key is not None and name is None:
            dropped[source] = key.reason
        else:
            renamed[name or source] = key.change(tensor) if key is not None and key.change else tensor
    return renamed, dropped


def load_part(option: str, auto_class: Any, source: str | Path, **kwargs: Any) -> Any:
    """
    `auto_class.from_pretrained(source)`.

    Raises:
        ValueError: If that fails; names the option.
    """
    try:
        return auto_class.from_pretrained(source, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
    except StrictDataclassError as error:  # its first line only names the validator
        reason = str(error).strip().splitlines()[-1].strip()
    except UNREADABLE as error:
        reason = explain_unreadable(error)
    raise ValueError(f"--{option}: {source!r} cannot be loaded: {reason}")


def load_part_config(option: str, source: str, **kwargs: Any) -> PreTrainedConfig:
    """
    Loads the configuration of a part and validates it before the part is loaded.

    Raises:
        ValueError: If it cannot be loaded, or a size is out of range.
    """
    config = load_part(option, AutoConfig, source, **kwargs)
    for part in filter(None, (config, *(getattr(config, name) for name in config.sub_configs))):
        check_sizes(f"--{option}: {part.model_type}", part)
    return config


def load_vision_tower(source: str) -> tuple[StateDict, dict[str, str], PreTrainedConfig]:
    """
    Loads the ViT of a CLIP or SigLIP model.

    Args:
        source (`str`): Folder or Hub id.

    Returns:
        `tuple`: Its tensors by LLaVA-HR's names, what was dropped with reasons, and its configuration.

    Raises:
        ValueError: If it is another kind of model, or incomplete.
    """
    config = load_part_config("vision_tower", source)
    if config.model_type not in VISION_MODEL_TYPES:
        raise ValueError(
            f"--vision_tower: {source!r} is a {config.model_type}, but must be {' or '.join(VISION_MODEL_TYPES)}."
        )
    if config.model_type in ("clip", "siglip"):
        config = config.vision_config
    model, info = load_part("vision_tower", AutoModel, source, config=config, dtype="auto", output_loading_info=True)
    is_clip = config.model_type == "clip_vision_model"
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in info["missing_keys"]}
    state_dict, dropped = rename(tensors, CLIP_KEYS if is_clip else SIGLIP_KEYS)
    # SigLIP's 384 pixels are not a multiple of its patches of 14: the last 6 have no position
    config.image_size = config.image_size // config.patch_size * config.patch_size
    return state_dict, dropped, config


def load_high_res_tower(source: str, architecture: str | None) -> tuple[StateDict, dict[str, str], TimmWrapperConfig]:
    """
    Loads a CNN from open_clip's, timm's or the timm wrapper's weights.

    Args:
        source (`str`): Folder, weight file or Hub id.
        architecture (`str`, *optional*): timm's name for it, if no configuration beside the weights has it.

    Returns:
        `tuple`: Its tensors by LLaVA-HR's names, what was dropped with reasons, and its configuration.

    Raises:
        ValueError: If weights or architecture are not found.
    """
    path = find_source(source, "high_res_tower", CNN_WEIGHT_FILES)
    files = find_weight_files(path, CNN_WEIGHT_FILES)
    if not files:
        raise ValueError(f"--high_res_tower: {path} has none of {', '.join(CNN_WEIGHT_FILES)}.")
    folder = files[0].parent
    if architecture is None and (folder / "open_clip_config.json").is_file():
        vision_cfg = read_json(folder / "open_clip_config.json").get("model_cfg", {}).get("vision_cfg", {})
        architecture = vision_cfg.get("timm_model_name")
    if architecture is None and (folder / "config.json").is_file():
        architecture = read_json(folder / "config.json").get("architecture")
    if architecture is None:
        raise ValueError(
            f"--high_res_tower: {folder} does not tell timm's name of the architecture. Pass it as "
            f"--high_res_architecture, for example convnext_large_mlp."
        )
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    state_dict, dropped = rename(tensors, CNN_KEYS)
    shapes = {name.removeprefix(TIMM_PREFIX): tensor.shape for name, tensor in state_dict.items()}
    return state_dict, dropped, infer_timm_config(architecture, shapes)


def load_language_model(source: str) -> tuple[StateDict, PreTrainedConfig, PreTrainedTokenizerBase, int]:
    """
    Loads a causal language model and its tokenizer and gives both an image token.

    Args:
        source (`str`): Folder, Hub id or `.gguf` file.

    Returns:
        `tuple`: Its tensors by LLaVA-HR's names, its configuration, its tokenizer, the size of its own vocabulary.

    Raises:
        ValueError: If it cannot be loaded, or has an output bias, which LLaVA-HR does not support.
        ImportError: If it is a `.gguf` file and transformers is too old for it.
    """
    options: dict[str, Any] = {}
    path = Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        if Version(transformers.__version__) < Version("5.23"):  # reads the file's tokenizer incompletely
            raise ImportError("--language_model: GGUF needs transformers 5.23: pip install --upgrade transformers")
        source, options = str(path.parent), {"gguf_file": path.name}
    config = load_part_config("language_model", source, **options)
    options = {"config": config, "dtype": "auto", **options}
    model, info = load_part("language_model", AutoModelForCausalLM, source, output_loading_info=True, **options)
    head = model.get_output_embeddings()
    if info["missing_keys"] or head.bias is not None:
        fault = f"lacks {', '.join(sorted(info['missing_keys']))}" if info["missing_keys"] else "has an output bias"
        raise ValueError(f"--language_model: {source!r} {fault}.")
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long)
        plain, logits = head(model.base_model(token).last_hidden_state), model(token).logits
    if not torch.allclose(logits, plain, rtol=1e-2, atol=1e-2 * plain.std().item()):
        print(f"note: {source} scales or caps its logits, LLaVA-HR does not: its first losses and samples will differ")
    folder = find_source(source, "language_model")
    if "gguf_file" not in options and (folder / "tokenizer.model").is_file() and _is_llama_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
    else:
        options = {"padding_side": "left", "gguf_file": options.get("gguf_file")}
        tokenizer = load_part("language_model", AutoTokenizer, folder, **options)
        if options["gguf_file"] is not None:  # the weights are dequantized
            vars(model.config).pop("quantization_config", None)
    vocab_size = model.config.vocab_size
    new_size = add_image_token(tokenizer, vocab_size)
    embeddings = model.get_input_embeddings().weight
    state_dict = {
        f"model.language_model.{name}": extend_embeddings(tensor, new_size) if tensor is embeddings else tensor
        for name, tensor in model.base_model.state_dict(keep_vars=True).items()
    }
    if not model.config.tie_word_embeddings:
        state_dict["lm_head.weight"] = extend_embeddings(head.weight, new_size)
    model.config.vocab_size = new_size
    return state_dict, model.config, tokenizer, vocab_size


def _is_llama_tokenizer(folder: Path) -> bool:
    return str(read_json(folder / "tokenizer_config.json").get("tokenizer_class")).startswith("LlamaTokenizer")


def get_prompt_format(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> tuple[str, str, int | None]:
    """
    The prompt format of a language model.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        chat_template (`str`, *optional*): `"vicuna_v1"`, `"chatml"` or a file; by default what fits the tokenizer.

    Returns:
        `tuple`: Name and Jinja template of the format; the token that ends an answer if it is not the tokenizer's.

    Raises:
        ValueError: If there is no such file, or the tokenizer does not have the ChatML tokens.
    """
    start, end = (tokenizer.convert_tokens_to_ids(marker) for marker in ("<|im_start|>", "<|im_end|>"))
    has_markers = not {start, end} & {None, tokenizer.unk_token_id}
    name = chat_template or ("chatml" if has_markers else "vicuna_v1")
    if name == "vicuna_v1":
        return name, get_chat_template(tokenizer), None
    if name != "chatml":
        try:
            return name, Path(name).expanduser().read_text(encoding="utf-8"), None
        except OSError as error:
            raise ValueError(f"--chat_template must be vicuna_v1, chatml or a file, but {name!r}: {error}") from None
    if not has_markers:
        raise ValueError("--chat_template chatml needs <|im_start|> and <|im_end|> as tokens of the language model.")
    return name, CHATML_FILE.read_text(encoding="utf-8"), end


def check_template(processor: LlavaHrProcessor) -> None:
    """
    Raises:
        ValueError: If the chat template does not write an image as one image token.
    """
    content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    if prompt.count(IMAGE_TOKEN) != 1:
        raise ValueError(f"--chat_template must write an image as {IMAGE_TOKEN}, but its prompt is {prompt!r}.")


def assemble(
    vision_tower: str,
    high_res_tower: str,
    language_model: str,
    output: str,
    high_res_architecture: str | None = None,
    size: int = 384,
    adapters: bool = False,
    chat_template: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> None:
    """
    Assembles an untrained LLaVA-HR. The help of the command line describes the arguments.

    Raises:
        ValueError: If the parts cannot be found or do not fit. Nothing is written then.
    """
    folder = Path(output).expanduser()
    check_new_folder(folder)
    vision_weights, vision_dropped, vision_config = load_vision_tower(vision_tower)
    high_res_weights, high_res_dropped, high_res_config = load_high_res_tower(high_res_tower, high_res_architecture)
    text_weights, text_config, tokenizer, vocab_size = load_language_model(language_model)
    prompt_format, template, end = get_prompt_format(tokenizer, chat_template)
    config = LlavaHrConfig(
        vision_config=vision_config,
        high_res_vision_config=high_res_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        mr_adapter_layers=None if adapters else [],
    )
    state_dict = vision_weights | high_res_weights | text_weights
    if dtype == "auto":
        # the widest dtype of the parts, so that no weight is rounded
        widest = reduce(torch.promote_types, {t.dtype for t in state_dict.values() if t.is_floating_point()})
    torch.manual_seed(seed)
    model, info = LlavaHrForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=DTYPES.get(dtype) or widest, output_loading_info=True
    )
    new = {name for name in info["missing_keys"] if name.startswith(NEW_WEIGHTS)}
    faults = [f"{name}: missing" for name in sorted(info["missing_keys"] - new)]
    faults += [f"{name}: unexpected" for name in sorted(info["unexpected_keys"])]
    faults += [f"{name}: shape {[*a]}, expected {[*b]}" for name, a, b in sorted(info["mismatched_keys"])]
    raise_faults(faults)
    raise_not_finite(find_not_finite(model.state_dict()))

    model.generation_config = get_generation_config(tokenizer, vocab_size, text_config.vocab_size)
    if end not in (None, tokenizer.eos_token_id):
        model.generation_config.eos_token_id = [end, tokenizer.eos_token_id]
    stride = model.model.vision_tower.high_res_tower.stride
    dropped = Counter((vision_dropped | high_res_dropped).values())
    notes = [f"dropped {number} tensors: {reason}" for reason, number in dropped.items()]
    notes += [f"new: {name}" for name in sorted(new)]
    notes.append(f"prompt format: {prompt_format}")
    processor = get_processor(config, tokenizer, size, stride)
    processor.chat_template = template
    check_template(processor)
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    print_summary(folder, model, notes)


def main() -> None:
    parser = argparse.ArgumentParser(description="Assembles an untrained LLaVA-HR, the start of training stage 1.")
    parser.add_argument("--vision_tower", required=True, help="CLIP or SigLIP model: folder or Hub id")
    parser.add_argument("--high_res_tower", required=True, help="CNN: open_clip's or timm's folder, file or Hub id")
    parser.add_argument("--language_model", required=True, help="causal language model: folder, Hub id or .gguf file")
    parser.add_argument("--output", required=True, help="new folder")
    parser.add_argument("--high_res_architecture", help="timm's name of the CNN, if its folder does not have it")
    parser.add_argument("--size", type=int, default=384, help="side of the image in pixels")
    parser.add_argument("--adapters", action="store_true", help="insert MR-Adapters, without effect until trained")
    parser.add_argument("--chat_template", help="vicuna_v1, chatml or a Jinja file; default: what fits the tokenizer")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: the widest of the parts")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    assemble(**vars(arguments))


if __name__ == "__main__":
    run_command(main)
