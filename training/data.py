# SPDX-License-Identifier: Apache-2.0
"""Training data: the LLaVA format, or any `datasets` data set of chats, as lazily read messages and pictures."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset, load_from_disk
from filelock import FileLock
from tqdm.auto import tqdm

from modeling_llava_hr import LlavaHrImageProcessorPil


IMAGE_TAG = "<image>"
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# The smallest views: only whether they can be made matters
PICTURE_READER = LlavaHrImageProcessorPil(size=32, low_res_size=14)

TEXT_COLUMNS = {"messages", "prompt", "completion", "conversations"}
MAX_MESSAGES = 20

FEATURES = Features(
    {
        "id": Value("string"),
        "row": Value("string"),
        "images": List(Value("string")),
        "num_characters": Value("int32"),
        "problems": List(Value("string")),
    }
)


def read_rows(path: str | os.PathLike, chunk_size: int = 2**24) -> Iterator[tuple[Any, str]]:
    """
    Reads the rows of a JSON array or of JSON lines one by one, so that a file of gigabytes needs little memory.

    Args:
        path (`str` or `os.PathLike`): The file.
        chunk_size (`int`, *optional*, defaults to 2**24): Characters to read at once.

    Yields:
        `tuple`: A row and its text in the file.

    Raises:
        ValueError: If the file is no JSON; says where.
    """
    decoder, buffer, offset, end, depth = json.JSONDecoder(), "", 0, False, 0
    with open(path, encoding="utf-8") as file:
        while not end:
            try:
                chunk = file.read(chunk_size)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is no text in UTF-8: {error.reason} after character {offset}.") from error
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
                    row, row_end = decoder.raw_decode(buffer, position)
                except json.JSONDecodeError as error:
                    if end:
                        raise ValueError(
                            f"{path} is neither a JSON array nor JSON lines: {error.msg} at character "
                            f"{offset + error.pos}."
                        ) from None
                    break
                except (RecursionError, ValueError) as error:
                    raise ValueError(
                        f"{path} has a row that cannot be read at character {offset + position}: {error}."
                    ) from error
                yield row, buffer[position:row_end]
                position = row_end
            buffer, offset = buffer[position:], offset + position
    if depth:
        raise ValueError(f"{path} is an array whose brackets do not match. Was it downloaded completely?")


def find_problems(row: Any, plain: bool = False) -> list[str]:
    """
    What is wrong with the text of a row in the LLaVA format.

    Args:
        row: The row: `id`, `image` (a name or a list of names; absent for text alone) and `conversations`, a list of
            turns with `from` ("human" and "gpt" by turns, optionally "system" first) and `value`.
        plain (`bool`, *optional*, defaults to `False`): Whether it must be one picture and one caption (stage 1).

    Returns:
        `list[str]`: One message for each problem.
    """
    if not isinstance(row, dict):
        return [f"it is no object with `conversations`, but {json.dumps(row)[:40]}"]
    turns, names = row.get("conversations"), _image_names(row)
    if not isinstance(names, list) or not all(isinstance(name, str) and name and is_unicode(name) for name in names):
        return [f"`image` must be a name or a list of names, but is {json.dumps(row['image'])[:80]}"]
    if not isinstance(turns, list) or not turns:
        return ["`conversations` must be a list of at least one question and one answer"]
    problems: list[str] = []
    speakers: list[Any] = []
    num_tags = 0
    for index, turn in enumerate(turns):
        speaker, value = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker not in list(ROLES):
            problems.append(f"turn {index} has the unknown speaker {speaker!r} (known are {', '.join(ROLES)})")
        elif not isinstance(value, str):
            problems.append(f"turn {index} has no text in `value`")
        elif not is_unicode(value):
            problems.append(f"turn {index} has half a character (an unpaired surrogate)")
        else:
            num_tags += value.count(IMAGE_TAG)
            if speaker == "gpt" and not value.strip():
                problems.append(f"turn {index} is an empty answer")
            if speaker != "human" and IMAGE_TAG in value:
                problems.append(f"turn {index} by {speaker} has an {IMAGE_TAG} tag, which belongs to a human turn")
        if speakers and speaker == speakers[-1]:
            problems.append(f"turns {index - 1} and {index} are both by {speaker}")
        speakers.append(speaker)
    dialogue = speakers[speakers[0] == "system" :]
    if "system" in dialogue:
        problems.append("a system text must be the first turn")
    if not problems and (dialogue[:1] != ["human"] or dialogue[-1] != "gpt"):
        problems.append(f"it must begin with a human turn and end with a gpt turn, but has {', '.join(dialogue)}")
    if num_tags != len(names):
        problems.append(f"it has {num_tags} {IMAGE_TAG} tags, but {len(names)} pictures")
    if plain and not problems and (len(names) != 1 or dialogue != ["human", "gpt"]):
        problems.append("stage 1 takes rows of one picture, one question and one answer")
    return problems


def is_unicode(text: str) -> bool:
    """Whether there is no unpaired surrogate in a text: JSON lets them through, tokenizers and Arrow do not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_names(row: dict) -> list[str]:
    image = row.get("image")
    if image is None:
        return []
    return [image] if isinstance(image, str) else image


