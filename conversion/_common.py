# SPDX-License-Identifier: Apache-2.0
"""What the converter and `conversion.assemble` share: finding, reading, renaming and checking weights, saving."""

import json
import os
import pickle
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.convnext import ConvNeXt
from transformers import (
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
    logging,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration, LlavaHrImageProcessor, LlavaHrProcessor


WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIMM_PREFIX = "model.vision_tower.high_res_tower.timm_model."
IMAGE_TOKEN = "<image>"
MAX_LISTED = 12


# What readers of weights raise
UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError)


class ConversionError(ValueError):
    """Something is wrong with what the user gave; the commands print it without a traceback."""


class Key(NamedTuple):
    """
    One row of a table of key names.

    Args:
        pattern (`str`): Regular expression for the whole name in the source.
        name (`str`, *optional*): Template of the name in [`LlavaHrForConditionalGeneration`]; `None` if the tensor is
            deliberately dropped.
        reason (`str`): Why a tensor is dropped.
        change (`Callable`, *optional*): What is done to the tensor.
    """

    pattern: str
    name: str | None = None
    reason: str = ""
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


class Entry(NamedTuple):
    """A tensor that will be used: the file and name it has, the name it gets, how it changes, its shape and dtype."""

    file: Path
    source: str
    name: str
    change: Callable[[torch.Tensor], torch.Tensor] | None
    meta: torch.Tensor


def pointwise_to_linear(weight: torch.Tensor) -> torch.Tensor:
    """`(out, in, 1, 1)` of a 1x1 convolution -> `(out, in)`; any other shape stays, and fails the check of shapes."""
    return weight.flatten(1) if weight.shape[2:] == (1, 1) else weight


def without_class_row(positions: torch.Tensor) -> torch.Tensor:
    """`(1 + patches, d)` -> `(patches, d)`: the model has no class token."""
    return positions[1:] if positions.ndim == 2 else positions


# A ViT of transformers
POSITION_KEY = Key(
    r"embeddings\.position_embedding\.weight",
    "model.vision_tower.embeddings.position_embedding.weight",
    change=without_class_row,
)
VIT_KEYS = (
    Key(r"embeddings\.patch_embedding\.(weight|bias)", r"model.vision_tower.embeddings.patch_embedding.\1"),
    Key(r"pre_layrnorm\.(weight|bias)", r"model.vision_tower.pre_layernorm.\1"),
    Key(r"encoder\.(layers\.\d+\..+)", r"model.vision_tower.\1"),
    Key(r"embeddings\.class_embedding", reason="the class token is not used"),
    Key(r"embeddings\.position_ids", reason="computed"),
    Key(r"post_layernorm\.(weight|bias)", reason="the features are taken before the last norm"),
)


