# SPDX-License-Identifier: Apache-2.0
"""
The one loopback Hub: the fixture `hub`, a server on this machine that speaks as much of the Hub's protocol as
`huggingface_hub` needs here. Small files are part of the commit, large ones, where a test asks for it, go through LFS;
Xet is not covered.

    hub.add("someone/model", folder)    # a repository
    hub.run(CODE, folder=tmp_path)      # a script that knows this Hub alone
    commands.run(...)                   # so do the commands of `forked_commands`
"""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml


USER, TOKEN = "someone", "hf_dummy"
LICENSES = ("apache-2.0", "llama2", "other", None)  # that the stand-in accepts in a card's metadata


class Hub(ThreadingHTTPServer):
    """
    Repositories of models in memory. A commit is all of its files, by its hash; `main` is the newest one.

    Attributes that tests set:
        breaks (`str`, *optional*): Name of a route whose requests lose their connection half-way.
        cuts (`int`): The next `cuts` downloads lose their connection half-way through the file.
        large (`bool`): Whether safetensors go to the large-file storage, as on the real Hub, or into the commit.
    """

    token = TOKEN
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        self.reset()

    def reset(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, hash, path
        self.private: set[str] = set()
        self.large_files: dict[str, bytes] = {}  # by their SHA-256
        self.unknown: list[str] = []  # repositories that were asked for and do not exist
        self.requests: list[str] = []  # names of the routes, in order
        self.breaks: str | None = None
        self.cuts = 0
        self.large = False

    def add(self, repo_id: str, folder: Path) -> None:
        """Makes a repository of the files in a folder."""
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.commits[repo_id] = {"0" * 40: files}

    def read(self, repo_id: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """Hash and files of a revision."""
        commits = self.commits[repo_id]
        commit = next(reversed(commits)) if revision == "main" else revision
        return commit, commits[commit]

    def write(self, repo_id: str, changes: dict[str, bytes | None]) -> str:
        """Hash of a new commit on top of the newest one; `None` removes a file."""
        commit = f"{len(self.commits[repo_id]):040x}"
        files = self.read(repo_id)[1] | changes
        self.commits[repo_id][commit] = {path: content for path, content in files.items() if content is not None}
        return commit

    def run(self, code: str, *arguments: str | Path, folder: Path, **environment: str) -> str:
        """Output of a script in a process with a cache of its own that knows this server only."""
        folder.mkdir()
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=folder,
            env={
                **self.environment,
                "HF_HOME": str(folder / "home"),
                "OMP_NUM_THREADS": "1",
                "PATH": "/usr/bin:/bin",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout


class HubHandler(BaseHTTPRequestHandler):
    """A method for each route. Named groups of a route are its arguments; a revision is replaced by its files."""

    server: Hub
    repository = r"(?P<repo_id>[^/]+/[^/]+)"
    routes = {
        r"GET /api/whoami-v2": "whoami",
        r"POST /api/repos/create": "create",
        r"POST /api/validate-yaml": "validate_yaml",
        rf"POST /api/models/{repository}/preupload/main": "preupload",
        rf"POST /{repository}\.git/info/lfs/objects/batch": "large_batch",
        r"PUT /large/(?P<oid>[0-9a-f]{64})": "large_upload",
        rf"POST /api/models/{repository}/commit/main": "commit",
        rf"GET /api/models/{repository}(/revision/(?P<revision>[^/]+))?": "info",
        rf"GET /api/models/{repository}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": "tree",
        rf"(GET|HEAD) /{repository}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "resolve",
    }

    def handle_request(self):
        length = int(self.headers.get("Content-Length", 0))
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        matches = ((re.fullmatch(pattern, request), name) for pattern, name in self.routes.items())
        match, name = next((found for found in matches if found[0]), (None, None))
        self.server.requests.append(name)
        if name is not None and name == self.server.breaks:
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        if len(self.body) < length:  # the sender has gone
            self.close_connection = True
            return
        arguments = match.groupdict() if match else {}
        repo_id = arguments.get("repo_id")
        if match is None:
            self.answer({"error": "Not Found"}, 404)
        elif self.needs_token(name) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif repo_id and repo_id not in self.server.commits:
            self.server.unknown.append(repo_id)
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        else:
            if "revision" in arguments:
                revision = arguments.pop("revision") or "main"
                arguments["commit"], arguments["files"] = self.server.read(repo_id, revision)
            getattr(self, name)(**arguments)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def needs_token(self, name: str) -> bool:
        return self.command == "POST" or name == "whoami"

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

    def whoami(self):
        self.answer({"name": USER})

    def create(self):
        options = json.loads(self.body)
        if options["organization"] not in (None, USER):
            self.answer({"error": f"You don't have the rights to create a model under {options['organization']}"}, 403)
            return
        repo_id = f"{USER}/{options['name']}"
        exists = repo_id in self.server.commits
        if not exists and (options.get("private") or options.get("visibility") == "private"):
            self.server.private.add(repo_id)
        self.server.commits.setdefault(repo_id, {"0" * 40: {".gitattributes": b""}})
        self.answer({"url": f"{self.server.url}/{repo_id}"}, 409 if exists else 200)

    def validate_yaml(self):
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---\n")[1])
        errors = [] if metadata.get("license") in LICENSES else [{"message": f'"license" must be one of {LICENSES}'}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {p: "lfs" if self.server.large and p.endswith(".safetensors") else "regular" for p in paths}
        self.answer({"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]})

    def large_batch(self, repo_id: str):
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.server.large_files:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def large_upload(self, oid: str):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large_files[oid] = self.body
        self.answer({})

    def commit(self, repo_id: str):
        header, *changes = map(json.loads, self.body.splitlines())
        assert header["key"] == "header"
        read = {
            "file": lambda file: base64.b64decode(file["content"]),
            "lfsFile": lambda file: self.server.large_files[file["oid"]],
            "deletedFile": lambda file: None,
        }
        files = {change["value"]["path"]: read[change["key"]](change["value"]) for change in changes}
        commit = self.server.write(repo_id, files)
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        self.answer({"success": True, "commitOid": commit, "commitUrl": url})

    def info(self, repo_id: str, commit: str, files: dict[str, bytes]):
        siblings = [{"rfilename": path} for path in files]
        private = repo_id in self.server.private
        self.answer({"id": repo_id, "sha": commit, "tags": [], "private": private, "siblings": siblings})

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
            begin = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            begin = int(begin[1]) if begin else 0
            content, status = files[path][begin:], 206 if begin else 200
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(files[path]) - 1}/{len(files[path])}"
            headers["Content-Length"] = str(len(content))
            if self.server.cuts and self.command == "GET":
                self.server.cuts -= 1
                content, self.close_connection = content[: len(content) // 2], True
            self.answer(content, status, headers)
        else:
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", **headers})


@pytest.fixture(scope="session")
def hub_server() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(hub_server) -> Hub:
    """The loopback Hub, empty."""
    hub_server.reset()
    return hub_server