def read_table(path: str | os.PathLike, plain: bool = False) -> Dataset:
    """
    Rows of a file in the LLaVA format as a memory-mapped table, written once into the cache of `datasets`.

    Args:
        path (`str` or `os.PathLike`): The file, a JSON array or JSON lines.
        plain (`bool`, *optional*, defaults to `False`): See [`find_problems`].

    Returns:
        `Dataset` with `id`, `row` (its text in the file), `images` (names), `num_characters` and `problems`.

    Raises:
        ValueError: If the file is no JSON.
    """
    path, states = os.path.abspath(path), [os.stat(file) for file in (path, __file__)]
    key = repr([path, plain, *((state.st_size, state.st_mtime_ns) for state in states)])
    table = Path(datasets.config.HF_DATASETS_CACHE, "llava", f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow")
    if not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        unfinished = table.with_suffix(".incomplete")
        # one process of all nodes writes; what a killed one has left is written over
        with FileLock(table.with_suffix(".lock")):
            if not table.exists():
                _write_table(path, plain, unfinished)
                unfinished.replace(table)
    return Dataset.from_file(str(table))


def _write_table(path: str, plain: bool, table: Path) -> None:
    rows = iter(tqdm(read_rows(path), desc=f"Reading {os.path.basename(path)}", unit=" rows"))
    try:
        with pa.OSFile(str(table), "wb") as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as writer:
            for batch in _to_batches(rows, plain):
                writer.write_batch(batch)
    except BaseException:
        table.unlink(missing_ok=True)
        raise


def _to_batches(rows: Iterator[tuple[Any, str]], plain: bool, batch_size: int = 1000) -> Iterator[pa.RecordBatch]:
    for start in itertools.count(step=batch_size):
        columns: dict[str, list] = {name: [] for name in FEATURES}
        for index, (row, text) in enumerate(itertools.islice(rows, batch_size), start):
            problems = find_problems(row, plain)
            row_id = str(row.get("id", index) if isinstance(row, dict) else index)
            columns["id"].append(row_id.encode(errors="replace").decode())
            columns["row"].append(text)
            columns["images"].append([] if problems else _image_names(row))
            columns["num_characters"].append(
                0 if problems else sum(len(turn["value"]) for turn in row["conversations"])
            )
            columns["problems"].append(problems)
        if not columns["id"]:
            return
        yield pa.RecordBatch.from_pydict(columns, schema=FEATURES.arrow_schema)


def find_broken_rows(
    table: Dataset, image_folder: str | os.PathLike, read_pictures: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """
    The rows that cannot be trained on.

    Args:
        table (`Dataset`): See [`read_table`].
        image_folder (`str` or `os.PathLike`): Where names of pictures begin.
        read_pictures (`bool`, *optional*, defaults to `False`):
            Whether to decode every picture, rather than look whether its file is there.

    Yields:
        `tuple`: Index of a row and what is wrong with it.
    """
    # One listing instead of a look-up for each of its files: much faster, above all on network file systems
    list_files = cache(lambda folder: frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset())

    def find_picture_problem(name: str) -> str | None:
        if not is_inside(image_folder, name):
            return f"picture {name!r} lies outside of {os.fspath(image_folder)!r}"
        folder, file = os.path.split(os.path.join(image_folder, name))
        if file not in list_files(folder):
            return f"picture {name!r} is missing in {os.fspath(image_folder)!r}"
        try:
            if read_pictures:
                PICTURE_READER(Path(folder, file))
        except ValueError as error:
            return f"picture {name!r} is broken: {error.__cause__ or error}"
        return None

    def find(columns: tuple[list[str], list[str]]) -> list[str]:
        problems, names = columns
        return problems + list(filter(None, map(find_picture_problem, names)))

    rows = zip(*(table.data[name].to_pylist() for name in ("problems", "images")), strict=True)
    if not read_pictures:
        yield from ((index, problems) for index, problems in enumerate(map(find, rows)) if problems)
        return
    with ThreadPool(os.cpu_count()) as pool:  # PIL decodes outside of Python's lock
        found = tqdm(pool.imap(find, rows, chunksize=64), "Checking rows", len(table), unit=" rows")
        yield from ((index, problems) for index, problems in enumerate(found) if problems)


def is_inside(folder: str | os.PathLike, name: str) -> bool:
    """
    Whether a name stays below a folder: data of others must not climb out of it, nor lead to the network. An absolute
    name says openly where it leads, and is as good as one below.
    """
    if "://" in name:
        return False
    if os.path.isabs(name) or ".." not in name:
        return True
    folder = os.path.abspath(folder)
    return os.path.abspath(os.path.join(folder, name)).startswith(os.path.join(folder, ""))


def write_whole(file: Path, text: str) -> None:
    """
    Writes a file so that it is there with all of its text, or as it was before.

    Raises:
        OSError: If it cannot be written; names it.
    """
    unfinished = file.with_name(f".{file.name}.incomplete")
    try:
        unfinished.write_text(text)
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {error}. Make room, or name another folder.") from error


def to_messages(conversations: list[dict]) -> list[dict]:
    """
    Turns of the LLaVA format as messages. Pictures come first in their message, wherever their tags stand, as in the
    released code's data loader.

    Args:
        conversations (`list[dict]`): Turns with `from` and `value`.

    Returns:
        `list[dict]`: Messages with `role` and `content`, a list of parts.
    """
    return [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": _to_parts(turn["value"])} for turn in conversations
    ]


def _to_parts(text: str) -> list[dict]:
    num_images = text.count(IMAGE_TAG)
    if num_images:
        text = text.replace(IMAGE_TAG, "").strip()
    return [{"type": "image"}] * num_images + [{"type": "text", "text": text}]


def to_chats(batch: dict[str, list], image_folder: str = "") -> dict[str, list]:
    """
    Samples of any supported form as TRL's collator takes them.

    Args:
        batch (`dict[str, list]`): Columns: `messages`, or `prompt` and `completion`, or `conversations`; and
            `images`, `image` or none.
        image_folder (`str`, *optional*): Put before names of pictures; by default the working directory.

    Returns:
        `dict[str, list]` with `messages` and `images`. Pictures given by name are paths: the image processor reads
        them when their batch is made. With `prompt` and `completion` also `num_answers`: only so many answers, the
        last ones, are learned; those inside the prompt are not.

    Raises:
        ValueError: If a name leads out of the folder, or to the network.
    """
    learned = {}
    if "conversations" in batch:
        chats = [to_messages(turns) for turns in batch["conversations"]]
    elif "messages" in batch:
        chats = batch["messages"]
    else:
        prompts = [_to_list("user", prompt) for prompt in batch["prompt"]]
        completions = [_to_list("assistant", completion) for completion in batch["completion"]]
        chats = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        learned["num_answers"] = [sum(m["role"] == "assistant" for m in completion) for completion in completions]
    if "images" in batch:
        images = [images or [] for images in batch["images"]]
    elif "image" in batch:
        images = [[] if image is None else [image] for image in batch["image"]]
    else:
        images = [[] for _ in chats]
    for name in (image for row in images for image in row if isinstance(image, str)):
        if not is_inside(image_folder, name):
            folder = image_folder or "the working directory"
            raise ValueError(f"Picture {name!r} lies outside of `image_folder` ({folder}). Name another.")
    images = [[Path(image_folder, image) if isinstance(image, str) else image for image in row] for row in images]
    return {"messages": [_with_tags_as_parts(chat) for chat in chats], "images": images, **learned}


def _to_list(role: str, text: str | list[dict]) -> list[dict]:
    return text if isinstance(text, list) else [{"role": role, "content": text}]


def _with_tags_as_parts(messages: list[dict]) -> list[dict]:
    has_tag = any(isinstance(m["content"], str) and IMAGE_TAG in m["content"] for m in messages)
    if not has_tag:
        return messages
    return [m if isinstance(m["content"], list) else {**m, "content": _to_parts(m["content"])} for m in messages]


def describe(table: Dataset, index: int, problems: list[str]) -> str:
    """One line about a broken row."""
    return f"row {index} (id {table[index]['id']!r}): {'; '.join(problems)}"


def leave_out_broken_rows(
    table: Dataset, path: str, image_folder: str | os.PathLike, skip_broken: bool, report: str | os.PathLike
) -> Dataset:
    """
    Refuses data with broken rows, or leaves them out and writes down which.

    Args:
        table (`Dataset`): See [`read_table`].
        path (`str`): The file that it was read from, for messages.
        image_folder (`str` or `os.PathLike`): Where names of pictures begin.
        skip_broken (`bool`): Whether to leave broken rows out. Every picture is decoded to find them.
        report (`str` or `os.PathLike`): JSON file for what was left out. If it is there already, the same rows are
            left out again, so that a run that goes on sees the same data.

    Raises:
        ValueError: If rows are broken and not to be skipped, or all are.
    """
    report = Path(report)
    if skip_broken and report.exists():
        broken = json.loads(report.read_text())
    else:
        found = find_broken_rows(table, image_folder, read_pictures=skip_broken)
        broken = [{"row": index, "id": table[index]["id"], "problems": problems} for index, problems in found]
    if broken and not skip_broken:
        lines = [describe(table, row["row"], row["problems"]) for row in broken[:MAX_MESSAGES]]
        raise ValueError(
            f"{len(broken)} of {len(table)} rows in {path} are broken:\n" + "\n".join(lines) + "\n"
            "See all with `python -m training.check_data`, mend them, or leave them out with `skip_broken: true`."
        )
    if skip_broken and not report.exists():
        report.parent.mkdir(parents=True, exist_ok=True)
        write_whole(report, json.dumps(broken, indent=1))
    if not broken:
        return table
    if len(broken) == len(table):
        raise ValueError(f"All {len(table)} rows in {path} are broken; see {report}.")
    return table.select(sorted(set(range(len(table))) - {row["row"] for row in broken}))


def load_data(
    data_path: str,
    image_folder: str | None = None,
    *,
    plain: bool = False,
    skip_broken: bool = False,
    report: str | os.PathLike = "skipped_rows.json",
    split: str = "train",
    streaming: bool = False,
    batch_size: int = 1,
) -> Dataset | IterableDataset:
    """
    Loads training data as chats with pictures that are read when their turn comes.

    Args:
        data_path (`str`):
            A file in the LLaVA format, or anything that `datasets` loads (a data file, a folder, a folder written by
            `save_to_disk`, a Hub id) with `messages`, `prompt` and `completion`, or `conversations`, and optionally
            `images` or `image`.
        image_folder (`str`, *optional*):
            Where names of pictures begin; by default the folder of the file or the folder itself, for what the Hub
            has the working directory.
        plain, skip_broken, report: See [`find_problems`] and [`leave_out_broken_rows`]; for the LLaVA format.
        split (`str`, *optional*, defaults to `"train"`): Split of what `datasets` loads.
        streaming (`bool`, *optional*, defaults to `False`): Whether `datasets` reads on demand.
        batch_size (`int`, *optional*, defaults to 1): See [`group_by_modality`]; for streaming.

    Returns:
        `Dataset` or, if streaming, `IterableDataset` of `messages` and `images`.

    Raises:
        FileNotFoundError: If a data file does not exist.
        ValueError: If the data has no form that is known here, or broken rows.
    """
    if Path(data_path).suffix in (".json", ".jsonl", ".csv", ".parquet") and not os.path.exists(data_path):
        raise FileNotFoundError(f"The data file {data_path} (`data_path` or `eval_data_path`) does not exist.")
    if image_folder is None:
        folder = os.path.dirname(data_path) if os.path.isfile(data_path) else data_path
        image_folder = os.path.abspath(folder) if os.path.exists(data_path) else ""
    if is_llava_file(data_path):
        table = read_table(data_path, plain)
        table = leave_out_broken_rows(table, data_path, image_folder, skip_broken, report)
        return table.with_transform(partial(_rows_to_chats, image_folder=image_folder))
    if os.path.isfile(data_path):
        suffix = Path(data_path).suffix.removeprefix(".")
        builder = {"jsonl": "json"}.get(suffix, suffix)
        dataset = load_dataset(builder, data_files=data_path, split="train", streaming=streaming)
    elif os.path.isfile(os.path.join(data_path, "state.json")):
        dataset = load_from_disk(data_path)
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    else:
        dataset = load_dataset(data_path, split=split, streaming=streaming)
    columns = dataset.column_names or list(next(iter(dataset)))
    if not {"messages", "conversations"} & set(columns) and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"`data_path` ({data_path}) must have a column `messages` or `conversations`, or both `prompt` and "
            f"`completion`, but has {', '.join(columns)}."
        )
    transform = partial(to_chats, image_folder=image_folder)
    if not streaming:
        return dataset.with_transform(transform)
    stream = dataset.map(transform, batched=True, batch_size=1, remove_columns=columns)
    return IterableDataset.from_generator(group_by_modality, gen_kwargs={"stream": stream, "batch_size": batch_size})


def group_by_modality(stream: Iterable[dict], batch_size: int) -> Iterator[dict]:
    """
    The samples of a stream in another order: `batch_size` with pictures or `batch_size` without at a time, so that no
    batch mixes them. At the end, each of the two kinds is filled up with some of its last samples again.
    """
    waiting: dict[bool, list[dict]] = {True: [], False: []}
    for sample in stream:
        group = waiting[len(sample["images"]) > 0]
        group.append(sample)
        if len(group) == batch_size:
            yield from group
            group.clear()
    for group in filter(None, waiting.values()):
        yield from itertools.islice(itertools.cycle(group), batch_size)


def is_llava_file(path: str) -> bool:
    """Whether a path is a JSON file whose first row has `conversations`, or is no row of another known form."""
    if Path(path).suffix not in (".json", ".jsonl") or not os.path.isfile(path):
        return False
    row, _ = next(read_rows(path, chunk_size=2**16), ({}, ""))
    return not isinstance(row, dict) or not {"messages", "prompt"} & set(row)


def _rows_to_chats(batch: dict[str, list], image_folder: str) -> dict[str, list]:
    rows = [json.loads(row) for row in batch["row"]]
    images = [_image_names(row) for row in rows]
    return to_chats({"conversations": [row["conversations"] for row in rows], "images": images}, image_folder)


def get_lengths(dataset: Dataset) -> tuple[list[int], list[bool]]:
    """
    What samples are grouped by, found without reading a picture.

    Args:
        dataset (`Dataset`): See [`load_data`].

    Returns:
        `tuple`: For each sample, the length of its text and whether it has a picture.
    """
    columns = dataset.column_names
    if "num_characters" in columns:
        lengths = dataset.select_columns(["num_characters"]).with_format("arrow")[:]["num_characters"].to_pylist()
    else:
        text = dataset.with_format(None).select_columns(sorted(set(columns) & TEXT_COLUMNS))
        lengths = text.map(lambda row: {"length": len(str(row))}, remove_columns=text.column_names)["length"][:]
    if "images" in columns:
        pictures = dataset.select_columns(["images"]).with_format("arrow")[:]["images"]
        has_picture = pc.fill_null(pc.greater(pc.list_value_length(pictures), 0), False)
    elif "image" in columns:
        has_picture = dataset.select_columns(["image"]).with_format("arrow")[:]["image"].is_valid()
    else:
        return lengths, [False] * len(lengths)
    return lengths, has_picture.to_pylist()
