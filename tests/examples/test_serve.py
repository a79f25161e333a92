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
"""The server as users run it: a process of its own, asked through OpenAI's client."""

import base64
import contextlib
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from PIL import Image, ImageDraw
from transformers import pipeline

from modeling_llava_hr import serving


ROOT = Path(__file__).parent.parent.parent
QUESTION = "What does the red sign say?"
NUM_TOKENS = 8
START_SECONDS = 300


def draw(width: int, height: int, text: str) -> Image.Image:
    picture = Image.new("RGB", (width, height), "skyblue")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((10, 10, 60, 30), fill="firebrick")
    draw.text((14, 14), text, fill="white")
    return picture


def encode(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


PICTURES = [draw(256, 256, "4711"), draw(90, 200, "1234")]
PARTS = [{"type": "image_url", "image_url": {"url": encode(picture)}} for picture in PICTURES]
TEXT = {"type": "text", "text": QUESTION}


@contextlib.contextmanager
def run_server(model: Path, folder: Path):
    """A server on a free port; its address, while it lives. Nothing is in its cache, and it has no network."""
    log = folder / "server.log"
    environment = {**os.environ, "HF_HOME": str(folder / "none"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "examples.serve", os.path.relpath(model, ROOT), "--port", "0", "--device", "cpu"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)
    try:
        until = time.monotonic() + START_SECONDS
        while not (address := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield address[1]
        # what stops a service also stops it in good order
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(tiny_model, tmp_path_factory):
    with run_server(tiny_model, tmp_path_factory.mktemp("server")) as address:
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
            client.model = os.path.relpath(tiny_model, ROOT)
            yield client


@pytest.fixture(scope="module")
def answer_of(tiny_model):
    """Greedy answers of the pipeline."""
    pipe = pipeline("image-text-to-text", model=str(tiny_model))

    def answer(*pictures: Image.Image) -> str:
        content = [*({"type": "image", "image": picture} for picture in pictures), TEXT]
        messages = [{"role": "user", "content": content}]
        (output,) = pipe(
            messages, max_new_tokens=NUM_TOKENS, return_full_text=False, generate_kwargs={"do_sample": False}
        )
        return output["generated_text"]

    return answer


def ask(client, content, **options):
    return client.chat.completions.create(
        model=options.pop("model", client.model),
        messages=[{"role": options.pop("role", "user"), "content": content}],
        max_tokens=NUM_TOKENS,
        temperature=0,
        **options,
    )


@pytest.mark.parametrize("num_pictures", [1, 2, 0])
def test_answers_are_those_of_the_pipeline(client, answer_of, num_pictures):
    expected = answer_of(*PICTURES[:num_pictures])
    content = [*PARTS[:num_pictures], TEXT]
    assert ask(client, content).choices[0].message.content == expected
    # transformers' streamer keeps back the beginning of a character whose end never came
    expected = expected.rstrip("\N{REPLACEMENT CHARACTER}")
    with ask(client, content, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(piece for piece in pieces if piece) == expected


def test_the_model_is_listed_under_the_name_that_it_has_on_the_command_line(client):
    assert [model.id for model in client.models.list()] == [client.model]


def image(url):
    return {"content": [{"type": "image_url", "image_url": {"url": url}}, TEXT]}


@pytest.mark.parametrize(
    "request_, status, sentence",
    [
        (image("data:image/png;base64,bm90IGEgcGljdHVyZQ=="), 400, "cannot be read"),
        (image(encode(PICTURES[0])[:300]), 400, "cannot be read"),
        (image("http://127.0.0.1:9/street.png"), 400, "must be a data URL"),
        (
            {"content": QUESTION, "extra_body": {"chat_template_kwargs": {"processor_kwargs": {"images": ["a.png"]}}}},
            400,
            "chat_template_kwargs",
        ),
        (image(str(ROOT / "tests" / "fixtures")), 400, "must be a data URL"),
        (image(7), 400, "must be a data URL"),
        ({"content": [{"type": "input_audio", "input_audio": {"data": ""}}]}, 400, "text or pictures"),
        ({"content": [{"text": "no type"}]}, 400, "form of OpenAI's API"),
        ({"content": QUESTION, "role": "wizard"}, 400, "must be 'user' or 'assistant'"),
        ({"content": QUESTION, "model": "another/model"}, 400, "another/model"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_and_the_server_goes_on(client, request_, status, sentence):
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=re.escape(sentence)) as error:
            ask(client, **request_, stream=stream)
        assert error.value.status_code == status
        assert len(str(error.value)) < 400
    assert ask(client, [PARTS[0], TEXT]).choices[0].message.content is not None


def test_what_generation_refuses_is_said(client):
    with pytest.raises(openai.BadRequestError, match="strictly positive"):
        ask(client, QUESTION, frequency_penalty=-2)


def request(client, method: str, path: str, body=None) -> tuple[int, dict]:
    """Status and JSON of a bare request; a list as its body is sent in chunks."""
    with contextlib.closing(http.client.HTTPConnection(client.base_url.host, client.base_url.port)) as connection:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_no_other_model_is_loaded(client):
    status, answer = request(client, "POST", "/load_model", json.dumps({"model": "another/model"}))
    assert status == 404 and "another/model" in answer["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_requests_are_refused(client, chunked):
    blocks = [b" " * 2**20] * (serving.MAX_BODY_BYTES // 2**20 + 1)
    status, answer = request(client, "POST", "/v1/chat/completions", blocks if chunked else b"".join(blocks))
    assert status == 413 and str(serving.MAX_BODY_BYTES) in answer["error"]["message"]
    assert request(client, "GET", "/health") == (200, {"status": "ok"})


OPTIONS = {"force_model": "folder", "host": "127.0.0.1", "port": 0}


def test_a_taken_port_is_said_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match="choose another --port"):
        serving.serve(**{**OPTIONS, "port": taken.getsockname()[1]})


def test_a_model_that_cannot_be_meant_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="the model is missing"):
        serving.serve(**{**OPTIONS, "force_model": None})
    (tmp_path / "a@b").mkdir()
    with pytest.raises(SystemExit, match="rename the folder"):
        serving.serve(**{**OPTIONS, "force_model": str(tmp_path / "a@b")})


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    with pytest.raises(SystemExit, match=re.escape("modeling-llava-hr[serving]")):
        serving.serve(**OPTIONS)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "modeling_llava_hr.serving", str(tmp_path / "none"), "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "error: " in result.stderr and "Traceback" not in result.stderr, result.stderr
