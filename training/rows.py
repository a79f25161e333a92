# SPDX-License-Identifier: Apache-2.0
"""Rows of every supported format as chats: LLaVA's, `messages`, `prompt` and `completion`, webdataset's."""

import gzip
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset


IMAGE_TAG = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Where a part of a message may have its image; `url` and `base64` are transformers' and refused
IMAGE_KEYS = ("image", "path", "url", "base64", "bytes")
TYPE_COLUMNS = ("question_type", "type", "kind", "category")
IMAGE_PART: dict[str, str | None] = {"type": "image", "text": None}
# What webdataset calls images, by their suffix
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


@dataclass
class Chat:
    """A row as a chat."""

    id: str | None = None
    type: str | None = None  # of its question
    # `role` and `content`, a list of `{"type": "text", "text"}` and `{"type": "image"}`
    messages: list[dict] = field(default_factory=list)
    # for each image the keys that lead to it in the row, and its path or content
    images: list[tuple[list, Any]] = field(default_factory=list)
    num_answers: int = 0  # how many of the last answers are learned: all, or those of `completion`
    problems: list[str] = field(default_factory=list)  # what is wrong with the row
    num_bytes: int = 0  # of all texts in UTF-8


def read_rows(path: str | os.PathLike, chunk_size: int = 2**24) -> Iterator[tuple[Any, int]]:
    """
    Reads the rows of a JSON array or of JSON lines (`.gz` or not) `chunk_size` characters at a time, so that a file of
    gigabytes needs little memory. Yields each row and the position of the character after it. A `ValueError` says
    where the file is not JSON.
    """
    decoder, buffer, offset, end, depth = json.JSONDecoder(), "", 0, False, 0
    with (
        gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path, encoding="utf-8") as file
    ):
        while not end:
            try:
                chunk = file.read(chunk_size)
            except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
                raise ValueError(f"{path} is not UTF-8 text after character {offset}: {error}.") from error
            buffer, end = buffer + chunk, not chunk
            # Rows are separated by a comma in an array, by a new line otherwise
            position, length = 0, len(buffer)
            while True:
                while position < length and buffer[position] in "[], \t\r\n\ufeff":
                    depth += {"[": 1, "]": -1}.get(buffer[position], 0)
                    position += 1
                if position == length:
                    break
                try:
                    row, position = decoder.raw_decode(buffer, position)
                except json.JSONDecodeError as error:
                    if not end:
                        break
                    place = f"{error.msg} at character {offset + error.pos}"
                    raise ValueError(f"{path} is neither a JSON array nor JSON lines: {place}.") from None
                except (RecursionError, ValueError) as error:
                    raise ValueError(
                        f"{path} has an unreadable row at character {offset + position}: {error}."
                    ) from error
                yield row, offset + position
            buffer, offset = buffer[position:], offset + position
    if depth:
        raise ValueError(f"{path} is an array whose brackets do not match. Was it downloaded completely?")


