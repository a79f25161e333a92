# SPDX-License-Identifier: Apache-2.0
"""The server as users run it: a process of its own, asked through OpenAI's client."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fastapi
import httpx
import openai
import pytest
import torch
from chats import chat
from converted_checkpoints import ROOT, TINY_MODEL
from forked_commands import assert_one_message
from loopback_server import encode, run_server, to_data_url
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, BloomConfig, pipeline

from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration
from modeling_llava_hr.integrations import serve, serve_requests


QUESTION = "What does the red sign say?"
NUM_TOKENS = 8


def draw(width: int, height: int, text: str) -> Image.Image:
    image = Image.new("RGB", (width, height), "skyblue")
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 10, 60, 30), fill="firebrick")
    draw.text((14, 14), text, fill="white")
    return image


IMAGES = [draw(256, 256, "4711"), draw(90, 200, "1234")]
PARTS = [{"type": "image_url", "image_url": {"url": encode(image)}} for image in IMAGES]
TEXT = {"type": "text", "text": QUESTION}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with run_server(TINY_MODEL, tmp_path_factory.mktemp("server")) as (address, _):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300) as client:
            client.model = os.path.relpath(TINY_MODEL, ROOT)
            yield client


def ask_freely(client, content, role="user", **options):
    messages = [{"role": role, "content": content}]
    return client.chat.completions.create(**{"model": client.model, "messages": messages, **options})


def ask(client, content, **options):
    return ask_freely(client, content, max_tokens=NUM_TOKENS, temperature=0, **options)


@pytest.mark.parametrize("num_images", [1, 2, 0])
def test_answers_are_those_of_the_pipeline(client, num_images):
    pipe = pipeline("image-text-to-text", model=str(TINY_MODEL))
    options = {"max_new_tokens": NUM_TOKENS, "return_full_text": False, "generate_kwargs": {"do_sample": False}}
    expected = pipe(chat(QUESTION, *IMAGES[:num_images]), **options)[0]["generated_text"]
    content = [*PARTS[:num_images], TEXT]
    assert ask(client, content).choices[0].message.content == expected
    # transformers' streamer keeps back the beginning of a character whose end never came
    expected = expected.rstrip("\N{REPLACEMENT CHARACTER}")
    with ask(client, content, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(piece for piece in pieces if piece) == expected


def image(*urls):
    return {"content": [*({"type": "image_url", "image_url": {"url": url}} for url in urls), TEXT]}


def option(**body):
    """A request with an option, also one that OpenAI's client does not let through."""
    return {"content": QUESTION, "extra_body": body}


