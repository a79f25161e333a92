# SPDX-License-Identifier: Apache-2.0
"""Rows of every supported format (LLaVA's, `messages`, `prompt` and `completion`, webdataset's) as chats, checked."""

import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from modeling_llava_hr import LlavaHrImageProcessorPil
from modeling_llava_hr.chat_templates_llava_hr import is_unicode
from modeling_llava_hr.processing_llava_hr import IMAGE_TOKEN


ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Keys of a part that may hold its image; transformers' `url` and `base64` are refused
IMAGE_KEYS = ("image", "path", "url", "base64", "bytes")
TYPE_COLUMNS = ("question_type", "type", "kind", "category")
IMAGE_PART: dict[str, str | None] = {"type": "image", "text": None}
# Columns of images in a webdataset, by suffix
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
# Makes the smallest possible views, to test whether an image can be processed
IMAGE_READER = LlavaHrImageProcessorPil(size=32, low_res_size=14)
# Longest path on Linux in characters
MAX_NAME = 4096
# Last bytes of complete files. Images with another end, or of another format, are decoded.
FILE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
BETWEEN_ROWS = re.compile(r"[\[\], \t\r\n\ufeff]*")


def read_rows(path: str | os.PathLike, chunk_size: int = 2**24) -> Iterator[tuple[Any, int]]:
    """
    Reads the rows of a JSON array or of JSON lines (`.gz` or not) `chunk_size` characters at a time, so that a file of
    gigabytes needs little memory. Yields each row and the position of the character after it. A `ValueError` says
    where the file is not JSON.
    """
    decode, buffer, offset, end, depth = json.JSONDecoder().raw_decode, "", 0, False, 0
    opener: Any = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            while not end:
                chunk, position = file.read(chunk_size), 0
                buffer, end = buffer + chunk, not chunk
                while True:
                    gap = BETWEEN_ROWS.match(buffer, position)
                    if gap.end() == len(buffer):
                        break
                    try:
                        row, position = decode(buffer, gap.end())
                    except json.JSONDecodeError:
                        if end:
                            raise
                        break  # the row may continue in the next chunk
                    depth += gap.group().count("[") - gap.group().count("]")
                    yield row, offset + position
                buffer, offset = buffer[position:], offset + position
    except json.JSONDecodeError as error:
        place = f"{error.msg} at character {offset + error.pos}"
        raise ValueError(f"{path} is neither a JSON array nor JSON lines: {place}.") from None
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not UTF-8 text after character {offset}: {error}.") from error
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} has an unreadable row at character {offset + gap.end()}: {error}.") from error
    if depth + buffer.count("[") - buffer.count("]"):
        raise ValueError(f"{path} is an array whose brackets do not match. Was it downloaded completely?")


def convert_row(row: Any, folder: str = "", plain: bool = False) -> dict[str, Any]:
    """
    Converts a row of any supported format and finds what is wrong with it, except for missing and broken files.

    Args:
        row: The row. Chats are in `conversations` (turns with `from` and `value` or `role` and `content`),
            `messages`, or `prompt` and `completion`; images in `images` or `image` (a name, a list, `{"bytes",
            "path"}` or an image), in the order of their `<image>` tags or parts, or in the parts themselves.
        folder (`str`, *optional*): Folder that relative image names start from.
        plain (`bool`, *optional*, defaults to `False`): Whether it must be one image, one question, one answer.

    Returns:
        `dict`: `id`; `type` of the question; `messages` with parts of text or image; `images`, each a `path`, or the
        `keys` that lead to it in the row; `num_answers`, how many of the last answers are learned (all, or those of
        `completion`); `num_bytes` of all texts; and `problems`.
    """
    chat: dict[str, Any] = {
        "id": None,
        "type": None,
        "messages": [],
        "images": [],
        "num_answers": 0,
        "num_bytes": 0,
        "problems": [],
    }
    try:
        _fill(chat, row, folder, plain)
    except ValueError as error:
        chat |= {"messages": [], "images": [], "num_bytes": 0, "problems": [str(error)]}
    return chat


