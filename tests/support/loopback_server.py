# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible server as users run it: a process of its own on a free port of this machine."""

import base64
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import image_views
import psutil
from PIL import Image


ROOT = Path(__file__).parent.parent.parent
TINY_MODEL = ROOT / "examples" / "tiny-llava-hr"
PATIENCE = 300  # seconds for start and end on a busy machine


def encode(image: Image.Image) -> str:
    """An image as a data URL."""
    return to_data_url(image_views.encode(image))


def to_data_url(file: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"


@contextlib.contextmanager
def run_server(
    model: Path,
    folder: Path,
    command: Sequence[str] = (sys.executable, "-m", "modeling_llava_hr.integrations.serve"),
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[str, psutil.Process]]:
    """
    Starts a server with an empty cache and without network; at the end SIGTERM must end it in good order.

    Args:
        model (`Path`): Folder. The server has it under its path relative to `cwd`.
        folder (`Path`): Where its log goes.
        command: What starts it.
        cwd (`Path`): Where it starts.
        environment (`dict[str, str]`, *optional*): By default this process's.

    Yields:
        Its address, such as `http://127.0.0.1:41234`, and its process.
    """
    log = folder / "server.log"
    environment = {**(environment or os.environ), "HF_HOME": str(folder / "none"), "HF_HUB_OFFLINE": "1"}
    command = [*command, os.path.relpath(model, cwd), "--port", "0", "--device", "cpu"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=stream, stderr=stream)
    try:
        until = time.monotonic() + PATIENCE
        while not (address := re.search(r"running on http://[\d.]+:(\d+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{address[1]}", psutil.Process(process.pid)
        process.terminate()
        assert process.wait(timeout=PATIENCE) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
