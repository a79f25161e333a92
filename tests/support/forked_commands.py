# SPDX-License-Identifier: Apache-2.0
"""
The one harness that runs commands of this project as processes, kills them and fills their disk. Each command is
forked from a process that has imported everything, so that tests can afford many of them. Fixtures:

    commands      runs a command: `commands.run(MODULE, *arguments)`, `run(code=...)`, `run(..., kill_after=SECONDS)`
    disk          a small disk that only commands see: `disk.leave(num_bytes)` fills it, `disk.free()` empties it
    read_only     a folder that is a read-only disk to the commands

`assert_one_message(ended, *parts)` checks that a command ended with one line that names the error, and
`kills.survive` kills a command at random moments and completes it. A further command needs its module in `MODULES`.
"""

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from loopback_hub import Hub


ROOT = Path(__file__).parents[2]
CONVERT = "conversion.convert_llava_hr_weights_to_hf"
MODULES = (
    *(CONVERT, "examples.caption_folder", "examples.publish", "training.evaluate", "training.train"),
    *("timm", "sentencepiece", "google.protobuf.descriptor_pb2", "transformers.tokenization_utils_sentencepiece"),
)

# Imports what takes long, then forks for each command. The child runs the same as `python -m MODULE`.
SERVER = """
import importlib, json, os, runpy, sys, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

with open(request["log"], "ab", 0) as log, open(os.devnull) as nothing:
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source.fileno(), target)
sys.argv = ["", *request["arguments"]]
status = 0
try:
    if request["code"]:
        exec(request["code"], {"__name__": "__main__"})
    else:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
except SystemExit as error:
    status = error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error.code, str):
        print(error.code, file=sys.stderr)
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
# An interpreter with torch needs two seconds to end, in which nothing is left that a kill could disturb
os._exit(status)
"""


class Ended(NamedTuple):
    """How a command ended: its exit status (negative: the signal), its output, and how many seconds it took."""

    status: int
    output: str
    seconds: float


class Commands:
    """
    Runs commands one after the other; a context manager.

    Args:
        folder (`Path`): For logs and temporary files.
        modules: Modules that are imported beforehand, and so are the same for all commands.
        wrapper: Command line that starts Python.
        environment: Added to this process's.
    """

    def __init__(self, folder: Path, *modules: str, wrapper: Sequence[str] = (), **environment: str):
        self.log, self.temporary = folder / "log", folder / "temporary"
        self.temporary.mkdir(parents=True)
        self.server = subprocess.Popen(
            [*wrapper, sys.executable, "-W", "ignore", "-c", SERVER, *modules],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self.temporary)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # what is not read yet stays in the pipe, where `select` sees it
        )

    def __enter__(self):
        assert self._read(300) == "ready"
        return self

    def __exit__(self, *error):
        self.server.stdin.close()
        if error[0]:
            self.server.kill()
        self.server.wait()
        self.server.stdout.close()

    def run(
        self,
        module: str | None = None,
        *arguments: str | Path,
        code: str = "",
        kill_after: float = 0,
        timeout: float = 300,
    ) -> Ended:
        """
        Runs `python -m MODULE ARGUMENTS`, or `code`.

        Args:
            module (`str`, *optional*): Module.
            arguments: Its arguments.
            code (`str`): A script instead of a module.
            kill_after (`float`): Seconds until SIGKILL, unless the command ends before; 0 for none.
            timeout (`float`): Seconds after which the test fails: the command hangs.
        """
        self.log.write_bytes(b"")
        request = {"module": module, "arguments": [*map(str, arguments)], "code": code, "log": str(self.log)}
        self.server.stdin.write(json.dumps(request).encode() + b"\n")
        child, start = int(self._read(timeout)), time.monotonic()
        if not self._has_answer(kill_after or timeout):
            with contextlib.suppress(ProcessLookupError):  # ended just now
                os.kill(child, signal.SIGKILL)
            assert kill_after, f"{module} hangs: {self.log.read_text()[-4000:]}"
        status = int(self._read(timeout))
        return Ended(status, self.log.read_text(errors="replace"), time.monotonic() - start)

    def _has_answer(self, timeout: float) -> bool:
        return bool(select.select([self.server.stdout], [], [], timeout)[0])

    def _read(self, timeout: float) -> str:
        assert self._has_answer(timeout), "no answer"
        line = self.server.stdout.readline()
        assert line, "the process that forks has ended"
        return line.decode().strip()


# A small disk and a read-only one, which only the commands see. Whoever is not root becomes it for them alone.
UNSHARE = ("unshare", "--mount") if os.name == "posix" and os.geteuid() == 0 else ("unshare", "-r", "--mount")
MOUNT = 'mount -t tmpfs -o size=16m none "$0" && mount -t tmpfs -o ro none "$1" && shift && exec "$@"'


@functools.cache
def can_mount() -> bool:
    try:
        command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


class Disk:
    """
    A disk of 16 MB.

    Attributes:
        path (`Path`): Where commands find it.
        seen (`Path`): Where the test finds its files.
    """

    def __init__(self, path: Path, seen: Path):
        self.path, self.seen, self.filler = path, seen, seen / "filler"

    def leave(self, num_bytes: int = 0) -> None:
        """Fills the disk but for `num_bytes`."""
        status = os.statvfs(self.seen)
        with self.filler.open("ab") as file:
            file.write(bytes(status.f_bfree * status.f_bsize))
        os.truncate(self.filler, self.filler.stat().st_size - num_bytes)

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def mounted(tmp_path_factory) -> tuple[Path, Path]:
    """Folders in whose place the commands see the small disk and the read-only one."""
    return tmp_path_factory.mktemp("small-disk"), tmp_path_factory.mktemp("read-only")


@pytest.fixture(scope="session")
def all_commands(hub_server, mounted, tmp_path_factory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("commands")
    environment = {**hub_server.environment, "HF_TOKEN": hub_server.token, "HF_HOME": str(folder / "home")}
    environment["HF_DATASETS_CACHE"] = str(folder / "tables")
    wrapper = (*UNSHARE, "sh", "-c", MOUNT, *map(str, mounted)) if can_mount() else ()
    with Commands(folder / "run", *MODULES, wrapper=wrapper, **environment) as commands:
        yield commands


@pytest.fixture
def commands(all_commands, hub: Hub) -> Commands:
    """Runs commands, which know the loopback Hub alone."""
    return all_commands


@pytest.fixture
def disk(commands, mounted) -> Disk:
    """The small disk, empty."""
    if not can_mount():
        pytest.skip("mounting needs Linux with user namespaces, or root")
    disk = Disk(mounted[0], Path(f"/proc/{commands.server.pid}/root{mounted[0]}"))
    for path in disk.seen.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return disk


@pytest.fixture
def read_only(disk, mounted) -> Path:
    """A folder that is a read-only disk to the commands."""
    return mounted[1]


def assert_one_message(ended: Ended, *parts: str) -> None:
    """Ended with status 1 and one line that begins with `error:` and contains `parts`."""
    assert ended.status == 1, ended.output
    assert "Traceback" not in ended.output, ended.output[-4000:]
    errors = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.output
    for part in parts:
        assert part in errors[0]
