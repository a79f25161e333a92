# SPDX-License-Identifier: Apache-2.0
"""Helpers of the commands. The files that are saved with a model do not import it."""

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import BitsAndBytesConfig


OUT_OF_MEMORY_ADVICE = (
    "Out of memory. Use, easiest first: fewer images or prompts at a time; a smaller `size` of the processor (also "
    "fewer tokens per image); a smaller `max_new_tokens` or fewer beams; bfloat16 or 4 bits."
)


def run_command(main: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
    """
    Runs a command and ends the process: with status 0 (or the status that `main` returns), with 1 and one line on
    stderr for an error that the user can fix, with 130 or 143 if interrupted or terminated. A terminated command
    cleans up as an interrupted one does.

    Args:
        main (`Callable`): The command. Its `ValueError`, `OSError`, `ImportError` and `torch.OutOfMemoryError` are
            the user's to fix; others show their traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main(*args, **kwargs))
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {OUT_OF_MEMORY_ADVICE} ({error})")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def get_4bit_config(dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """NF4 as QLoRA uses it: double quantization, arithmetic in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_loopback(host: str) -> bool:
    """Whether a host name or address, with or without the brackets of IPv6, is this machine's loopback interface."""
    return host in ("127.0.0.1", "localhost", "::1", "[::1]")


def check_new_folder(output: str | os.PathLike, option: str = "--output") -> None:
    """
    Raises:
        ValueError: If `output` is a file, a folder that is not empty, or a mount point.
    """
    output = Path(output)
    if os.path.ismount(output):
        raise ValueError(f"{option}: {output} is a mount point. Name a new folder inside it.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"{option}: {output} exists and is not an empty folder. Name another or remove it. If this command wrote "
            "it before, it is complete: folders are written atomically."
        )


@contextmanager
def new_folder(output: str | os.PathLike, option: str = "--output") -> Iterator[Path]:
    """
    Writes a folder atomically: yields a hidden folder beside it, which is renamed once everything is on disk. Removes
    the hidden folder of an interrupted run.

    Args:
        output (`str` or `os.PathLike`): The folder; it must not exist, or be empty.
        option (`str`): Name of the option or argument that names the folder, for messages.

    Raises:
        ValueError: If `output` exists already or cannot be written.
    """
    output = Path(output).resolve()
    check_new_folder(output, option)
    partial = _get_partial(output)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        follow_umask(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        partial.rename(output)
    except Exception as error:
        if not is_write_failure(error, partial):
            raise
        raise ValueError(
            f"{option}: {output} could not be written: {error}. Nothing was kept. Make room, or name another place."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_file(output: str | os.PathLike) -> Iterator[Path]:
    """
    Writes or replaces a file atomically: yields the path of a hidden file beside it, which is renamed once it is on
    disk. Creates its parent folder if needed.

    Args:
        output (`str` or `os.PathLike`): The file.

    Raises:
        OSError: If it cannot be written; names it.
    """
    output = Path(output)
    partial = _get_partial(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # follows the umask, unlike safetensors
        yield partial
        partial.chmod(mode)
        _sync(partial)
        partial.replace(output)
    except Exception as error:
        if not is_write_failure(error, partial):
            raise
        raise OSError(f"{output} could not be written: {error}. Make room, or name another place.") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_text(file: Path, text: str) -> None:
    """Writes or replaces a text file atomically, and creates its folder."""
    with new_file(file) as partial_file:
        partial_file.write_text(text, encoding="utf-8")


def follow_umask(folder: Path) -> None:
    """
    Gives the files of a new folder the permissions that the umask asks for. safetensors writes files that only their
    owner can read, and a server that runs as another user could not load them.
    """
    for file in folder.rglob("*"):
        # not the files of others: `training.lora` links to the weights of the base
        if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
            file.chmod(folder.stat().st_mode & 0o666)


def _get_partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.incomplete")


def _sync(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def is_write_failure(error: Exception, folder: Path) -> bool:
    """
    Whether an error says that something in a folder could not be written.

    Args:
        error (`Exception`): The error. Those of torch, safetensors and tokenizers are not an `OSError`.
        folder (`Path`): The folder.
    """
    if isinstance(error, OSError):
        name = error.filename2 or error.filename  # of a copy, or of the one file
        is_here = not isinstance(name, str) or Path(name).is_relative_to(folder.parent)
        return error.errno is not None and is_here
    return re.search(r"\(os error \d+\)|PytorchStreamWriter|inline_container", str(error)) is not None