def convert_row(row: Any, folder: str = "", plain: bool = False) -> Chat:
    """
    Converts a row of any supported format and finds what is wrong with it, except for missing and broken files.

    Args:
        row: The row. Chats are in `conversations` (turns with `from` and `value` or `role` and `content`),
            `messages`, or `prompt` and `completion`; images in `images` or `image` (a name, a list, `{"bytes",
            "path"}` or an image), in the order of their `<image>` tags or parts, or inside the parts themselves.
        folder (`str`, *optional*): Folder that relative image names start from.
        plain (`bool`, *optional*, defaults to `False`): Whether it must be one image, one question, one answer.
    """
    chat = Chat()
    if not isinstance(row, dict):
        chat.problems.append(f"it must be an object with a chat, but is {_quote(row)}")
        return chat
    if "__key__" in row:  # webdataset: one column per file
        files = {name: value for name, value in row.items() if name.lower() in IMAGE_SUFFIXES}
        content = row["json"] if isinstance(row.get("json"), dict) else {}
        row = {"id": row["__key__"], **content, **({"images": files} if files else {})}
    chat.id = None if row.get("id") is None else str(row["id"]).encode(errors="replace").decode()
    for name in TYPE_COLUMNS:
        if chat.type is None and name in row:
            chat.type = row[name] if isinstance(row[name], str) else None
    turns = _find_turns(row, chat)
    column = "images" if row.get("images") is not None else "image"
    value = _parse(row.get(column))
    found = [([column], value)] if isinstance(value, str) else _find_images(value, [column])
    given = [_locate(chat, keys, image, folder) for keys, image in found]
    if chat.problems:
        return chat
    used = _add_messages(chat, turns, given, folder)
    roles = [message["role"] for message in chat.messages]
    if not chat.problems:
        _check_order(roles, chat)
    if chat.problems:
        return chat
    if used == 0 and not chat.images and turns[0][2].get("from") is None:
        # as in TRL, images without a place are those of the first question; not so in LLaVA's form
        first = chat.messages[roles.index("user")]
        first["content"] = [IMAGE_PART] * len(given) + first["content"]
        chat.images, used = given, len(given)
    chat.num_answers = chat.num_answers or roles.count("assistant")
    if used != len(given):
        chat.problems.append(f"it has {used} {IMAGE_TAG} tags, but {len(given)} images")
    elif plain and (len(chat.images) != 1 or roles != ["user", "assistant"]):
        chat.problems.append("stage 1 takes rows of one image, one question and one answer")
    return chat


def _quote(value: Any) -> str:
    return f"{value!r:.80}"


def _find_turns(row: dict, chat: Chat) -> list[tuple[str, int, Any]]:
    """Turns, each with its column and its index there."""
    if row.get("prompt") is not None and row.get("completion") is not None and row.get("messages") is None:
        found = []
        for name, role in (("prompt", "user"), ("completion", "assistant")):
            value = _parse(row[name])
            turns = value if isinstance(value, list) else [{"role": role, "content": value}]
            found += [(name, index, turn) for index, turn in enumerate(turns)]
        # of the completion, the last of the two
        chat.num_answers = sum(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in turns)
        return found
    name = "messages" if row.get("messages") is not None else "conversations"
    turns = _parse(row.get(name))
    if not isinstance(turns, list) or not turns:
        columns = ", ".join(map(str, row)) or "nothing"
        problem = f"`{name}` must be a list of at least one question and one answer"
        chat.problems.append(problem if name in row else f"{problem}, or `prompt` and `completion`; it has {columns}")
        turns = []
    return [(name, index, turn) for index, turn in enumerate(turns)]


def _parse(value: Any) -> Any:
    """Lists of turns or names that a CSV file or a JSON column has as text."""
    if isinstance(value, str) and value.startswith(("[{", '["')):
        try:
            return json.loads(value)
        except ValueError:
            pass
    return value


def _find_images(value: Any, keys: list) -> Iterator[tuple[list, Any]]:
    """Images at any depth, with the keys that lead to them."""
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _find_images(item, [*keys, index])
    elif isinstance(value, dict) and not {"bytes", "path"} & value.keys():
        for name, item in value.items():  # the files of a webdataset
            yield from _find_images(item, [name])
    elif value is not None:
        yield keys, value


