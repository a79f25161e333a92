# SPDX-License-Identifier: Apache-2.0
"""Training data: rows of every supported format, converted to chats with image references once, and checked."""

import gc
import glob
import itertools
import json
import math
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from modeling_llava_hr.utils import write_text

from . import rows
from .checks import LengthLimit, describe, find_broken_rows
from .rows import IMAGE_READER, convert_row, get_image, read_rows


BUILDERS = {".csv": "csv", ".parquet": "parquet", ".tar": "webdataset"}
ROW_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
MIXTURE_SUFFIXES = (".yaml", ".yml")
MAX_MESSAGES = 20
# Minimum bytes of JSON per process
PART_SIZE = 2**26
BATCH_SIZE = 1000

PART = {"type": Value("string"), "text": Value("string")}
FEATURES = Features(
    {
        "file": Value("string"),
        "row": Value("int64"),
        "id": Value("string"),
        "type": Value("string"),
        "messages": List({"role": Value("string"), "content": List(PART)}),
        # a file, or the keys that lead to the image in a row of the source
        "images": List({"path": Value("string"), "keys": Value("string")}),
        "num_answers": Value("int32"),
        "num_bytes": Value("int32"),
        "problems": List(Value("string")),
    }
)


@dataclass
class DataConfig:
    """Where rows come from and how they are checked."""

    # a file (`.json`, `.jsonl`, both also `.gz`, `.parquet`, `.csv`, `.tar`, `.yaml`), a pattern of such files, a
    # folder written by `save_to_disk`, or whatever `datasets.load_dataset` accepts
    data_path: str
    # folder of relative image names; by default the data file's, the data folder itself, or the working directory
    image_folder: str | None = None
    name: str | None = None  # `name`, `split` and `revision` as in `datasets.load_dataset`
    split: str | None = None
    revision: str | None = None
    streaming: bool = False  # whether `datasets` reads on demand
    plain: bool = False  # rows must be one image, one question and one answer (stage 1)
    skip_broken: bool = False  # leave broken rows out rather than refuse the data
    report: Path | None = None  # JSON Lines file that lists the rows that were left out

    @property
    def folder(self) -> str:
        """Folder that relative image names start from."""
        if self.image_folder is not None:
            return self.image_folder
        if glob.has_magic(self.data_path) or os.path.isfile(self.data_path):
            return os.path.abspath(os.path.dirname(self.data_path))
        return os.path.abspath(self.data_path) if os.path.isdir(self.data_path) else ""


@dataclass
class RowsConfig(datasets.BuilderConfig):
    """The arguments of [`RowsBuilder`]; `datasets` derives the cache key from them."""

    data_path: str = ""
    folder: str = ""
    plain: bool = False
    source: Dataset | None = None
    states: tuple = ()