def find_source(source: str, option: str, weights: Sequence[str] = ()) -> Path:
    """
    Local path of a folder, a file, or a repository of the Hub, which is downloaded as far as needed.

    Args:
        source (`str`): Path or Hub id.
        option (`str`): Command-line option that it came from, for messages.
        weights (`Sequence[str]`): Names of weight files (or indices of shards) in order of preference; of a
            repository the first that exists is downloaded, beside configuration and tokenizer.

    Returns:
        `Path`: An existing folder or file.

    Raises:
        ConversionError: If there is neither such a path nor such a repository, or no access to it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"]))
        for name in weights:
            if name.endswith(".index.json") and (folder / name).is_file():
                snapshot_download(source, allow_patterns=sorted(set(_read_weight_map(folder / name).values())))
                break
            try:
                hf_hub_download(source, name)
                break
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
        return folder
    except HFValidationError:
        raise ConversionError(f"--{option}: {source!r} is no folder or file here, and no valid Hub id.") from None
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"--{option}: {source!r} is no folder or file here, and as a Hub repository it does not exist, is private "
            f"(log in with `hf auth login`) or cannot be reached ({type(error).__name__})."
        ) from None


def find_weight_files(source: Path, names: Sequence[str] = WEIGHT_FILES) -> list[Path]:
    """
    The files that hold the weights of a checkpoint.

    Args:
        source (`Path`): A folder, or the path of the one weight file.
        names (`Sequence[str]`): Weight files or indices of shards in order of preference.

    Returns:
        `list[Path]`: Existing files; empty if the folder has none of `names`.

    Raises:
        ConversionError: If an index is damaged, names a file outside the folder, or a shard is missing.
    """
    if source.is_file():
        return [source]
    found = next((source / name for name in names if (source / name).is_file()), None)
    if found is None or not found.name.endswith(".index.json"):
        return [] if found is None else [found]
    shards = sorted(set(_read_weight_map(found).values()))
    missing = [shard for shard in shards if not (source / shard).is_file()]
    if missing:
        raise ConversionError(f"{found} names shards that are not there: {_listed(missing)}. Download them again.")
    return [source / shard for shard in shards]


def read_json(path: Path) -> dict:
    """
    Reads a JSON object.

    Raises:
        ConversionError: If the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing.") from None
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ConversionError(f"{index} must have a `weight_map` from tensor names to file names.")
    outside = sorted({shard for shard in weight_map.values() if re.fullmatch(r"\w[\w.-]*", shard) is None})
    if outside:
        raise ConversionError(f"{index} must name files in its own folder, but names {_listed(map(repr, outside))}.")
    return weight_map


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """
    Reads a weight file. The tensors are mapped into memory, so their data is read only when it is used.

    Args:
        file (`Path`): A safetensors file, or a state dict saved by `torch.save`.

    Returns:
        `dict[str, torch.Tensor]`: The tensors by name, on the CPU.

    Raises:
        ConversionError: If the file is damaged, holds anything but named tensors, or would run code when read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        is_zip = zipfile.is_zipfile(file)
        if is_zip and _is_compressed(file):
            raise ConversionError(
                f"{file} is a compressed archive, and `torch.save` writes none: its numbers would be read wrong. Take "
                "the original file."
            )
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except ConversionError:
        raise
    except UNREADABLE as error:
        raise ConversionError(f"{file} cannot be read as plain tensors: {explain_unreadable(error)}.") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{file} must hold dense tensors by name, but holds a {type(content).__name__}.")
    odd = [f"{name!r} is a {type(value).__name__}" for name, value in content.items() if not _is_plain(name, value)]
    if odd:
        raise ConversionError(f"{file} must hold dense tensors by name and nothing else, but {_listed(odd)}.")
    return content


def explain_unreadable(error: Exception) -> str:
    """What it means that weights cannot be read. torch buries what it refuses in advice to switch the check off."""
    refused = re.search(r"(?:Unsupported|GLOBAL|Trying to)[^\n]*", str(error))
    reason = refused[0] if refused else type(error).__name__
    return f"it is damaged, or a pickle that would run code, which is refused ({reason})"


def _is_compressed(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _is_plain(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def plan(files: Sequence[Path], keys: Sequence[Key]) -> tuple[list[Entry], dict[str, str], list[str]]:
    """
    Applies a table of key names to the tensors of a checkpoint, without reading their data.

    Args:
        files (`Sequence[Path]`): Weight files.
        keys (`Sequence[Key]`): The table; the first row that fits counts.

    Returns:
        `tuple`: The tensors that will be used; those dropped, with the reason; and what is wrong: names that no row
        fits, names that come twice, dtypes other than floating point.
    """
    entries, dropped, faults, seen = [], {}, [], set()
    for file in files:
        for source, tensor in read_tensors(file).items():
            key, name = _look_up(source, keys)
            if key is None:
                faults.append(f"{source}: unexpected")
            elif source in seen or (name is not None and name in seen):
                faults.append(f"{source}: comes twice")
            elif name is None:
                dropped[source] = key.reason
            elif tensor.dtype not in (*DTYPES.values(), torch.float64):
                faults.append(f"{source}: dtype {tensor.dtype}, expected floating point")
            else:
                meta = tensor.to("meta")
                entries.append(Entry(file, source, name, key.change, key.change(meta) if key.change else meta))
            seen.update({source, name})
    return entries, dropped, faults


def _look_up(source: str, keys: Sequence[Key]) -> tuple[Key | None, str | None]:
    for key in keys:
        if match := re.fullmatch(key.pattern, source):
            return key, None if key.name is None else match.expand(key.name)
    return None, None


def rename(tensors: dict[str, torch.Tensor], keys: Sequence[Key]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Applies a table of key names to tensors at hand.

    Args:
        tensors (`dict[str, torch.Tensor]`): Tensors by their names in the source.
        keys (`Sequence[Key]`): The table; the first row that fits counts.

    Returns:
        `tuple`: The tensors by the model's names, a name that no row fits unchanged; those dropped, with the reason.
    """
    renamed, dropped = {}, {}
    for source, tensor in tensors.items():
        key, name = _look_up(source, keys)
        if key is not None and name is None:
            dropped[source] = key.reason
        else:
            renamed[name or source] = key.change(tensor) if key is not None and key.change else tensor
    return renamed, dropped