def _add_messages(chat: Chat, turns: list[tuple[str, int, Any]], given: list[tuple[list, Any]], folder: str) -> int:
    """Adds `turns` to `chat` with the images of their parts; returns how many of the `given` ones they refer to."""
    used, parts = 0, list[dict]()
    for index, (column, position, turn) in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        speaker, content = turn.get("from"), turn.get("value")
        speaker = turn.get("role") if speaker is None else speaker
        content = turn.get("content") if content is None else content
        role = ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            chat.problems.append(f"turn {index} has the unknown speaker {speaker!r} (known are {', '.join(ROLES)})")
            continue
        if isinstance(content, str):
            text, parts = content, [{"type": "text", "text": content}]
            if IMAGE_TAG in content:
                # Images come first in their message, wherever their tags are, as in the released data loader
                num_tags, text = content.count(IMAGE_TAG), content.replace(IMAGE_TAG, "").strip()
                parts = [*[IMAGE_PART] * num_tags, {"type": "text", "text": text}]
                chat.images += given[used : used + num_tags]
                used += num_tags
                if role != "user":
                    found = f"turn {index} by {speaker} has an {IMAGE_TAG} tag"
                    chat.problems.append(f"{found}, which belongs to a user's turn")
        elif isinstance(content, list):
            parts, new = _convert_parts(chat, content, [column, position, "content"], given[used:], folder)
            text, used = "".join(part["text"] or "" for part in parts), used + new
        else:
            chat.problems.append(f"turn {index} has no text in `value` or `content`")
            continue
        if role == "assistant" and not text.strip():
            chat.problems.append(f"turn {index} is an empty answer")
        try:  # JSON lets unpaired surrogates through, tokenizers and Arrow do not
            chat.num_bytes += len(text.encode())
        except UnicodeEncodeError:
            chat.problems.append(f"turn {index} has half a character (an unpaired surrogate)")
        chat.messages.append({"role": role, "content": parts})
    return used


def _convert_parts(
    chat: Chat, content: list, keys: list, given: list[tuple[list, Any]], folder: str
) -> tuple[list[dict], int]:
    """The parts of a message, and how many of the `given` images they refer to."""
    parts, used = [], 0
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            found = [(key, part[key]) for key in IMAGE_KEYS if part.get(key) is not None]
            located = [_locate(chat, [*keys, number, key], value, folder) for key, value in found]
            chat.images += located or given[used : used + 1]
            used += not found
            parts.append(IMAGE_PART)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            chat.problems.append(f"{keys[0]} has a part that is neither text nor image: {_quote(part)}")
    return parts, used


def _check_order(roles: list[str], chat: Chat) -> None:
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if dialogue and dialogue == ["user", "assistant"] * (len(dialogue) // 2):
        return
    for index, pair in enumerate(itertools.pairwise(roles)):
        if pair[0] == pair[1]:
            chat.problems.append(f"turns {index} and {index + 1} are both by {pair[0]}")
    if "system" in dialogue:
        chat.problems.append("a system text must be the first turn")
    elif dialogue[:1] != ["user"] or dialogue[-1] != "assistant":
        found = ", ".join(dialogue) or "neither"
        chat.problems.append(f"it must begin with a user turn and end with an assistant turn, but has {found}")


def _locate(chat: Chat, keys: list, image: Any, folder: str) -> tuple[list, Any]:
    """Refuses a name that leads out of the folder or to the network, and makes a path of any other."""
    if is_embedded(image):
        return keys, image
    name = image.get("path") if isinstance(image, dict) else image
    if not isinstance(name, str) or not name or not is_unicode(name):
        chat.problems.append(f"`{keys[0]}` must have names of images or images, but has {_quote(image)}")
    elif keys[-1] in ("url", "base64") or not is_inside(folder, name):
        chat.problems.append(f"image {name!r:.200} lies outside of {folder or 'the working directory'!r}")
    else:
        return keys, os.path.join(folder, name)
    return keys, None


def is_unicode(text: str) -> bool:
    """Whether a text has no unpaired surrogate: JSON lets them through, tokenizers and Arrow do not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_embedded(image: Any) -> bool:
    """Whether a row has the image itself rather than its name."""
    return isinstance(image.get("bytes") if isinstance(image, dict) else image, bytes)


def is_inside(folder: str | os.PathLike, name: str) -> bool:
    """Whether a name stays below a folder, which other people's data must not leave. Absolute paths are allowed."""
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
