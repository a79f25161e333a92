# SPDX-License-Identifier: Apache-2.0
"""Commands of this project as processes that begin at once, so that tests can afford many of them, and kill them."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parent.parent.parent

# Imports what takes long, then forks for each command. What runs in the child is what `python -m MODULE` runs.
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
if request["user"]:
    os.setresuid(*[request["user"]] * 3)
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
    """How a command ended: its exit status (negative: the signal), what it said, how many seconds it took."""

    status: int
    output: str
    seconds: float


class Commands:
    """
    Runs commands one after the other; a context manager.

    Args:
        folder (`Path`): For logs and temporary files.
        modules: What is imported beforehand, and so stays as it is for all commands.
        wrapper: Command line in which Python is started.
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
        user: int = 0,
        timeout: float = 300,
    ) -> Ended:
        """
        Runs `python -m MODULE ARGUMENTS`, or `code`.

        Args:
            module (`str`, *optional*): Module.
            arguments: Its arguments.
            code (`str`): A script instead of a module.
            kill_after (`float`): Seconds until SIGKILL, unless it ends before; 0 for none.
            user (`int`): Number of the user who runs it; 0 for this one.
            timeout (`float`): Seconds after which it hangs, which is an error.
        """
        self.log.write_bytes(b"")
        request = {"module": module, "arguments": [*map(str, arguments)], "code": code, "log": str(self.log)}
        self.server.stdin.write(json.dumps({**request, "user": user}).encode() + b"\n")
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
