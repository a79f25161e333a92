# SPDX-License-Identifier: Apache-2.0
"""The parts of a model besides its weights: CNN configuration, tokenizer, embeddings, processor, generation."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import timm
import torch
from timm.models.convnext import ConvNeXt
from transformers import (
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
)

from conversion.checkpoints import read_json
from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, LlavaHrImageProcessor, LlavaHrProcessor
from modeling_llava_hr.processing_llava_hr import IMAGE_TOKEN


def infer_timm_config(architecture: str, shapes: dict[str, torch.Size]) -> TimmWrapperConfig:
    """
    Configuration of the high-resolution pathway. The depths and widths of a ConvNeXt are read from its tensors.

    Args:
        architecture (`str`): timm's name, without the tag of the weights.
        shapes (`dict[str, torch.Size]`): Shapes of the tensors, by timm's names.

    Returns:
        `TimmWrapperConfig`: With `model_args` only where the tensors differ from timm's definition.

    Raises:
        ValueError: If timm does not know the architecture.
    """
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} does not know the architecture {architecture!r}.")
    with torch.device("meta"):
        definition = timm.create_model(architecture, num_classes=0)
    model_args = None
    widths = {int(m[1]): s[0] for n, s in shapes.items() if (m := re.fullmatch(r"stages\.(\d+)\..*conv_dw\.bias", n))}
    if isinstance(definition, ConvNeXt) and len(widths) == len(definition.stages):
        widths = dict(sorted(widths.items()))  # shards may not be in the order of the stages
        depths = [count(shapes, rf"stages\.{stage}\.blocks\.(\d+)\..+") for stage in widths]
        model_args = {"depths": depths, "dims": list(widths.values())}
        if model_args == {
            "depths": [len(stage.blocks) for stage in definition.stages],
            "dims": [stage["num_chs"] for stage in definition.feature_info],
        }:
            model_args = None
    return TimmWrapperConfig(architecture=architecture, do_pooling=False, model_args=model_args)


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number in `pattern`'s group among `names`; 0 if none matches."""
    return max((int(match[1]) + 1 for name in names if (match := re.fullmatch(pattern, name))), default=0)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """
    Loads a sentencepiece Llama tokenizer so that saving and loading it does not change it.

    Args:
        folder (`Path`): Has `tokenizer.model` and `tokenizer_config.json`.

    Returns:
        `PreTrainedTokenizerFast`: Defined by its `tokenizer.json` alone. A [`LlamaTokenizer`] would lose `legacy` when
        saved and then tokenize text after `</s>` differently.

    Raises:
        ValueError: If a file is missing.
    """
    if not (folder / "tokenizer.model").is_file():
        raise ValueError(f"{folder} has no tokenizer.model, the sentencepiece model of its Llama tokenizer.")
    # `legacy` was true where the config lacks it; LlamaTokenizer now defaults to false
    legacy = read_json(folder / "tokenizer_config.json").get("legacy")
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=True if legacy is None else legacy)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.unk_token,
        model_max_length=tokenizer.model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def add_image_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """
    Gives the image placeholder a token of its own.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Changed in place: gets the token, and a padding token if it has none.
        vocab_size (`int`): Rows of the embeddings.

    Returns:
        `int`: Rows that the embeddings need: unchanged if the new id fits, otherwise the next multiple of 64 (full
        tiles for matrix multiplications).
    """
    tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return vocab_size if len(tokenizer) <= vocab_size else -(-len(tokenizer) // 64) * 64


def extend_embeddings(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """
    `(vocab_size, D)` -> `(rows, D)`. A new row is the mean of the others: in the output layer its score is then the
    mean score, which is never the highest and hardly adds to the softmax.
    """
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])


def get_generation_config(tokenizer: PreTrainedTokenizerBase, old_size: int, new_size: int) -> GenerationConfig:
    """Ends at the tokenizer's end token; never generates the image token or rows of the embeddings without a token."""
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted({image_token_id, *range(old_size, new_size)}),
    )


def get_processor(
    config: LlavaHrConfig,
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    stride: int,
    image_aspect_ratio: str = "pad",
) -> LlavaHrProcessor:
    """
    The processor of a model with the released prompt format.

    Args:
        config ([`LlavaHrConfig`]): The model's configuration.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, with the image token.
        size (`int`): Side of the image in pixels.
        stride (`int`): Pixels of the image per position of the high-resolution feature map.
        image_aspect_ratio (`str`): `"pad"` or `"crop"`.

    Raises:
        ValueError: If `size` does not fit the towers.
    """
    try:
        image_processor = LlavaHrImageProcessor(
            size={"height": size, "width": size},
            low_res_size=config.low_res_size,
            min_low_res_size=config.vision_config.image_size,
            patch_size=config.vision_config.patch_size,
            high_res_stride=stride,
            image_aspect_ratio=image_aspect_ratio,
        )
    except ValueError as error:
        raise ValueError(f"An image side of {size} pixels does not fit: {error}") from None
    return LlavaHrProcessor(image_processor, tokenizer)


def print_summary(output: Path, model: LlavaHrForConditionalGeneration, notes: Sequence[str]) -> None:
    """Prints the size of a saved model, notes, and how to load it."""
    print(f"{output}: {model.num_parameters() / 1e6:,.1f} M parameters, {model.dtype}")
    print(*notes, sep="\n")
    print(f'Load it with AutoModelForImageTextToText.from_pretrained("{output}") and AutoProcessor.')
