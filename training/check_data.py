# SPDX-License-Identifier: Apache-2.0
"""
Reports what is wrong with training data of any format, row by row:

    python -m training.check_data data/llava_v1_5_mix665k.json --image_folder data

Every image is decoded. The exit status is 1 if a row is broken.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field

from tqdm.auto import tqdm
from transformers import AutoProcessor, HfArgumentParser

from modeling_llava_hr.utils import run_command

from .checks import LengthLimit, describe, find_broken_rows
from .data import DataConfig, load_table


@dataclass
class CheckOptions:
    """What is checked. See [`~training.data.DataConfig`]."""

    data_path: str = field(metadata={"help": "file, folder or Hub id of the data"})
    image_folder: str | None = field(default=None, metadata={"help": "folder that relative image names start from"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset with several"})
    split: str = field(default="train", metadata={"help": "split of a dataset with several"})
    plain: bool = field(default=False, metadata={"help": "the data is for stage 1: one image, one caption"})
    model: str | None = field(default=None, metadata={"help": "whose processor counts tokens, for max_length"})
    max_length: int | None = field(default=None, metadata={"help": "largest number of tokens, image tokens included"})


def check_data(options: CheckOptions) -> int:
    """Prints a line for each broken row and a summary, and returns the number of broken rows."""
    limit = None
    if options.model is not None and options.max_length is not None:
        limit = LengthLimit(AutoProcessor.from_pretrained(options.model), options.max_length)
    elif options.model is not None or options.max_length is not None:
        raise ValueError("`model` and `max_length` belong together: give both, or neither.")
    place = (options.data_path, options.image_folder, options.dataset_config, options.split)
    table, source = load_table(DataConfig(*place, plain=options.plain))
    broken = find_broken_rows(table, source, decode=True, limit=limit)
    kinds: Counter[str] = Counter()
    columns = table.select_columns(["file", "row", "id"])
    for index, problems in broken.items():
        tqdm.write(describe(columns[index], problems, options.data_path))
        # names and numbers differ between rows with the same kind of problem
        kinds.update({re.sub(r"'[^']*'|\d+", "…", problem.split(":")[0]) for problem in problems})
    print(f"{options.data_path}: {len(table)} rows, {len(broken)} broken")
    for kind, count in kinds.most_common():
        print(f"  {count} rows: {kind}")
    return len(broken)


def main() -> int:
    """Checks the data; returns the exit status, 1 if a row is broken."""
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data_path", *arguments]
    return check_data(*HfArgumentParser(CheckOptions).parse_args_into_dataclasses(arguments)) > 0


if __name__ == "__main__":
    run_command(main)