# Well-formed, of a format that Pillow knows, and named an image: but Pillow starts another program to read it
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (image("data:image/png;base64,bm90IGEgcGljdHVyZQ=="), "cannot be read"),
        (image(encode(IMAGES[0])[:300]), "cannot be read"),
        (image("http://127.0.0.1:9/street.png"), "must be a data URL"),
        (image(f"{encode(IMAGES[0])},{encode(IMAGES[1]).partition(',')[2]}"), "must be a data URL"),
        (option(chat_template_kwargs={"processor_kwargs": {"images": ["a.png"]}}), "chat_template_kwargs"),
        (image(str(ROOT / "tests" / "fixtures")), "must be a data URL"),
        (image(7), "image_url"),
        ({"content": [{"type": "input_audio", "input_audio": {"data": ""}}]}, "should be 'text', 'image_url'"),
        ({"content": [TEXT, {"type": "file", "file": {"file_data": "data:,"}}]}, "should be 'text', 'image_url'"),
        ({"content": [TEXT, {"type": "image", "image": encode(IMAGES[0])}]}, "should be 'text', 'image_url'"),
        ({"content": [{"text": "no type"}]}, "messages.0.content"),
        ({"content": [{"type": "text"}]}, "A part of type text must have `text`"),
        (option(tools=[{"type": "function", "function": {"name": "look"}}]), "`tools`"),
        ({"content": QUESTION, "role": "wizard"}, "should be 'system', 'user' or 'assistant'"),
        ({"content": QUESTION, "model": "another/model"}, "another/model"),
        (image(to_data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>")), "cannot be read"),
        (image(to_data_url(POSTSCRIPT)), "cannot be read"),
        # some kilobytes, 101 million pixels
        (image(encode(Image.new("1", (10_100, 10_000)))), "100000000 pixels"),
        (image(*[encode(IMAGES[0])] * 17), "may have 16 images"),
        ({"content": "?" * 500_001}, "at most 500000 characters"),
        ({"content": "why? " * 3000}, "at most 2048 (`config.context_length`)"),
        ({"content": [TEXT], "extra_body": {"messages": [{"role": "user", "content": "?"}] * 1001}}, "messages"),
        (option(max_completion_tokens=10**9), "`max_completion_tokens`: Input should be less than"),
        (option(max_tokens=0), "`max_tokens`"),
        (option(max_tokens="many"), "`max_tokens`"),
        (option(temperature=-1), "`temperature`"),
        (option(temperature=1e-30), "`temperature` must"),
        (option(top_p=2), "`top_p`"),
        (option(frequency_penalty=-2), "`frequency_penalty`"),
        (option(seed=2**70), "`seed`"),
        (option(logit_bias={"2": 1e9}), "`logit_bias"),
        (option(stop=["a"] * 5), "`stop"),
        (option(generation_config=json.dumps({"num_beams": 10**6})), "num_beams"),
        (option(generation_config=json.dumps({"max_new_tokens": 10**9})), "max_new_tokens"),
        (option(logit_bias={"1000000": 5}), "1000000"),
        (option(n=2), "`n`: Extra inputs"),
        (option(logprobs=True, top_logprobs=3), "logprobs`: Extra inputs"),
        (option(response_format={"type": "json_object"}), "`response_format`"),
        (option(presence_penalty=0.5), "`presence_penalty`"),
    ],
)
def test_a_bad_request_gets_a_message_and_the_server_stays_up(client, request_, sentence):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=re.escape(sentence)) as error:
            ask(client, **request_, stream=stream)
        assert len(str(error.value)) < 400
    assert ask(client, [PARTS[0], TEXT]).choices[0].message.content is not None


@contextlib.contextmanager
def open_request(client, method: str, path: str, body=None, **headers: str) -> Iterator[http.client.HTTPConnection]:
    """A bare request; a dict is sent as JSON, a list in chunks."""
    body = json.dumps({"model": client.model, **body}) if isinstance(body, dict) else body
    with contextlib.closing(http.client.HTTPConnection(client.base_url.host, client.base_url.port)) as connection:
        connection.request(method, path, body, {"content-type": "application/json", **headers})
        yield connection


def request(client, *request_, **headers: str) -> tuple[int, str]:
    """Status and text of the answer to a bare request."""
    with open_request(client, *request_, **headers) as connection:
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/load_model"),
        ("POST", "/reset"),  # would unload the model that all use
        ("POST", "/v1/systemone"),
        ("POST", "/v1/audio/transcriptions"),
        ("GET", "/docs"),
        ("GET", "/../../etc/passwd"),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd"),
    ],
)
def test_clients_reach_what_is_meant_for_them(client, method, path):
    assert request(client, method, path, {"model": "another/model"})[0] == 404


def test_what_json_cannot_say_is_refused(client):
    for value in ("NaN", "Infinity", "[" * 10_000):
        body = f'{{"model": "{client.model}", "messages": [], "temperature": {value}}}'
        assert request(client, "POST", "/v1/chat/completions", body)[0] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "example.com"},  # whose address somebody made that of this machine
        {"content-type": "text/plain"},  # which pages of other sites may send without asking
    ],
)
def test_pages_of_other_sites_are_not_answered(client, headers):
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}
    assert request(client, "POST", "/v1/chat/completions", body)[0] == 200
    status, text = request(client, "POST", "/v1/chat/completions", body, **headers)
    assert status == 400 and "choices" not in text


def test_fields_at_their_neutral_value_are_accepted(client):
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "me"}
    assert ask(client, QUESTION, **neutral).choices[0].message.content
    with ask(client, QUESTION, stream=True, stream_options={"include_usage": True}) as stream:
        assert list(stream)[-1].usage.completion_tokens > 0


def test_responses_are_complete_unless_streamed(client):
    options = {"model": client.model, "input": QUESTION, "max_output_tokens": 8, "temperature": 0}
    text = client.responses.create(**options).output_text
    with client.responses.create(**options, stream=True) as stream:
        assert text and "".join(e.delta for e in stream if e.type == "response.output_text.delta") == text