def _fill(chat: dict[str, Any], row: Any, folder: str, plain: bool) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"it must be an object with a chat, but is {row!r:.80}")
    if "__key__" in row:  # webdataset: one column per file
        files = {name: value for name, value in row.items() if name.lower() in IMAGE_SUFFIXES}
        content = row["json"] if isinstance(row.get("json"), dict) else {n: row[n] for n in row if n[:2] != "__"}
        row = {"id": row["__key__"], **content, **({"images": files} if files else {})}
    chat["id"] = None if row.get("id") is None else str(row["id"]).encode(errors="replace").decode()
    chat["type"] = next((row[name] for name in TYPE_COLUMNS if isinstance(row.get(name), str)), None)
    if others := [name for name in ("video", "videos", "audio", "audios") if row.get(name)]:
        raise ValueError(
            f"it has `{others[0]}`, but the model takes images and text (see examples/video.py for frames)"
        )
    turns = _find_turns(row)
    column = "images" if row.get("images") is not None else "image"
    given = [_refer(keys, image, folder) for keys, image in _find_images(_parse(row.get(column)), [column])]
    waiting = iter(given)
    num_tags = sum(_add_turn(chat, index, *turn, waiting, folder) for index, turn in enumerate(turns))
    roles = [message["role"] for message in chat["messages"]]
    _check_order(roles)
    columns = [keys[0] for (keys, _), role in zip(turns, roles, strict=True) if role == "assistant"]
    chat["num_answers"] = len(columns) - columns.count("prompt")
    if num_tags == 0 and not chat["images"] and turns[0][1].get("from") is None:
        # as in TRL, images without a place are those of the first question; not so in LLaVA's form
        first = chat["messages"][roles.index("user")]
        first["content"] = [IMAGE_PART] * len(given) + first["content"]
        chat["images"] = given
    elif num_tags != len(given):
        raise ValueError(f"it has {num_tags} {IMAGE_TOKEN} tags, but {len(given)} images")
    if plain and (len(chat["images"]) != 1 or roles != ["user", "assistant"]):
        raise ValueError("stage 1 takes rows of one image, one question and one answer")


def _find_turns(row: dict) -> list[tuple[list, Any]]:
    """The turns, each with the keys that lead to it."""
    if row.get("messages") is None and row.get("prompt") is not None and row.get("completion") is not None:
        columns = {"prompt": "user", "completion": "assistant"}
        values = {name: _parse(row[name]) for name in columns}
        parts = {n: v if isinstance(v, list) else [{"role": columns[n], "content": v}] for n, v in values.items()}
    else:
        name = "messages" if row.get("messages") is not None else "conversations"
        parts = {name: _parse(row.get(name))}
        if not isinstance(parts[name], list) or not parts[name]:
            problem = f"`{name}` must be a list of at least one question and one answer"
            other = f", or `prompt` and `completion`; it has {', '.join(map(str, row)) or 'nothing'}"
            raise ValueError(problem if name in row else problem + other)
    return [([name, index], turn) for name, turns in parts.items() for index, turn in enumerate(turns)]