class RowsBuilder(datasets.ArrowBasedBuilder):
    """Writes converted rows into the cache of `datasets`. `Dataset.from_generator` takes five times as long."""

    BUILDER_CONFIG_CLASS = RowsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        # one process per part; each reads the whole file and converts its part
        return [datasets.SplitGenerator(datasets.Split.TRAIN, gen_kwargs={"parts": list(range(self.num_parts))})]

    @property
    def num_parts(self) -> int:
        """Number of parts of a file that are converted in parallel."""
        if not self.config.data_path.endswith((".json", ".jsonl")):
            return 1
        return max(1, min(os.cpu_count() or 1, os.path.getsize(self.config.data_path) // PART_SIZE))

    def _generate_tables(self, parts: list[int]) -> Iterator[tuple[Any, pa.Table]]:
        config, num_parts = self.config, self.num_parts
        if config.source is not None:  # images undecoded, as `{"bytes", "path"}`
            tables = config.source.with_format("arrow").iter(batch_size=100)
            numbered: Iterable = enumerate(row for table in tables for row in table.to_pylist())
        else:
            size = os.path.getsize(config.data_path) / num_parts
            found = enumerate(read_rows(config.data_path))
            numbered = ((i, row) for i, (row, at) in found if min(int(at / size), num_parts - 1) in parts)
        converted = (convert(row, index, config) for index, row in numbered)
        batches = iter(lambda: list(itertools.islice(converted, BATCH_SIZE)), [])
        gc.disable()  # it would take half of the time, for dicts that reference counting frees
        try:
            for number, batch in enumerate(batches):
                yield datasets.builder.Key(parts[0], number), pa.Table.from_pylist(batch, FEATURES.arrow_schema)
        finally:
            gc.enable()


def convert(row: Any, index: int, config: DataConfig | RowsConfig) -> dict[str, Any]:
    """Converts a row to a row of the table."""
    chat = convert_row(row, config.folder, config.plain)
    return {**chat, "file": config.data_path, "row": index, "id": chat["id"] or str(index)}


def open_source(config: DataConfig) -> Dataset | IterableDataset | None:
    """
    Opens data that `datasets` reads; `None` for JSON, which [`read_table`] reads because `datasets` would hold whole
    arrays in memory and needs the same fields in all rows.
    """
    path, suffix = config.data_path, Path(config.data_path.removesuffix(".gz")).suffix
    is_known = path.endswith(ROW_SUFFIXES + MIXTURE_SUFFIXES) or suffix in BUILDERS
    is_remote = "://" in path and suffix in BUILDERS
    if is_known and not is_remote and not os.path.exists(path) and not glob.glob(path):
        raise FileNotFoundError(f"The data file {path} (`data_path` or `eval_data_path`) does not exist.")
    if os.path.isfile(path) and not is_known:
        known = ", ".join([*ROW_SUFFIXES, *BUILDERS, ".yaml"])
        raise ValueError(f"`data_path` ({path}) is of an unknown kind: its name must end with {known}.")
    if is_known and suffix not in BUILDERS:
        return None
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        source = datasets.load_from_disk(path)
        if isinstance(source, DatasetDict):
            if config.split not in source:
                raise ValueError(f"`data_path` ({path}) has no split {config.split!r}, but {', '.join(source)}.")
            source = source[config.split]
        return source.to_iterable_dataset() if config.streaming else source
    options = {"path": path, "name": config.name, "split": config.split or "train", "revision": config.revision}
    if is_known:
        options = {"path": BUILDERS[suffix], "data_files": path, "split": "train"}
    try:  # its errors list known configurations and splits
        return datasets.load_dataset(**options, streaming=config.streaming)
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(f"`data_path` ({path}): {error.__cause__ or error}") from error


def read_table(config: DataConfig, source: Dataset | None) -> Dataset:
    """Converts all rows of one JSON file or of `source` to a memory-mapped table in the cache of `datasets`."""
    files = [__file__, rows.__file__, *([config.data_path] if source is None else [])]
    states = tuple((state.st_size, state.st_mtime_ns) for state in map(os.stat, files))
    path = os.path.abspath(config.data_path) if os.path.exists(config.data_path) else config.data_path
    builder = RowsBuilder(data_path=path, folder=config.folder, plain=config.plain, source=source, states=states)
    try:
        builder.download_and_prepare(num_proc=builder.num_parts if builder.num_parts > 1 else None)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (OSError, ValueError)):
            raise error.__cause__ from None
        if source is None:  # a worker process does not pass on the cause: read again, and fail again if it is not JSON
            for _ in read_rows(path):
                pass
        raise
    if not builder.info.splits or not builder.info.splits["train"].num_examples:
        raise ValueError(f"`data_path` ({config.data_path}) has no rows.")
    return builder.as_dataset(split="train")


def list_files(config: DataConfig) -> list[tuple[str, str]]:
    """
    The JSON files of a pattern or a mixture, each with a sampling strategy. A mixture has LLaVA-NeXT's YAML form:
    `datasets`, a list of `json_path` and `sampling_strategy`, see [`sample_rows`].
    """
    if not config.data_path.endswith(MIXTURE_SUFFIXES):
        is_file = os.path.isfile(config.data_path)
        return [(path, "all") for path in ([config.data_path] if is_file else sorted(glob.glob(config.data_path)))]
    with open(config.data_path, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "json_path" in e for e in entries):
        raise ValueError(f"{config.data_path} must have `datasets`, a list of entries with `json_path`.")
    files = []
    for entry in entries:
        path = os.path.join(os.path.dirname(config.data_path), entry["json_path"])
        if not path.endswith(ROW_SUFFIXES):
            raise ValueError(f"`json_path` ({path}) in {config.data_path} must end with {', '.join(ROW_SUFFIXES)}.")
        if not os.path.exists(path):
            raise FileNotFoundError(f"`json_path` ({path}) in {config.data_path} does not exist.")
        files.append((path, str(entry.get("sampling_strategy", "all"))))
    return files


def sample_rows(num_rows: int, strategy: str) -> list[int] | range:
    """
    Indices that a sampling strategy chooses: `all`, or `first`, `end` or `random` with a number or a percentage, such
    as `random:10%`.
    """
    match = re.fullmatch(r"all|(first|end|random):(\d+)(%?)", strategy)
    if match is None:
        raise ValueError(
            f"`sampling_strategy` must be all, first:N, end:N or random:N (a number or percentage), not {strategy!r}."
        )
    kind, amount, percent = match.groups()
    if kind is None:
        return range(num_rows)
    number = min(num_rows, math.ceil(num_rows * int(amount) / 100) if percent else int(amount))
    if kind == "random":
        return sorted(random.Random(0).sample(range(num_rows), number))
    return range(number) if kind == "first" else range(num_rows - number, num_rows)


def load_table(config: DataConfig) -> tuple[Dataset, Dataset | None]:
    """The converted rows, and the dataset that they come from unless that is JSON."""
    source = open_source(config)
    if source is not None:
        return read_table(config, source), source
    tables = []
    for path, strategy in list_files(config):
        table = read_table(replace(config, data_path=path), None)
        tables.append(table if strategy == "all" else table.select(sample_rows(len(table), strategy)))
    return datasets.concatenate_datasets(tables), None


def read_report(report: Path | None) -> list[dict]:
    """The rows that a report lists."""
    if report is None or not report.exists():
        return []
    return [json.loads(line) for line in report.read_text().splitlines()]


def leave_out_broken_rows(
    table: Dataset, source: Dataset | None, config: DataConfig, limit: LengthLimit | None
) -> Dataset:
    """
    Refuses data with broken rows (`ValueError`), or leaves them out and lists them in the report. If there is a
    report, the same rows are left out again, so that a resumed run sees the same data.
    """
    report = config.report if config.skip_broken else None
    if report is not None and report.exists():
        known = {(entry["file"], entry["row"]) for entry in read_report(report) if "replaced_by" not in entry}
        places = zip(table["file"], table["row"], strict=True) if known else ()
        broken = {index for index, place in enumerate(places) if place in known}
    else:
        problems = find_broken_rows(table, source, limit=limit)
        broken = set(problems)
        columns = table.select_columns(["file", "row", "id"])
        entries = ({**columns[index], "problems": found} for index, found in problems.items())
        if broken and not config.skip_broken:
            listed = itertools.islice(entries, MAX_MESSAGES)
            lines = [describe(entry, entry["problems"], config.data_path) for entry in listed]
            raise ValueError(
                f"{len(broken)} of {len(table)} rows in {config.data_path} are broken:\n" + "\n".join(lines) + "\n"
                "See all with `python -m training.check_data`, fix them, or leave them out with `skip_broken: true`."
            )
        if report is not None:
            write_text(report, "".join(json.dumps(entry) + "\n" for entry in entries))
    if len(broken) == len(table):
        raise ValueError(f"All {len(table)} rows in {config.data_path} are broken; see {config.report}.")
    return table.select(sorted(set(range(len(table))) - broken)) if broken else table


def read_images(row: dict, source: Dataset | dict | None) -> list[Image.Image]:
    """
    The decoded images of a row of the table; embedded ones are in the dataset `source`, or in the row `source` itself.
    A `ValueError` names row and file of an image that cannot be decoded.
    """
    images = []
    for image in row["images"]:
        path = image["path"]  # never a URL
        content = Path(path) if path else get_image(source, row["row"], image["keys"])
        try:
            images.append(IMAGE_READER.process_image(IMAGE_READER.fetch_images(content), do_convert_rgb=True))
        except ValueError as error:
            name = repr(path) if path else "embedded in the row"
            problem = f"image {name} is broken: {error.__cause__ or error}"
            raise ValueError(f"{describe(row, [problem], row['file'])} ({row['file']})") from error
    return images


def to_messages(messages: list[dict]) -> list[dict]:
    """Messages without the empty fields that Arrow adds."""
    return [
        {**message, "content": [{k: v for k, v in part.items() if v is not None} for part in message["content"]]}
        for message in messages
    ]


def to_sample(row: dict, images: list[Image.Image]) -> dict[str, Any]:
    """Converts a row of the table to a sample for TRL's collator; its last `num_answers` answers are learned."""
    return {"messages": to_messages(row["messages"]), "images": images, "num_answers": row["num_answers"]}


def read_samples(
    batch: dict[str, list], table: Dataset, source: Dataset | None, config: DataConfig
) -> dict[str, list]:
    """
    Samples for rows of the table. With `skip_broken` a row whose images cannot be decoded is replaced by the next one
    of its kind that can, and listed in the report.
    """
    samples = []
    for values in zip(*batch.values(), strict=True):
        row = dict(zip(batch, values, strict=True))
        try:
            images = read_images(row, source)
        except ValueError as error:
            if not config.skip_broken:
                raise
            other, images = find_replacement(row, table, source)
            record(row, [str(error)], config, replaced_by=other["row"], replaced_by_file=other["file"])
            row = other
        samples.append(to_sample(row, images))
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def find_replacement(row: dict, table: Dataset, source: Dataset | None) -> tuple[dict, list[Image.Image]]:
    """The next row of the table whose images can be decoded, and these images."""
    place = row["file"], row["row"]  # its index differs where rows were left out, or several files are read
    index = list(zip(table["file"], table["row"], strict=True)).index(place)
    for step in range(1, len(table) + 1):
        other = table[(index + step) % len(table)]
        try:
            if other["images"]:
                return other, read_images(other, source)
        except ValueError:
            continue
    raise ValueError(f"No image of {row['file']} can be decoded.")


def record(row: dict, problems: list[str], config: DataConfig, **more: Any) -> None:
    """Lists a row in the report, unless it is there."""
    entry = {**{name: row[name] for name in ("file", "row", "id")}, "problems": problems, **more}
    if config.report is not None and entry not in read_report(config.report):
        config.report.parent.mkdir(parents=True, exist_ok=True)
        with config.report.open("a") as file:  # short lines of several worker processes do not mix
            file.write(json.dumps(entry) + "\n")


def stream_samples(
    source: IterableDataset, config: DataConfig, limit: LengthLimit | None, batch_size: int
) -> Iterator[dict]:
    """
    Reorders the samples of a stream: always `batch_size` with images or `batch_size` without, so that no batch mixes
    them. At the end, the last samples of each kind are repeated to fill a batch. A broken row raises a `ValueError`
    that names it, or is left out with `skip_broken`.
    """
    waiting: dict[bool, list[dict]] = {True: [], False: []}
    for index, source_row in enumerate(source.decode(False) if source.features else source):
        row = convert(source_row, index, config)
        problems, images = row["problems"], []
        try:
            images = read_images(row, source_row)
        except ValueError as error:
            problems = [str(error)]
        if limit is not None and not problems:
            sizes = [(image.height, image.width) for image in images]
            image_tokens = sum(limit.processor._get_num_multimodal_tokens(sizes).num_image_tokens)
            (num_tokens,) = limit.count([row["messages"]], [image_tokens])
            problems = [limit.describe(num_tokens)] if num_tokens > limit.max_length else []
        if problems and not config.skip_broken:
            line = describe(row, problems, config.data_path)
            raise ValueError(f"{config.data_path}, {line}. Fix it, or set `skip_broken: true`.")
        if problems:
            record(row, problems, config)
            continue
        group = waiting[bool(images)]
        group.append(to_sample(row, images))
        if len(group) == batch_size:
            yield from group
            group.clear()
    for group in filter(None, waiting.values()):
        yield from itertools.islice(itertools.cycle(group), batch_size)


def load_data(config: DataConfig, limit: LengthLimit | None = None, batch_size: int = 1) -> Dataset | IterableDataset:
    """
    Loads training data as chats whose images are decoded on access.

    Args:
        config ([`DataConfig`]): Where rows come from and how they are checked.
        limit ([`LengthLimit`], *optional*): Largest number of tokens.
        batch_size (`int`, *optional*, defaults to 1): Consecutive samples of one kind; for streaming.

    Returns:
        `Dataset`, or `IterableDataset` if `datasets` reads on demand, of `messages`, `images` and `num_answers`.

    Raises:
        FileNotFoundError: If a data file does not exist.
        ValueError: If the data has no supported form, or broken rows, or no such configuration or split.
    """
    if config.streaming and isinstance(source := open_source(config), IterableDataset):
        arguments = {"source": source, "config": config, "limit": limit, "batch_size": batch_size}
        return IterableDataset.from_generator(stream_samples, gen_kwargs=arguments)
    table, source = load_table(config)
    table = leave_out_broken_rows(table, source, config, limit)
    if limit is not None and limit.unpads:
        table = table.add_column("num_image_tokens", limit.count_image_tokens(table, source))
    return table.with_transform(partial(read_samples, table=table, source=source, config=config))


def get_lengths(dataset: Dataset) -> tuple[list[int], list[bool]]:
    """
    For grouping samples of [`load_data`]: the bytes of their text (with `unpad` also four bytes for each token of
    their images), and whether they have an image.
    """
    columns = dataset.with_format("arrow")[:]
    lengths = columns["num_bytes"].to_pylist()
    if "num_image_tokens" in columns.column_names:
        lengths = [n + 4 * tokens for n, tokens in zip(lengths, columns["num_image_tokens"].to_pylist(), strict=True)]
    return lengths, pc.greater(pc.list_value_length(columns["images"]), 0).to_pylist()
