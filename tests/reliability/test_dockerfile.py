# SPDX-License-Identifier: Apache-2.0
"""
The Dockerfile, step by step without Docker: its commands run in a folder that takes the place of the image's root,
with a new virtual environment in place of the base's Python.

What differs from a build: packages that are installed here already are not downloaded again (so `pip install` of torch
finds it there, and the package itself is built without isolation); `useradd` and `install --owner`, which need root,
are only looked at; the kernel does not separate users, files and network.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import openai
import pytest
from converted_checkpoints import ROOT, TINY_MODEL
from loopback_server import make_messages, run_server, to_data_url


LINES = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text()).splitlines()
STEPS = [tuple(line.split(maxsplit=1)) for line in LINES if line and not line.startswith("#")]
FROM = STEPS.index(("FROM", "${BASE}"))


def is_ignored(name: str) -> bool:
    """Whether .dockerignore keeps a path of the checkout's root out of the build; the last rule that fits decides."""
    ignored = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if not rule.startswith("#") and fnmatch.fnmatch(name, rule.removeprefix("!")):
            ignored = not rule.startswith("!")
    return ignored


class Image:
    """What a build makes: a root folder with a Python of its own, and what the container runs."""

    def __init__(self, root: Path):
        self.root, self.folder, self.user, self.unprivileged = root, root, "root", []
        # "0" is how pip spells that there is no isolation
        self.environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": ""}
        self.metadata: dict[str, str] = {}
        venv.create(root / "python", symlinks=True)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(root / "python")}))
        (site / "installed.pth").write_text(sysconfig.get_path("purelib"))
        self.environment["PATH"] = f"{root / 'python' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        for kind, value in STEPS[FROM + 1 :]:
            if kind == "ARG":
                name, _, default = value.partition("=")
                self.environment[name] = default
            elif kind == "ENV":
                self.environment |= dict(word.split("=") for word in shlex.split(value))
            elif kind == "WORKDIR":
                self.folder = self.map(value)
                self.folder.mkdir(parents=True, exist_ok=True)
            elif kind == "USER":
                self.user = value
            elif kind == "COPY":
                self.copy(*value.split())
            elif kind == "RUN":
                self.run(value)
            else:
                self.metadata[kind] = value

    def map(self, path: str) -> Path:
        return self.root / path.lstrip("/") if path.startswith("/") else self.folder / path

    def copy(self, *names: str) -> None:
        for name in names[:-1]:
            assert not is_ignored(name), name
            target = self.map(names[-1]) / name if names[-1].endswith("/") else self.map(names[-1])
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)

    def run(self, command: str) -> None:
        assert self.user == "root", command
        if command.startswith("useradd "):
            self.unprivileged.append(command)
        else:
            subprocess.run(["sh", "-ec", command], cwd=self.folder, env=self.environment, check=True)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


def test_the_build_gets_what_the_wheel_needs_and_nothing_else():
    names = {path.name for path in ROOT.iterdir() if not is_ignored(path.name)}
    assert names == {"LICENSE", "README.md", "modeling_llava_hr", "pyproject.toml", "setup.cfg"}
    assert dict(STEPS[:FROM])["ARG"] == "BASE=python:3.12-slim"


def test_torch_comes_from_the_named_index(image):
    (install,) = (value for kind, value in STEPS if kind == "RUN" and " torch " in value)
    for index, expected in (("", []), ("https://example.org/cpu", ["--index-url", "https://example.org/cpu"])):
        command = install.replace("python3 -m pip", "printf '%s\\n' pip")
        environment = {**image.environment, "TORCH_INDEX": index}
        printed = subprocess.run(["sh", "-ec", command], env=environment, capture_output=True, text=True, check=True)
        assert printed.stdout.split() == ["pip", "install", "--no-cache-dir", "torch", "torchvision", *expected]


def test_the_container_answers(image, tmp_path):
    """The installed package, not the checkout, as the image's user starts it, with a model at /model."""
    (added,) = image.unprivileged
    assert image.user == "llava" and added.startswith("useradd --create-home llava")
    (model,) = json.loads(image.metadata["CMD"])
    assert model == "/model"
    image.map(model).symlink_to(TINY_MODEL)
    where = {"cwd": image.folder, "env": image.environment, "text": True}
    package = ["python3", "-c", "from importlib.util import find_spec; print(find_spec('modeling_llava_hr').origin)"]
    assert Path(subprocess.check_output(package, **where)).is_relative_to(image.root)
    entrypoint = json.loads(image.metadata["ENTRYPOINT"])
    with run_server(image.map(model), tmp_path, entrypoint, image.folder, image.environment) as (address, _):
        port = address.rpartition(":")[2]
        health = image.metadata["HEALTHCHECK"].partition("CMD ")[2]
        assert image.metadata["EXPOSE"] in health
        subprocess.run(["sh", "-c", health.replace(image.metadata["EXPOSE"], port)], check=True, **where)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        (served,) = client.models.list()
        url = to_data_url((ROOT / "examples" / "pictures" / "street.jpg").read_bytes(), "image/jpeg")
        messages = make_messages("What does the green sign say?", url)
        reply = client.chat.completions.create(model=served.id, messages=messages, temperature=0, max_tokens=12)
    assert reply.choices[0].message.content.strip() == "1471"
