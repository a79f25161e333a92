# SPDX-License-Identifier: Apache-2.0
"""
Reports what is wrong with training data in the LLaVA format, row by row:

    python -m training.check_data data/llava_v1_5_mix665k.json --image_folder data

Every picture is decoded. The exit status is 1 if a row is broken.
"""

import argparse
import os
import re
import sys
from collections import Counter

from tqdm.auto import tqdm

from .data import describe, find_broken_rows, read_table


def check_data(file: str, image_folder: str | None = None, plain: bool = False) -> int:
    """
    Prints a line for each broken row and a summary.

    Args:
        file (`str`): The data, a JSON array or JSON lines.
        image_folder (`str`, *optional*): Where names of pictures begin; by default the folder of the file.
        plain (`bool`, *optional*, defaults to `False`): Whether the data is for stage 1.

    Returns:
        `int`: The number of broken rows.

    Raises:
        ValueError: If the file is no JSON.
    """
    table = read_table(file, plain)
    if image_folder is None:
        image_folder = os.path.dirname(os.path.abspath(file))
    num_broken = 0
    kinds: Counter[str] = Counter()
    for index, problems in find_broken_rows(table, image_folder, read_pictures=True):
        tqdm.write(describe(table, index, problems))
        num_broken += 1
        # what is quoted or counted differs between rows with the same kind of problem
        kinds.update({re.sub(r"'[^']*'|\d+", "…", problem.split(":")[0]) for problem in problems})
    print(f"{file}: {len(table)} rows, {num_broken} broken")
    for kind, count in kinds.most_common():
        print(f"  {count} rows: {kind}")
    return num_broken


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m training.check_data", description=(check_data.__doc__ or "").split("\n")[1]
    )
    parser.add_argument("file", help="the data, a JSON array or JSON lines")
    parser.add_argument("--image_folder", help="where names of pictures begin; by default the folder of the file")
    parser.add_argument("--plain", action="store_true", help="the data is for stage 1: one picture, one caption")
    try:
        sys.exit(check_data(**vars(parser.parse_args())) > 0)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
