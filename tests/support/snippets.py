# SPDX-License-Identifier: Apache-2.0
"""The code in the documents: blocks, and the commands of a bash block as bash expands them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
PROGRAMS = ("accelerate", "docker", "lmms-eval", "make", "pip", "python", "python3", "ray", "torchrun", "vllm")
# Notes its name, its arguments and what is piped into it. `python -c` computes values, and does run.
PROGRAM = f"""#!{sys.executable} -SE
import json, os, sys
if sys.argv[1:2] == ["-c"]:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:], sys.stdin.read()]) + "\\n")
"""


def get_blocks(document: str) -> list[tuple[str, str]]:
    """Language and text of each bash and Python block of a document, named by its path in the checkout."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)


def expand(block: str, folder: Path) -> list[list[str]]:
    """
    Runs a block with bash, in which the programs above only note how they were called.

    Args:
        block (`str`): The block. Another program than these is an error.
        folder (`Path`): Where it runs; it gets `.venv/bin` with the programs.

    Returns:
        `list[list[str]]`: Of each call the program, its arguments and, at the end, what was piped into it.
    """
    programs, calls = folder / ".venv" / "bin", folder / "calls.jsonl"
    programs.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    calls.write_text("")
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["bash", "-euc", block], cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=True)
    return [json.loads(line) for line in calls.read_text().splitlines()]
