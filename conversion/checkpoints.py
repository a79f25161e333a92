# SPDX-License-Identifier: Apache-2.0
"""Finds, reads and validates checkpoints."""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from conversion.keys import Key, look_up


WEIGHT_FILES = (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_LISTED = 12
# Exceptions that readers of weights raise
UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError)


class Entry(NamedTuple):
    """A tensor that is used: its file and name there, its name in the model, its change, its shape and dtype."""

    file: Path
    source: str
    name: str
    change: Callable[[torch.Tensor], torch.Tensor] | None
    meta: torch.Tensor


class Plan(NamedTuple):
    """
    A checkpoint after applying a table of key names.

    Args:
        entries (`list[Entry]`): The tensors that are used.
        dropped (`dict[str, str]`): Those that are not, with the reason.
        faults (`list[str]`): Names that no row matches, names that occur twice, dtypes other than floating point.
    """

    entries: list[Entry]
    dropped: dict[str, str]
    faults: list[str]


def find_source(source: str, option: str, weights: Sequence[str] = ()) -> Path:
    """
    Local path of a folder, a file, or a repository of the Hub, of which only the needed files are downloaded.

    Args:
        source (`str`): Path or Hub id.
        option (`str`): Command-line option with this value, for messages.
        weights (`Sequence[str]`): Names of weight files (or indices of shards) in order of preference; the first that
            a repository has is downloaded, beside configuration and tokenizer.

    Returns:
        `Path`: An existing folder or file.

    Raises:
        ValueError: If there is neither such a path nor such a repository, or no access to it.
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
        raise ValueError(f"--{option}: {source!r} is not a folder or file here, and not a valid Hub id.") from None
    except (HTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"--{option}: {source!r} is not a folder or file here, and as a Hub repository it does not exist, is "
            f"private (log in with `hf auth login`) or cannot be reached ({type(error).__name__})."
        ) from None


def find_weight_files(source: Path, names: Sequence[str] = WEIGHT_FILES) -> list[Path]:
    """
    The files that hold the weights of a checkpoint.

    Args:
        source (`Path`): A folder, or the path of a single weight file.
        names (`Sequence[str]`): Weight files or indices of shards in order of preference.

    Returns:
        `list[Path]`: Existing files; empty if the folder has none of `names`.

    Raises:
        ValueError: If an index is damaged, names a file outside the folder, or a shard is missing.
    """
    if source.is_file():
        return [source]
    found = next((source / name for name in names if (source / name).is_file()), None)
    if found is None or not found.name.endswith(".index.json"):
        return [] if found is None else [found]
    shards = sorted(set(_read_weight_map(found).values()))
    missing = [shard for shard in shards if not (source / shard).is_file()]
    if missing:
        raise ValueError(f"{found} names shards that do not exist: {_listed(missing)}. Download them again.")
    return [source / shard for shard in shards]


def read_json(path: Path) -> dict:
    """
    Reads a JSON object.

    Raises:
        ValueError: If the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} must have a `weight_map` from tensor names to file names.")
    outside = sorted({shard for shard in weight_map.values() if re.fullmatch(r"\w[\w.-]*", shard) is None})
    if outside:
        raise ValueError(f"{index} must name files in its own folder, but names {_listed(map(repr, outside))}.")
    return weight_map


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """
    Reads a weight file. The tensors are mapped into memory, so their data is read only when it is used.

    Args:
        file (`Path`): A safetensors file, or a state dict saved by `torch.save`.

    Returns:
        `dict[str, torch.Tensor]`: The tensors by name, on the CPU.

    Raises:
        ValueError: If the file is damaged, holds anything but named tensors, or would run code when read.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        is_zip = zipfile.is_zipfile(file)
        is_compressed = is_zip and _is_compressed(file)
        content = {} if is_compressed else torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as plain tensors: {explain_unreadable(error)}.") from None
    if is_compressed:
        raise ValueError(
            f"{file} is a compressed archive, which `torch.save` does not write: its values would be read wrong. Use "
            "the original file."
        )
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold dense tensors by name, but holds a {type(content).__name__}.")
    odd = [f"{name!r} is a {type(value).__name__}" for name, value in content.items() if not _is_plain(name, value)]
    if odd:
        raise ValueError(f"{file} must hold dense tensors by name and nothing else, but {_listed(odd)}.")
    return content


def explain_unreadable(error: Exception) -> str:
    """Why weights cannot be read. Reduces torch's `weights_only` error to the line naming the refused object."""
    refused = re.search(r"(?:Unsupported|GLOBAL|Trying to)[^\n]*", str(error))
    reason = refused[0] if refused else type(error).__name__
    return f"it is damaged, or a pickle that would run code, which is refused ({reason})"


def _is_compressed(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())


def _is_plain(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def plan(files: Sequence[Path], keys: Sequence[Key]) -> Plan:
    """Applies a table of key names to the tensors of files, without reading their data; the first match counts."""
    entries, dropped, faults, seen = [], {}, [], set()
    for file in files:
        for source, tensor in read_tensors(file).items():
            key, name = look_up(source, keys)
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
    return Plan(entries, dropped, faults)


def check_entries(entries: Sequence[Entry], expected: dict[str, torch.Size], faults: Sequence[str]) -> None:
    """
    Compares the tensors of a checkpoint with those that the model needs.

    Args:
        entries (`Sequence[Entry]`): The tensors that are used.
        expected (`dict[str, torch.Size]`): Shapes that the model needs, by the model's names.
        faults (`Sequence[str]`): Faults found before.

    Raises:
        ValueError: If a tensor is missing, unexpected, mis-shaped, or occurs twice; names them.
    """
    faults = list(faults)
    for entry in entries:
        if entry.name not in expected:
            faults.append(f"{entry.source}: unexpected ({entry.name})")
        elif entry.meta.shape != expected[entry.name]:
            faults.append(f"{entry.source}: shape {[*entry.meta.shape]}, expected {[*expected[entry.name]]}")
    missing = set(expected) - {entry.name for entry in entries}
    faults += [f"{name}: missing" for name in expected if name in missing]
    raise_faults(faults)


def find_not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names and dtypes of the tensors that have a value which is infinite or not a number."""
    return [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        # needs no memory; both are NaN if any value is
        if tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all()
    ]


def raise_not_finite(broken: Sequence[str]) -> None:
    """
    Raises:
        ValueError: If [`find_not_finite`] found tensors; lists them.
    """
    if broken:
        raise ValueError(
            f"Values that are infinite or not a number in {len(broken)} tensors: {_listed(broken)}. The checkpoint is "
            "damaged, or its weights are too large for float16: use another --dtype then."
        )


def raise_faults(faults: list[str]) -> None:
    """
    Raises:
        ValueError: If there are faults; lists them.
    """
    if faults:
        raise ValueError(f"The weights do not fit the model, {len(faults)} faults: {_listed(faults, '; ')}.")


def _listed(items: Iterable[str], separator: str = ", ") -> str:
    items = list(items)
    more = [f"and {len(items) - MAX_LISTED} more"] if len(items) > MAX_LISTED else []
    return separator.join(items[:MAX_LISTED] + more)