def _parse(value: Any) -> Any:
    """Parses lists of turns or names that are text, as in a CSV file or a JSON column."""
    if isinstance(value, str) and value.startswith(("[{", '["')):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def _find_images(value: Any, keys: list) -> Iterator[tuple[list, Any]]:
    """Finds images at any depth, with the keys that lead to them."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _find_images(item, [*keys, index])
    elif isinstance(value, dict) and not {"bytes", "path"} & value.keys():
        for name, item in value.items():  # the files of a webdataset
            yield from _find_images(item, [name])
    elif value is not None:
        yield keys, value


def _add_turn(chat: dict, index: int, keys: list, turn: Any, waiting: Iterator[dict], folder: str) -> int:
    """Adds a turn. Parts without an image of their own take one of `waiting`; returns their number."""
    turn = turn if isinstance(turn, dict) else {}
    speaker = turn.get("role") if turn.get("from") is None else turn["from"]
    content = turn.get("content") if turn.get("value") is None else turn["value"]
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"turn {index} has the unknown speaker {speaker!r} (known are {', '.join(ROLES)})")
    if isinstance(content, str):
        # Images come first in their message, wherever their tags are, as in the released data loader
        num_tags = content.count(IMAGE_TOKEN)
        text = content.replace(IMAGE_TOKEN, "").strip() if num_tags else content
        content = [*[{"type": "image"}] * num_tags, {"type": "text", "text": text}]
    elif not isinstance(content, list):
        raise ValueError(f"turn {index} has no text in `value` or `content`")
    parts, num_tags = list[dict](), 0
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
            continue
        if kind != "image":
            raise ValueError(f"{keys[0]} has a part that is neither text nor image: {part!r:.80}")
        if role != "user":
            raise ValueError(f"turn {index} by {speaker} has an {IMAGE_TOKEN} tag, which belongs to a user's turn")
        names = [key for key in IMAGE_KEYS if part.get(key) is not None]
        if len(names) > 1:
            raise ValueError(f"turn {index} has more than one image in a part: {', '.join(names)}")
        own = [_refer([*keys, "content", number, name], part[name], folder) for name in names]
        chat["images"] += own or itertools.islice(waiting, 1)
        num_tags += not own
        parts.append(IMAGE_PART)
    text = "".join(part["text"] or "" for part in parts)
    if role == "assistant" and not text.strip():
        raise ValueError(f"turn {index} is an empty answer")
    if not is_unicode(text):
        raise ValueError(f"turn {index} has half a character (an unpaired surrogate)")
    chat["num_bytes"] += len(text.encode())
    chat["messages"].append({"role": role, "content": parts})
    return num_tags


def _check_order(roles: list[str]) -> None:
    dialogue = roles[1:] if roles[0] == "system" else roles
    for index, pair in enumerate(itertools.pairwise(roles)):
        if pair[0] == pair[1]:
            raise ValueError(f"turns {index} and {index + 1} are both by {pair[0]}")
    if "system" in dialogue:
        raise ValueError("a system text must be the first turn")
    if dialogue[:1] != ["user"] or dialogue[-1] != "assistant":
        found = ", ".join(dialogue) or "neither"
        raise ValueError(f"it must begin with a user turn and end with an assistant turn, but has {found}")


def _refer(keys: list, image: Any, folder: str) -> dict[str, str | None]:
    """Checks an image and returns its reference. Names must not lead out of the folder or to the network."""
    name = image.get("path") if isinstance(image, dict) else image
    if isinstance(content := image.get("bytes") if isinstance(image, dict) else image, bytes):
        if problem := check_image(content):
            raise ValueError(problem)
        return {"path": None, "keys": json.dumps(keys)}
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise ValueError(f"`{keys[0]}` must have names of images or images, but has {image!r:.80}")
    if name.startswith("data:") or len(name) > MAX_NAME:
        raise ValueError(f"an image is text ({name:.40}...), but must be the name of a file, or the bytes of one")
    if keys[-1] in ("url", "base64") or not is_inside(folder, name):
        raise ValueError(f"image {name!r:.200} lies outside of {folder or 'the working directory'!r}")
    return {"path": os.path.join(folder, name), "keys": None}


def is_inside(folder: str | os.PathLike, name: str) -> bool:
    """Whether a name does not lead out of a folder, as untrusted data must not. Absolute paths are allowed."""
    if "://" in name:
        return False
    if os.path.isabs(name) or ".." not in name:
        return True
    folder = os.path.abspath(folder)
    return os.path.abspath(os.path.join(folder, name)).startswith(os.path.join(folder, ""))


def get_image(source: Dataset | dict, index: int, keys: str) -> bytes:
    """The content of the image that keys (a JSON list) lead to in row `index` of a dataset, or in a row itself."""
    value: Any = source if isinstance(source, dict) else source.with_format("arrow")[index].to_pylist()[0]
    for key in json.loads(keys):
        value = _parse(value)[key]
    return value["bytes"] if isinstance(value, dict) else value


def check_image(content: str | bytes, decode: bool = False) -> str | None:
    """
    What is wrong with an image (a path or the content of a file), or `None`. Unless `decode` is set, an image whose
    header and end are as expected is not decoded.
    """
    name = repr(content) if isinstance(content, str) else "embedded in the row"
    if isinstance(content, str) and not os.path.exists(content):
        return f"image {name} is missing"
    try:
        if decode or not has_expected_end(content):
            IMAGE_READER(Path(content) if isinstance(content, str) else content)
    except (OSError, ValueError) as error:
        return f"image {name} is broken: {error.__cause__ or error}"
    return None


def has_expected_end(content: str | bytes) -> bool:
    """Whether an image has a readable header, an ordinary size, and ends as complete files of its format do."""
    try:
        with open(content, "rb") if isinstance(content, str) else io.BytesIO(content) as file:
            with Image.open(file) as image:
                end = FILE_ENDS.get(image.format or "")
                unusual = max(image.size) > 50 * min(image.size)
            if end is None or unusual:
                return False
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except Exception:  # decoders raise many types; decoding the image tells what is wrong
        return False