def test_other_endpoints_have_the_same_limits(client):
    path = {"role": "user", "content": [{"type": "input_image", "image_url": "/etc/passwd"}]}
    for endpoint, body, sentence in (
        ("responses", {"input": [path]}, "must be a data URL"),
        ("responses", {"input": QUESTION, "max_output_tokens": 10**9}, "`max_output_tokens`"),
        ("completions", {"prompt": QUESTION, "max_tokens": 10**9}, "`max_tokens`"),
        ("responses", {"input": QUESTION, "truncation": "auto"}, "`truncation`"),
        ("completions", {"prompt": QUESTION, "echo": True}, "`echo`"),
        ("completions", {"prompt": "?" * 500_001}, "500000 characters"),
        ("completions", {"prompt": "why? " * 3000}, "at most 2048"),
        ("completions", {"prompt": ""}, "The prompt is empty"),
        ("chat/completions", {"prompt": "?"}, "`messages` is missing"),
    ):
        status, text = request(client, "POST", f"/v1/{endpoint}", body)
        assert status == 400 and sentence in json.loads(text)["error"]["message"], text


ODD_VALUES = (None, True, 7, -1.5, "", "why", [], [7], [[]], ["why"], {}, {"why": 7}, [{"why": 7}], [{"type": "file"}])


@pytest.mark.parametrize(
    ("endpoint", "body", "fields"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [TEXT]}], "max_tokens": 1},
            ["messages", "model", "stop", "logit_bias", "generation_config", "tools", "temperature", "seed", "stream"],
        ),
        ("responses", {"input": QUESTION, "max_output_tokens": 1}, ["input", "instructions", "tools", "top_p"]),
        ("completions", {"prompt": QUESTION, "max_tokens": 1}, ["prompt", "suffix", "stop", "max_tokens"]),
    ],
)
def test_odd_values_anywhere_are_never_an_error_of_the_server(client, endpoint, body, fields):
    odd = [{**body, field: value} for field in fields for value in ODD_VALUES]
    if endpoint == "chat/completions":
        message = body["messages"][0]
        odd += [{**body, "messages": [message, value]} for value in ODD_VALUES]
        keys, part_keys = ("role", "content", "tool_calls", "name"), ("type", "image_url")
        messages = [{**message, key: value} for key in keys for value in ODD_VALUES]
        parts = [{**PARTS[0], key: value} for key in part_keys for value in ODD_VALUES]
        messages += [{**message, "content": [part]} for part in parts]
        odd += [{**body, "messages": [changed]} for changed in messages]
    statuses = [(request(client, "POST", f"/v1/{endpoint}", changed)[0], changed) for changed in odd]
    assert not [(status, changed) for status, changed in statuses if status not in (200, 400, 422)]
    assert request(client, "POST", f"/v1/{endpoint}", body)[0] == 200


def test_answers_end_where_the_context_does(client):
    never_end = {"logit_bias": {"2": -100}, "max_tokens": 4096}
    usage = ask_freely(client, "7" * 1950, **never_end).usage
    assert usage.prompt_tokens > 1950 and usage.total_tokens == 2048


@pytest.mark.parametrize("stream", [False, True])
def test_answers_end_with_a_stop_text(client, stream):
    options = {"logit_bias": {"2": -100}, "max_tokens": 32}

    def get_text(**more) -> str:
        answer = ask_freely(client, [PARTS[0], TEXT], stream=stream, **options, **more)
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    whole = get_text()
    stop = whole[3:5]
    for stops in (stop, ["never said", stop]):
        text = get_text(stop=stops)
        assert stop in text and whole.startswith(text) and len(text) < len(whole)


def test_a_model_without_a_limit_answers_long_prompts():
    config = LlavaHrConfig(text_config=BloomConfig(vocab_size=40_000))
    with torch.device("meta"):
        LlavaHrForConditionalGeneration(config).check_prompt_length(100_000)


def test_options_of_transformers_chat_are_taken(client):
    config = json.dumps({"do_sample": True, "max_new_tokens": 3, "transformers_version": "5.24.0"})
    assert ask_freely(client, QUESTION, extra_body={"generation_config": config}).usage.completion_tokens <= 3


