# SPDX-License-Identifier: Apache-2.0
"""
SIGKILL at random moments of a command that writes something: afterwards nothing is half-written, the same command
completes, and the result equals that of an undisturbed run.

    work = Work("converting", (MODULE, *arguments), lambda: read_files(output), is_all_or_nothing, remove(output))
    survive(commands, work, number=5, generator=random.Random(0))
"""

import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from forked_commands import Commands


IN_A_ROW = 3  # kills before the command may complete


@dataclass
class Work:
    """
    A command that writes something.

    Args:
        name (`str`): Its name in the report.
        command (`tuple`): Module and arguments; a script in the place of the module if it has several lines.
        read (`Callable`): Returns what is visible of the result: names and contents.
        check (`Callable`): Takes what is visible after a kill and the complete result; fails if something is
            half-written.
        clear (`Callable`): Removes the result.
        refuses_again (`bool`): Whether the command refuses to run when its result is complete.
    """

    name: str
    command: tuple[Any, ...]
    read: Callable[[], dict]
    check: Callable[[dict, dict], None]
    clear: Callable[[], None]
    refuses_again: bool = False

    def run(self, commands: Commands, **options):
        module, *arguments = self.command
        if "\n" in module:
            return commands.run(None, *arguments, code=module, **options)
        return commands.run(module, *arguments, **options)


def remove(folder: Path) -> Callable[[], None]:
    return partial(shutil.rmtree, folder, ignore_errors=True)


def read_files(folder: Path) -> dict[str, bytes]:
    """Contents of the files that are in a folder itself, but for hidden ones."""
    files = folder.iterdir() if folder.exists() else []
    return {file.name: file.read_bytes() for file in files if file.is_file() and not file.name.startswith(".")}


def is_all_or_nothing(seen: dict, whole: dict) -> None:
    assert seen in ({}, whole)


def has_whole_files(seen: dict, whole: dict) -> None:
    for name, content in seen.items():
        assert content == whole[name], name


def has_first_lines(seen: dict, whole: dict) -> None:
    """The lines that are complete are the first ones of the complete result."""
    for name, content in seen.items():
        lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
        assert lines == whole[name].splitlines(keepends=True)[: len(lines)], name


def survive(commands: Commands, work: Work, number: int, generator: random.Random) -> int:
    """Kills a command `number` times, checks the files it left each time, and returns how often it was unfinished."""
    work.clear()
    undisturbed = work.run(commands)
    assert undisturbed.status == 0, undisturbed.output
    whole, seconds = work.read(), undisturbed.seconds
    assert whole
    kills = attempts = unfinished = 0
    while kills < number:
        work.clear()
        for in_a_row in range(min(IN_A_ROW, number - kills)):
            attempts += 1
            assert attempts <= 5 * number + 10, f"{work.name}: ends before it can be killed"
            ended = work.run(commands, kill_after=generator.uniform(0.05, 1) * seconds)
            assert ended.status in (0, -signal.SIGKILL), ended.output
            if ended.status == 0 and in_a_row == 0:  # the machine has become faster
                seconds = min(seconds, ended.seconds)
            kills += ended.status < 0
            unfinished += ended.status < 0 and work.read() != whole
            work.check(work.read(), whole)
            if work.refuses_again and work.read():
                break
        else:
            completed = work.run(commands)
            assert completed.status == 0, completed.output
        assert work.read().keys() == whole.keys()
        has_whole_files(work.read(), whole)
    return unfinished