def check_loading(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple]) -> None:
    """
    Raises:
        ConversionError: If `from_pretrained` reports a name that it should not; all three are its loading info.
    """
    faults = [f"{name}: missing" for name in sorted(missing)]
    faults += [f"{name}: unexpected" for name in sorted(unexpected)]
    faults += [f"{name}: shape {[*found]}, expected {[*wanted]}" for name, found, wanted in sorted(mismatched)]
    _raise(faults)


def check(entries: Sequence[Entry], expected: dict[str, torch.Size], faults: Sequence[str]) -> None:
    """
    Compares what a checkpoint has with what the model needs.

    Args:
        entries (`Sequence[Entry]`): The tensors that will be used.
        expected (`dict[str, torch.Size]`): Shapes that the model needs, by the model's names.
        faults (`Sequence[str]`): What was found wrong before.

    Raises:
        ConversionError: If a tensor is missing, unexpected, mis-shaped, or comes twice; names them.
    """
    faults = list(faults)
    for entry in entries:
        if entry.name not in expected:
            faults.append(f"{entry.source}: unexpected ({entry.name})")
        elif entry.meta.shape != expected[entry.name]:
            faults.append(f"{entry.source}: shape {[*entry.meta.shape]}, expected {[*expected[entry.name]]}")
    missing = set(expected) - {entry.name for entry in entries}
    faults += [f"{name}: missing" for name in expected if name in missing]
    _raise(faults)


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """
    Looks through the data of all tensors.

    Args:
        tensors (`dict[str, torch.Tensor]`): Weights by name.

    Raises:
        ConversionError: If a value is infinite or no number; names the tensors.
    """
    broken = []
    for name, tensor in tensors.items():
        # needs no memory, and both are NaN where any value is
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            broken.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
    if broken:
        raise ConversionError(
            f"Values that are infinite or no numbers in {len(broken)} tensors: {_listed(broken)}. The checkpoint is "
            "damaged, or its weights are too large for float16: name another --dtype then."
        )


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConversionError(f"The weights do not fit the model, {len(faults)} faults: {_listed(faults, '; ')}.")


def _listed(items: Iterable[str], separator: str = ", ") -> str:
    items = list(items)
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return separator.join(items[:MAX_LISTED] + more)