def test_seeds_are_each_clients_own(client):
    config = json.dumps({"do_sample": True, "max_new_tokens": 8, "temperature": 2.0})

    def sample(seed: int) -> str:
        options = {"seed": seed, "logit_bias": {"2": -100}, "extra_body": {"generation_config": config}}
        return ask_freely(client, "?", **options).choices[0].message.content

    alone = [sample(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(sample, range(8)))
    assert together == alone and len(set(alone)) > 4


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_requests_are_refused(client, chunked):
    blocks = [b" " * 2**20] * (serve_requests.MAX_BODY_BYTES // 2**20 + 1)
    status, text = request(client, "POST", "/v1/chat/completions", blocks if chunked else b"".join(blocks))
    assert status == 413 and str(serve_requests.MAX_BODY_BYTES) in json.loads(text)["error"]["message"]
    status, text = request(client, "GET", "/health")
    assert status == 200 and json.loads(text) == {"status": "ok"}


def test_clients_that_do_not_take_their_answer_are_dropped(monkeypatch):
    monkeypatch.setattr(serve_requests, "MAX_SECONDS", 0.1)

    async def answer(scope, receive, send):
        await send({"type": "http.response.body", "body": b"?"})

    async def never_read(message):
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        asyncio.run(serve_requests.Limits(answer)({"type": "http", "method": "POST"}, None, never_read))


def build_app(handle) -> fastapi.FastAPI:
    """The app around a handler of our own."""
    handler, manager = SimpleNamespace(handle_request=handle), SimpleNamespace(force_model="folder")
    handlers = {"completion_handler": handler, "response_handler": handler, "generation_state": SimpleNamespace()}
    return serve.build_app(manager, handler, **handlers, host="127.0.0.1")


async def complete(app, prompt: str = "?") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.post("/v1/completions", json={"prompt": prompt})


def test_requests_are_answered_one_at_a_time_in_order():
    running, seen = set(), []

    async def handle(body, request_id):
        seen.append(body["prompt"])
        running.add(request_id)
        await asyncio.sleep(0.01)
        assert running == {request_id}
        running.clear()
        return fastapi.Response(body["prompt"])

    async def ask_all() -> list[str]:
        app = build_app(handle)
        return [answer.text for answer in await asyncio.gather(*(complete(app, str(n)) for n in range(8)))]

    expected = [str(n) for n in range(8)]
    assert asyncio.run(ask_all()) == expected and seen == expected


def test_full_memory_is_said():
    async def fill_memory(body, request_id):
        raise torch.OutOfMemoryError("CUDA out of memory")

    answer = asyncio.run(complete(build_app(fill_memory)))
    assert answer.status_code == 503 and "fewer images" in answer.json()["error"]["message"]


def test_generation_ends_when_its_client_leaves():
    model = AutoModelForImageTextToText.from_pretrained(TINY_MODEL)
    processor = AutoProcessor.from_pretrained(TINY_MODEL)
    inputs = dict(processor(text=QUESTION, return_tensors="pt"))
    config, steps = model.generation_config, []
    config.update(max_new_tokens=1000, suppress_tokens=[config.eos_token_id])
    model.lm_head.register_forward_hook(lambda *_: steps.append(None))

    async def leave() -> None:
        generation = serve.Generation()
        answer = generation.generate_non_streaming(model, processor, inputs, config, request_id="one")
        task = asyncio.ensure_future(answer)
        while len(steps) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # the same thread takes up the next one when the first has ended
        await generation.async_submit(int)

    asyncio.run(leave())
    assert 3 <= len(steps) < 1000


def test_an_abandoned_request_leaves_the_server_free(client):
    """Unread answers of 4,096 tokens would otherwise keep it busy for minutes."""
    body = {"prompt": QUESTION, "max_tokens": 2000, "stop": "never said"}
    for stream in (False, True):
        with open_request(client, "POST", "/v1/completions", {**body, "stream": stream}):
            time.sleep(0.5)
        assert ask(client, QUESTION).choices


def test_what_cannot_be_served_is_said_in_one_sentence(commands, tmp_path):
    (tmp_path / "a@b").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, sentence in (
            ([], "The model is missing"),
            ([tmp_path / "a@b"], "Rename the folder"),
            ([TINY_MODEL, "--port", taken.getsockname()[1]], "Choose another --port"),
            ([tmp_path / "none", "--port", 0], "none"),
        ):
            assert_one_message(commands.run("modeling_llava_hr.integrations.serve", *arguments), sentence)
