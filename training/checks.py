# SPDX-License-Identifier: Apache-2.0
"""What is wrong with converted rows: missing and broken images, chats that are too long."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image
from tqdm.auto import tqdm

from modeling_llava_hr import LlavaHrProcessor
from modeling_llava_hr.image_inputs_llava_hr import get_upright_size

from .rows import check_image, get_image


# Upper bound of the tokens that a template adds per message
TOKENS_PER_MESSAGE = 16
BATCH_SIZE = 1000


def find_broken_rows(
    table: Dataset, source: Dataset | None = None, decode: bool = False, limit: "LengthLimit | None" = None
) -> dict[int, list[str]]:
    """
    Indices of the rows that cannot be trained on, and what is wrong with them. `table` and `source` are those of
    [`~training.data.load_table`]; with `decode` every image is decoded, instead of checking its header and end.
    """
    columns = table.with_format("arrow")[:]
    broken = {int(i): columns["problems"][i].as_py() for i in np.flatnonzero(_count(columns, "problems"))}
    images = columns["images"].combine_chunks()
    rows, (paths, keys) = pc.list_parent_indices(images).to_numpy(), images.flatten().flatten()
    items: list[str | int] = pc.drop_null(pc.unique(paths)).to_pylist()  # each file once
    if decode and source is not None:  # otherwise embedded images were checked when they were converted
        items += np.flatnonzero(keys.is_valid()).tolist()

    def check(item: str | int) -> str | None:
        image = item if isinstance(item, str) else get_image(source, int(rows[item]), keys[item].as_py())
        return check_image(image, decode)

    with ThreadPool(os.cpu_count()) as pool:  # reading and decoding release Python's lock
        found = tqdm(pool.imap(check, items, chunksize=64), "Checking images", len(items), unit=" images")
        problems = {item: problem for item, problem in zip(items, found, strict=True) if problem}
    files = pa.array([item for item in problems if isinstance(item, str)], pa.string())
    for i in np.flatnonzero(pc.is_in(paths, files).to_numpy(False)):
        broken.setdefault(int(rows[i]), []).append(problems[paths[i].as_py()])
    for item in problems:
        if isinstance(item, int):
            broken.setdefault(int(rows[item]), []).append(problems[item])
    if limit is not None:
        for index, problem in limit.find_long_rows(table, source):
            broken.setdefault(index, []).append(problem)
    return dict(sorted(broken.items()))


def _count(columns: pa.Table, name: str) -> np.ndarray:
    """Length of each row's list in a column of lists."""
    return pc.list_value_length(columns[name]).to_numpy()


@dataclass
class LengthLimit:
    """Largest number of tokens of a chat, image tokens included; `processor` counts them without reading an image."""

    processor: LlavaHrProcessor
    max_length: int

    def __post_init__(self) -> None:
        (self.per_image,) = self.processor._get_num_multimodal_tokens(image_sizes=[(1, 1)]).num_image_tokens

    @property
    def unpads(self) -> bool:
        """Whether the number of an image's tokens depends on its shape."""
        return self.processor.image_processor.unpad

    def count(self, chats: list[list[dict]], image_tokens: list[int]) -> list[int]:
        """Number of tokens of each chat, `image_tokens` of them those of its images."""
        texts = self.processor.apply_chat_template(chats)
        ids = self.processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        tags = [row.count(self.processor.image_token_id) for row in ids]
        return [len(row) - tag + tokens for row, tag, tokens in zip(ids, tags, image_tokens, strict=True)]

    def count_image_tokens(self, rows: Iterable[dict], source: Dataset | None) -> list[int]:
        """Number of image tokens of each row. For `unpad`, images are opened, not decoded; broken ones count as 0."""

        def count(row: dict) -> int:
            if not self.unpads:
                return len(row["images"]) * self.per_image
            sizes = []
            for image in row["images"]:
                content = image["path"] or io.BytesIO(get_image(source, row["row"], image["keys"]))
                with contextlib.suppress(OSError, ValueError), Image.open(content) as opened:
                    sizes.append(get_upright_size(opened))
            return sum(self.processor._get_num_multimodal_tokens(sizes).num_image_tokens)

        with ThreadPool(os.cpu_count()) as pool:
            return pool.map(count, rows)

    def find_long_rows(self, table: Dataset, source: Dataset | None = None) -> Iterator[tuple[int, str]]:
        """Indices and problems of rows that are too long. A token is at least one byte, so short rows are skipped."""
        columns = table.with_format("arrow")[:]
        num_messages = _count(columns, "messages")
        bound = columns["num_bytes"].to_numpy() + _count(columns, "images") * (self.per_image + 2)
        bound += num_messages * TOKENS_PER_MESSAGE + self.count([[{"role": "user", "content": []}]], [0])[0]
        candidates = np.flatnonzero((bound > self.max_length) & (num_messages > 0))
        for start in range(0, len(candidates), BATCH_SIZE):
            indices = candidates[start : start + BATCH_SIZE]
            rows = table.select(indices)
            numbers = self.count(rows[:]["messages"], self.count_image_tokens(rows, source))
            for index, number in zip(indices, numbers, strict=True):
                if number > self.max_length:
                    yield int(index), self.describe(number)

    def describe(self, num_tokens: int) -> str:
        """What is wrong with a row of `num_tokens` tokens."""
        return f"it has {num_tokens} tokens, more than {self.max_length} (`max_length`, or the model's context)"


def describe(row: dict, problems: list[str], data_path: str) -> str:
    """Describes a broken row in one line, with its file unless that is `data_path`."""
    file = "" if os.path.abspath(row["file"]) == os.path.abspath(data_path) else f"{row['file']}, "
    return f"{file}row {row['row']} (id {row['id']!r}): {'; '.join(problems)}"