def infer_timm_config(architecture: str, shapes: dict[str, torch.Size]) -> TimmWrapperConfig:
    """
    Configuration of the high-resolution pathway. The depths and widths of a ConvNeXt are read from its tensors.

    Args:
        architecture (`str`): A name of timm's, without the tag of its weights.
        shapes (`dict[str, torch.Size]`): Shapes of the tensors, by timm's names.

    Returns:
        `TimmWrapperConfig`: With `model_args` only where the tensors differ from timm's definition.

    Raises:
        ConversionError: If timm does not know the architecture.
    """
    if not timm.is_model(architecture):
        raise ConversionError(f"timm {timm.__version__} does not know the architecture {architecture!r}.")
    with torch.device("meta"):
        definition = timm.create_model(architecture, num_classes=0)
    model_args = None
    widths = {int(m[1]): s[0] for n, s in shapes.items() if (m := re.fullmatch(r"stages\.(\d+)\..*conv_dw\.bias", n))}
    if isinstance(definition, ConvNeXt) and len(widths) == len(definition.stages):
        widths = dict(sorted(widths.items()))  # shards need not come in the order of the stages
        depths = [count(shapes, rf"stages\.{stage}\.blocks\.(\d+)\..+") for stage in widths]
        model_args = {"depths": depths, "dims": list(widths.values())}
        if model_args == {
            "depths": [len(stage.blocks) for stage in definition.stages],
            "dims": [stage["num_chs"] for stage in definition.feature_info],
        }:
            model_args = None
    return TimmWrapperConfig(architecture=architecture, do_pooling=False, model_args=model_args)


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group takes among `names`; 0 if none fits."""
    return max((int(match[1]) + 1 for name in names if (match := re.fullmatch(pattern, name))), default=0)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """
    Loads a sentencepiece Llama tokenizer so that it can be saved and loaded again without a change.

    Args:
        folder (`Path`): Has `tokenizer.model` and `tokenizer_config.json`.

    Returns:
        `PreTrainedTokenizerFast`: Defined by its `tokenizer.json` alone. A [`LlamaTokenizer`] would lose `legacy` when
        saved and then tokenize text after `</s>` in another way.

    Raises:
        ConversionError: If a file is missing.
    """
    if not (folder / "tokenizer.model").is_file():
        raise ConversionError(f"{folder} has no tokenizer.model, the sentencepiece model of its Llama tokenizer.")
    # `legacy` was true for tokenizers that do not say; LlamaTokenizer now takes false for granted
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
        tokenizer (`PreTrainedTokenizerBase`): Is changed: the token is added, and one for padding if there is none.
        vocab_size (`int`): Rows of the embeddings.

    Returns:
        `int`: Rows that the embeddings need: as before if the new id lies within them, otherwise the next multiple of
        64 (whole tiles for matrix multiplications).
    """
    tokenizer.add_tokens(IMAGE_TOKEN, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return vocab_size if len(tokenizer) <= vocab_size else -(-len(tokenizer) // 64) * 64


def extend_embeddings(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """
    `(vocab_size, D)` -> `(rows, D)`. A new row is the mean of the others: in the output layer its score is then the
    mean score, which never is the highest and hardly adds to the softmax.
    """
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])


def get_generation_config(tokenizer: PreTrainedTokenizerBase, old_size: int, new_size: int) -> GenerationConfig:
    """Ends at the tokenizer's end token and never writes the image token or a row that stands for no token."""
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
    The processor of a model with the released prompt form.

    Args:
        config ([`LlavaHrConfig`]): The model's configuration.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, with the image token.
        size (`int`): Side of the image in pixels.
        stride (`int`): Pixels of the image per position of the high-resolution feature map.
        image_aspect_ratio (`str`): `"pad"` or `"crop"`.

    Raises:
        ConversionError: If `size` does not fit the towers.
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
        raise ConversionError(f"An image side of {size} pixels does not fit: {error}") from None
    return LlavaHrProcessor(image_processor, tokenizer)


def check_output(output: Path) -> None:
    """
    Raises:
        ConversionError: If `output` is a file, a folder that is not empty, or a mount point.
    """
    if os.path.ismount(output):
        raise ConversionError(f"--output: {output} is where a volume is mounted. Name a new folder inside it.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(
            f"--output: {output} exists and is not an empty folder. Name another or remove it. If this command "
            "wrote it before, it is complete: nothing is there until all is."
        )


def is_write_failure(error: Exception, folder: Path) -> bool:
    """
    Whether an error says that something in a folder could not be written.

    Args:
        error (`Exception`): The error. Those of torch, safetensors and tokenizers are no `OSError`.
        folder (`Path`): The folder.
    """
    if isinstance(error, OSError):
        name = error.filename2 or error.filename  # of a copy, or of the one file
        is_here = not isinstance(name, str) or Path(name).is_relative_to(folder.parent)
        return error.errno is not None and is_here
    return re.search(r"\(os error \d+\)|PytorchStreamWriter|inline_container", str(error)) is not None


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """
    A folder that appears only when it is complete: a hidden folder beside it is filled and then renamed. What an
    interrupted run has left there is removed.

    Args:
        output (`Path`): Where the folder will be.

    Raises:
        ConversionError: If `output` is there already or cannot be written.
    """
    output = output.resolve()
    check_output(output)
    partial = output.with_name(f".{output.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
        partial.rename(output)
    except Exception as error:
        if not is_write_failure(error, partial):
            raise
        raise ConversionError(
            f"--output: {output} could not be written: {error}. Nothing is there. Make room, or name another place."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(
    model: LlavaHrForConditionalGeneration, processor: LlavaHrProcessor, output: Path, notes: Sequence[str]
) -> None:
    """Saves model and processor and prints a summary: size, `notes`, how to load."""
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"{output}: {model.num_parameters() / 1e6:,.1f} M parameters, {model.dtype}")
    print(*notes, sep="\n")
    print(f'Load it with AutoModelForImageTextToText.from_pretrained("{output}") and AutoProcessor.')


def run(command: Callable[..., None], options: dict) -> None:
    """Runs a command; what the user can put right ends it with one message and exit status 1."""
    logging.set_verbosity_error()
    # so that a terminated run removes what it has half written, as an interrupted one does
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        command(**options)
    except (ConversionError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written")
