# SPDX-License-Identifier: Apache-2.0
"""What is wrong with converted rows: missing and broken images, chats that are too long."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from modeling_llava_hr import LlavaHrImageProcessorPil, LlavaHrProcessor

from .rows import get_image


# The smallest views: only whether they can be made matters
IMAGE_READER = LlavaHrImageProcessorPil(size=32, low_res_size=14)
# How a complete file ends; in other formats, and where something follows the end, the image is decoded
FILE_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
# More tokens than a template puts around a message
TOKENS_PER_MESSAGE = 16
BATCH_SIZE = 1000


def check_image(image: str | bytes | dict, decode: bool = False) -> str | None:
    """
    What is wrong with an image, if anything: a path, the content of a file, or `{"bytes": ...}`. Unless `decode` is
    set, only header and end of the file are read where these leave no doubts.
    """
    content = image["bytes"] if isinstance(image, dict) else image
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
    except Exception:  # every decoder has its own; decoding the image says what is wrong
        return False


def find_broken_rows(
    table: Dataset, source: Dataset | None = None, decode: bool = False, limit: "LengthLimit | None" = None
) -> dict[int, list[str]]:
    """
    Indices of the rows that cannot be trained on, and what is wrong with them. `table` and `source` are those of
    [`~training.data.load_table`]; with `decode` every image is decoded, rather than header and end of its file read.
    """
    columns = table.with_format("arrow")[:]
    has_problems = pc.greater(pc.list_value_length(columns["problems"]), 0).to_numpy()
    broken = {int(index): columns["problems"][index].as_py() for index in np.flatnonzero(has_problems)}
    images = columns["images"].combine_chunks()
    rows = pc.list_parent_indices(images).to_numpy()
    paths = images.flatten().field("path")
    with ThreadPool(os.cpu_count()) as pool:  # reading and decoding release Python's lock
        names = pc.drop_null(pc.unique(paths)).to_pylist()
        found = pool.imap(partial(check_image, decode=decode), names, chunksize=64)
        found = tqdm(found, "Checking images", len(names), unit=" files")
        problems = {name: problem for name, problem in zip(names, found, strict=True) if problem}
        for position in np.flatnonzero(pc.is_in(paths, pa.array(list(problems), pa.string())).to_numpy(False)):
            broken.setdefault(int(rows[position]), []).append(problems[paths[position].as_py()])
        if decode and source is not None:  # otherwise checked when they were converted
            keys = images.flatten().field("keys")
            embedded = [(source, int(row), keys[i].as_py()) for i, row in enumerate(rows) if keys[i].is_valid]
            found = pool.imap(lambda place: check_image(get_image(*place), decode), embedded)
            found = tqdm(found, "Checking embedded images", len(embedded), unit=" images")
            for (_, row, _), problem in zip(embedded, found, strict=True):
                if problem:
                    broken.setdefault(row, []).append(problem)
    if limit is not None:
        for index, problem in limit.find_long_rows(table):
            broken.setdefault(index, []).append(problem)
    return dict(sorted(broken.items()))


@dataclass
class LengthLimit:
    """Largest number of tokens of a chat, image tokens included; `processor` counts them without reading an image."""

    processor: LlavaHrProcessor
    max_length: int

    def __post_init__(self) -> None:
        (self.per_image,) = self.processor._get_num_multimodal_tokens(image_sizes=[(1, 1)]).num_image_tokens

    def count(self, chats: list[list[dict]]) -> list[int]:
        """Number of tokens of each chat."""
        texts = self.processor.apply_chat_template([to_messages(chat) for chat in chats])
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        image_id = self.processor.image_token_id
        return [len(row) + row.count(image_id) * (self.per_image - 1) for row in ids]

    def find_long_rows(self, table: Dataset) -> Iterator[tuple[int, str]]:
        """Indices of rows that are too long, and what to say. A token is at least a byte, so only long rows count."""
        columns = table.with_format("arrow")[:]
        num_images, num_messages = (pc.list_value_length(columns[name]).to_numpy() for name in ("images", "messages"))
        bound = columns["num_bytes"].to_numpy() + num_images * (self.per_image + 2) + num_messages * TOKENS_PER_MESSAGE
        bound += self.count([[{"role": "user", "content": []}]])[0]
        candidates = np.flatnonzero((bound > self.max_length) & (num_messages > 0))
        for start in range(0, len(candidates), BATCH_SIZE):
            indices = candidates[start : start + BATCH_SIZE]
            counts = self.count(table[indices]["messages"])
            found = zip(indices, counts, strict=True)
            yield from ((int(i), self.describe(n)) for i, n in found if n > self.max_length)

    def describe(self, num_tokens: int) -> str:
        """What is wrong with a row of `num_tokens` tokens."""
        return f"it has {num_tokens} tokens, more than {self.max_length} (`max_length`, or the model's context)"


def to_messages(messages: list[dict]) -> list[dict]:
    """Messages without the empty fields that Arrow adds."""
    return [
        {**message, "content": [{k: v for k, v in part.items() if v is not None} for part in message["content"]]}
        for message in messages
    ]


def describe(row: dict, problems: list[str]) -> str:
    """One line about a broken row."""
    return f"row {row['row']} (id {row['id']!r}): {'; '.join(problems)}"
