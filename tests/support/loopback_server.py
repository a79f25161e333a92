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
from typing import Any

import image_views
import psutil
from converted_checkpoints import ROOT
from PIL import Image


PATIENCE = 300  # seconds for whatever a busy machine takes long for


def encode(image: Image.Image) -> str:
    """An image as a data URL."""
    return to_data_url(image_views.encode(image))


def to_data_url(file: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"


def make_messages(text: str, url: str) -> list[dict]:
    """A question about an image, a data URL, in OpenAI's form."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


@contextlib.contextmanager
def run_process(command: Sequence[Any], log: Path, **options: Any) -> Iterator[tuple[str, psutil.Popen]]:
    """
    Starts a server, and ends it.

    Args:
        command: What starts it.
        log (`Path`): Where its output goes.
        options: Those of `Popen`.

    Yields:
        The address that it prints once it listens, such as `http://127.0.0.1:41234`, and its process.
    """
    with log.open("w") as stream:
        process = psutil.Popen(list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, **options)
    try:
        until = time.monotonic() + PATIENCE
        while not (address := re.search(r"[Rr]unning on .*(http://[\d.]+:\d+)", log.read_text(errors="replace"))):
            assert process.poll() is None and time.monotonic() < until, log.read_text(errors="replace")
            time.sleep(0.2)
        yield address[1], process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            process.kill()
        process.wait()


@contextlib.contextmanager
def run_server(
    model: Path,
    folder: Path,
    command: Sequence[str] = (sys.executable, "-m", "modeling_llava_hr.integrations.serve"),
    cwd: Path = ROOT,
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[str, psutil.Popen]]:
    """
    Starts a server with an empty cache and without network; at the end SIGTERM must end it in good order.

    Args:
        model (`Path`): Folder. The server has it under its path relative to `cwd`.
        folder (`Path`): Where its log goes.
        command: What starts it.
        cwd (`Path`): Where it starts.
        environment (`dict[str, str]`, *optional*): By default this process's.

    Yields:
        Its address and its process.
    """
    log = folder / "server.log"
    environment = {**(environment or os.environ), "HF_HOME": str(folder / "none"), "HF_HUB_OFFLINE": "1"}
    command = [*command, os.path.relpath(model, cwd), "--port", 0, "--device", "cpu"]
    with run_process(command, log, cwd=cwd, env=environment) as (address, process):
        yield address, process
        process.terminate()
        assert process.wait(PATIENCE) == 0, log.read_text()
