# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What `push_to_hub` uploads loads by its name with `trust_remote_code=True` without this package.

The Hub cannot be reached in tests. `Hub` stands in for it: a server on this machine that speaks as much of the Hub's
protocol as `huggingface_hub` needs here. Files go through the commit itself, as small ones do: uploads to large-file
storage (LFS, Xet) are not covered.
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import load, load_file


ROOT = Path(__file__).parent.parent.parent
USER, TOKEN = "someone", "hf_dummy"


class Hub(ThreadingHTTPServer):
    """Repositories of models in memory. A commit is kept as a whole, by its hash; `main` is the newest one."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, hash, path
        self.unknown: list[str] = []  # repositories that were asked for and do not exist

    def read(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """Hash and files of a revision."""
        commits = self.commits[repo_id]
        commit = next(reversed(commits)) if revision == "main" else revision
        return commit, commits[commit]

    def write(self, repo_id: str, changes: dict[str, bytes]) -> str:
        """Hash of a new commit on top of the newest one."""
        commit = f"{len(self.commits[repo_id]):040x}"
        self.commits[repo_id][commit] = self.read(repo_id)[1] | changes
        return commit


class HubHandler(BaseHTTPRequestHandler):
    """A method for each route. Named groups of a route are its arguments; a revision is replaced by what it holds."""

    server: Hub
    repository = r"(?P<repo_id>[^/]+/[^/]+)"
    routes = {
        r"POST /api/repos/create": "create",
        r"POST /api/validate-yaml": "validate_yaml",
        rf"POST /api/models/{repository}/preupload/main": "preupload",
        rf"POST /api/models/{repository}/commit/main": "commit",
        rf"GET /api/models/{repository}(/revision/(?P<revision>[^/]+))?": "info",
        rf"GET /api/models/{repository}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": "tree",
        rf"(GET|HEAD) /{repository}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
    }

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        matches = ((re.fullmatch(pattern, request), name) for pattern, name in self.routes.items())
        match, name = next((found for found in matches if found[0]), (None, None))
        arguments = match.groupdict() if match else {}
        repo_id = arguments.get("repo_id")
        if match is None:
            self.answer({"error": "Not Found"}, 404)
        elif self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif repo_id and repo_id not in self.server.commits:
            self.server.unknown.append(repo_id)
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            if "revision" in arguments:
                revision = arguments.pop("revision") or "main"
                arguments["commit"], arguments["files"] = self.server.read(repo_id, revision)
            getattr(self, name)(**arguments)

    do_GET = do_HEAD = do_POST = handle_request

    def answer(self, body: dict | list | bytes, status: int = 200, headers: dict[str, str] | None = None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass

    def create(self):
        options = json.loads(self.body)
        repo_id = f"{options['organization'] or USER}/{options['name']}"
        exists = repo_id in self.server.commits
        self.server.commits.setdefault(repo_id, {"0" * 40: {".gitattributes": b""}})
        self.answer({"url": f"{self.server.url}/{repo_id}"}, 409 if exists else 200)

    def validate_yaml(self):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo_id: str):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})

    def commit(self, repo_id: str):
        header, *changes = map(json.loads, self.body.splitlines())
        assert header["key"] == "header" and all(change["key"] == "file" for change in changes)
        files = (change["value"] for change in changes)
        commit = self.server.write(repo_id, {file["path"]: base64.b64decode(file["content"]) for file in files})
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url})

    def info(self, repo_id: str, commit: str, files: dict[str, bytes]):
        self.answer({"id": repo_id, "sha": commit, "tags": [], "siblings": [{"rfilename": path} for path in files]})

    def tree(self, repo_id: str, commit: str, files: dict[str, bytes], folder: str | None):
        prefix = f"{folder}/" if folder else ""
        tree = [
            {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for path, content in files.items()
            if path.startswith(prefix)
        ]
        self.answer(tree) if tree else self.answer({}, 404, {"X-Error-Code": "EntryNotFound"})

    def resolve(self, repo_id: str, commit: str, files: dict[str, bytes], path: str):
        headers = {"X-Repo-Commit": commit}
        if path in files:
            headers["ETag"] = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer(files[path], headers=headers)
        else:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", **headers})


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


PUSH = """
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr

folder, name = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(folder).push_to_hub(name)
AutoProcessor.from_pretrained(folder).push_to_hub(name)
"""

# Runs where `import modeling_llava_hr` fails; a third argument is the name to upload again under
LOAD = """
import sys
sys.modules["modeling_llava_hr"] = None

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
)

repo_id, output, *again = sys.argv[1:]
trust = {"trust_remote_code": True}

def load(auto_class, name, **kwargs):
    loaded = auto_class.from_pretrained(repo_id, **trust, **kwargs)
    assert type(loaded).__name__ == name, type(loaded)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    return loaded

load(AutoConfig, "LlavaHrConfig")
processor = load(AutoProcessor, "LlavaHrProcessor")
base = load(AutoModel, "LlavaHrModel").state_dict()
model = load(AutoModelForImageTextToText, "LlavaHrForConditionalGeneration")
assert all(torch.equal(base[name], weight) for name, weight in model.model.state_dict().items())
save_file({name: weight.clone() for name, weight in model.state_dict().items()}, output)

image = Image.new("RGB", (50, 40), "teal")
for backend, name in (("torchvision", "LlavaHrImageProcessor"), ("pil", "LlavaHrImageProcessorPil")):
    pixels = load(AutoImageProcessor, name, backend=backend)(image, return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 336, 336)
    assert pixels["high_res_pixel_values"].shape == (1, 3, 384, 384)
tokenizer = AutoTokenizer.from_pretrained(repo_id, **trust)
assert tokenizer.decode(tokenizer("Hi", add_special_tokens=False)["input_ids"]) == "Hi"

messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}]
pipe = pipeline("image-text-to-text", model=repo_id, **trust)
text = pipe(messages, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
assert text
print("ANSWER", repr(text))

for name in again:
    model.push_to_hub(name)
    processor.push_to_hub(name)
"""


def run(code: str, *arguments: str | Path, hub: Hub, folder: Path, **environment: str) -> str:
    """Output of a script in a process with a cache of its own that knows the stand-in only."""
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env={
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def assert_holds(files: dict[str, bytes], expected: Path):
    """The repository holds the weights of a converted folder and this checkout's code."""
    assert_same_weights(load(files["model.safetensors"]), expected)
    code = {path: content for path, content in files.items() if path.endswith(".py")}
    assert code == {path.name: path.read_bytes() for path in (ROOT / "modeling_llava_hr").glob("*_llava_hr.py")}


def assert_same_weights(actual: dict[str, torch.Tensor], folder: Path):
    expected = load_file(folder / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype and actual[name].equal(weight), name


def test_pushed_models_load_by_name_without_the_package_and_can_be_pushed_again(hub, converted_stage1, tmp_path):
    token = {"HF_TOKEN": TOKEN}
    run(PUSH, converted_stage1, "llava-hr", hub=hub, folder=tmp_path / "push", PYTHONPATH=str(ROOT), **token)
    assert list(hub.commits) == ["someone/llava-hr"]
    assert_holds(hub.read("someone/llava-hr")[1], converted_stage1)

    first = tmp_path / "first.safetensors"
    answer = run(LOAD, "someone/llava-hr", first, "again", hub=hub, folder=tmp_path / "load", **token)
    assert answer.startswith("ANSWER")
    assert_same_weights(load_file(first), converted_stage1)
    assert_holds(hub.read("someone/again")[1], converted_stage1)

    # what was pushed from a downloaded model must not point back to where that came from
    del hub.commits["someone/llava-hr"]
    second = tmp_path / "second.safetensors"
    assert run(LOAD, "someone/again", second, hub=hub, folder=tmp_path / "load_again") == answer
    assert_same_weights(load_file(second), converted_stage1)
    assert hub.unknown == []
