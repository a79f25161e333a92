# SPDX-License-Identifier: Apache-2.0
"""
The OpenAI-compatible server of transformers with LLaVA-HR: `python -m modeling_llava_hr.serving MODEL`.

`transformers serve` knows the architectures of transformers alone, answers what is wrong with a request by
`500 Internal Server Error`, and takes whatever a client asks for: any length, any number, any path. What is missing is
added here to its app; options and generation are its own.
"""

import asyncio
import base64
import functools
import io
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anyio
import torch
import typer
from jinja2 import TemplateError
from PIL import Image
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.cli.serve import Serve
from transformers.cli.serving import server
from transformers.cli.serving.utils import GenerateManager
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

import modeling_llava_hr


if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse

logger = logging.get_logger(__name__)

# What clients reach. The app has more, with which they could load and unload models.
ENDPOINTS = {"/health", "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/responses"}
# Hosts that are this machine; a page of another one, open in a browser here, names its own
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")

MAX_BODY_BYTES = 32 * 2**20  # room for 24 MB of pictures in base64
MAX_BODY_SECONDS = 60
MAX_REQUESTS = 64  # in the server, that is read, waiting or being answered
RETRY_SECONDS = 5  # after which a client may try again if there are more
MAX_PICTURES = 16
MAX_PIXELS = 100 * 10**6  # of all pictures of a request
MAX_MESSAGES = 1000
MAX_CHARACTERS = 500_000  # of all texts of a request; how many tokens the model takes is its own affair
# Formats that Pillow decodes itself, whatever name or type was given. (For EPS it starts another program.)
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Kinds of content, in chats and in `/v1/responses`; transformers leaves out what it does not know
PART_TYPES = ("text", "image_url", "input_text", "output_text", "input_image")
MAX_NEW_TOKENS = 4096
MIN_TEMPERATURE = 0.01  # dividing by less leaves no finite number
# Smallest and largest number for each option of generation
BOUNDS = {
    "frequency_penalty": (-0.9, 2),  # transformers' repetition penalty is 1 more
    "max_completion_tokens": (1, MAX_NEW_TOKENS),
    "max_new_tokens": (1, MAX_NEW_TOKENS),
    "max_output_tokens": (1, MAX_NEW_TOKENS),
    "max_tokens": (1, MAX_NEW_TOKENS),
    "repetition_penalty": (0.1, 3),
    "seed": (0, 2**63 - 1),
    "temperature": (0, 2),
    "top_k": (0, 1000),
    "top_p": (0, 1),
}
# Values of fields that transformers ignores with which ignoring them is right; any other is refused. A stream always
# ends with the usage.
NEUTRAL = {
    "metadata": None,
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "stream_options": ({"include_usage": True},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto", "none"),
    "truncation": ("disabled",),
    "user": None,
}
MAX_BIASES = 1024  # tokens in `logit_bias`
MAX_STOPS = 4  # texts in `stop`, with so many characters each
MAX_STOP_CHARACTERS = 100


def register() -> None:
    """Makes LLaVA-HR one of the architectures that `transformers serve` loads."""
    model_type = modeling_llava_hr.LlavaHrConfig.model_type
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type] = modeling_llava_hr.LlavaHrForConditionalGeneration.__name__


def read_picture(url: Any) -> tuple[bytes, int]:
    """
    The picture of an `image_url`.

    Args:
        url (`str`): A data URL. No path and no address: clients do not read the server's disk or network.

    Returns:
        `tuple[bytes, int]`: The picture's file, and its pixels, of which none is decoded yet.

    Raises:
        fastapi.HTTPException: 400, if there is no picture.
    """
    from fastapi import HTTPException

    if not isinstance(url, str) or not url.startswith("data:image/"):
        raise HTTPException(
            400,
            f"A picture must be a data URL (data:image/png;base64,...), no address or path, but got {url!r:.60}.",
        )
    try:
        data = base64.b64decode(url.partition(",")[2])
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as picture:
            return data, picture.width * picture.height
    # whatever Pillow's decoders raise
    except Exception as error:
        raise HTTPException(
            400, f"The picture {url!r:.60} cannot be read. Send a whole file, one of {', '.join(PICTURE_FORMATS)}."
        ) from error


def check_form(body: dict) -> None:
    """
    Refuses a request with anything in it that transformers would leave out in silence, or stumble over.

    Args:
        body (`dict`): A request in OpenAI's form: `messages`, or the `input` of `/v1/responses`.

    Raises:
        fastapi.HTTPException: 400, with what was expected.
    """
    from fastapi import HTTPException

    if body.get("chat_template_kwargs"):  # among them are pictures by their paths on this machine
        raise HTTPException(400, "This server takes no `chat_template_kwargs`. Leave them out.")
    if body.get("tools"):
        raise HTTPException(400, "LLaVA-HR calls no tools. Leave `tools` out.")
    entries = body.get("messages") or body.get("input") or []
    if isinstance(entries, str):
        return
    if not is_list_of_objects(entries):
        raise HTTPException(400, f"Messages must be a list of objects with role and content, but got {entries!r:.60}.")
    check_number("messages", len(entries), MAX_MESSAGES)
    if entries and "role" not in entries[0]:  # parts of one message, which `/v1/responses` takes without it
        entries = [{"role": "user", "content": entries}]
    for entry in entries:
        content = entry.get("content") or ""
        if "role" not in entry:
            raise HTTPException(400, f"A message must have a role, but got {entry!r:.60}.")
        if entry.get("tool_calls"):
            raise HTTPException(400, "LLaVA-HR calls no tools. Leave messages with `tool_calls` out.")
        if not isinstance(content, str) and not is_list_of_objects(content):
            raise HTTPException(400, f"`content` must be a text or a list of objects, but got {content!r:.60}.")
        for part in content if isinstance(content, list) else ():
            if part.get("type") not in PART_TYPES:
                raise HTTPException(
                    400, f"Content must be text or pictures ({', '.join(PART_TYPES)}), but got {part!r:.60}."
                )


def check_ignored(body: dict, ignored: set[str]) -> None:
    """
    Refuses fields that would have no effect, such as `n=2`.

    Args:
        body (`dict`): A request in OpenAI's form.
        ignored (`set[str]`): Names of fields that transformers accepts and ignores.

    Raises:
        fastapi.HTTPException: 400, with the name of the field.
    """
    from fastapi import HTTPException

    for name in sorted(ignored & body.keys()):
        neutral = NEUTRAL.get(name, ())
        if body[name] and neutral is not None and body[name] not in neutral:
            raise HTTPException(400, f"`{name}` has no effect on this server, but got {body[name]!r:.60}. Omit it.")


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def convert_messages(convert: Callable, messages: list[dict], modality: Any) -> list[dict]:
    """
    The messages as the processor takes them, if text and pictures are not more than one request may have.

    Args:
        convert (`Callable`): transformers' conversion. A picture of its result is `{"type": "image", "url": URL}`.
        messages (`list[dict]`): Messages in OpenAI's form.
        modality (`transformers.cli.serving.utils.Modality`): What the model takes; handed on.

    Returns:
        `list[dict]`: What `convert` makes of them, with the bytes of each picture instead of its URL.

    Raises:
        fastapi.HTTPException: 400, if there is too much of something, or a picture cannot be read.
    """
    converted = convert(messages, modality)
    parts = [part for message in converted for part in message["content"]]
    pictures = [part for part in parts if part["type"] == "image"]
    check_number("pictures", len(pictures), MAX_PICTURES)
    check_number("characters", sum(len(part["text"]) for part in parts if part["type"] == "text"), MAX_CHARACTERS)
    num_pixels = 0
    for part in pictures:
        part["image"], pixels = read_picture(part.pop("url"))
        num_pixels += pixels
    check_number("pixels", num_pixels, MAX_PIXELS)
    return converted


def check_number(name: str, number: int, most: int) -> None:
    from fastapi import HTTPException

    if number > most:
        raise HTTPException(400, f"A request may have {most} {name}, but this one has {number}. Send less.")


def check_options(body: dict) -> None:
    """
    Refuses what would take the server down or too long, such as a temperature of which nothing finite is left.

    Args:
        body (`dict`): A request in OpenAI's form, or transformers' `generation_config` in it.

    Raises:
        fastapi.HTTPException: 400, with the name of the option.
    """
    from fastapi import HTTPException

    for name, (least, most) in BOUNDS.items():
        value = body.get(name)
        # also refuses NaN
        if value is not None and not (isinstance(value, int | float) and least <= value <= most):
            raise HTTPException(400, f"`{name}` must be a number from {least} to {most}, but got {value!r:.60}.")
    if 0 < (body.get("temperature") or 0) < MIN_TEMPERATURE:
        raise HTTPException(400, f"`temperature` must be 0, for greedy answers, or at least {MIN_TEMPERATURE}.")
    biases = {} if body.get("logit_bias") is None else body["logit_bias"]
    if (
        not isinstance(biases, dict)
        or len(biases) > MAX_BIASES
        or not all(isinstance(bias, int | float) and -100 <= bias <= 100 for bias in biases.values())
    ):
        raise HTTPException(400, f"`logit_bias` must have at most {MAX_BIASES} tokens, each from -100 to 100.")
    if biases:  # whole numbers are what OpenAI's clients send, and transformers refuses
        body["logit_bias"] = {token: float(bias) for token, bias in biases.items()}
    stops = body.get("stop")
    stops = [stops] if isinstance(stops, str) else [] if stops is None else stops
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and len(stop) <= MAX_STOP_CHARACTERS for stop in stops)
    ):
        raise HTTPException(
            400, f"`stop` must be at most {MAX_STOPS} texts of up to {MAX_STOP_CHARACTERS} characters."
        )
    if "stop" in body:
        body["stop"] = [stop for stop in stops if stop] or None  # transformers stumbles over empty ones
    if body.get("generation_config"):  # what `transformers chat` sends: JSON in JSON
        config = json.loads(body["generation_config"])
        if not isinstance(config, dict):
            raise HTTPException(400, f"`generation_config` must be a JSON object in a text, but got {config!r:.60}.")
        if unknown := config.keys() - BOUNDS.keys() - {"do_sample", "transformers_version"}:
            raise HTTPException(400, f"`generation_config` must not have {', '.join(sorted(unknown))} here.")
        check_options(config)


class Gate:
    """
    ASGI middleware that keeps clients apart: requests are answered one after the other, in the order in which they
    came, so that they share neither memory nor random numbers. Those with too long a body, and those that come while
    `MAX_REQUESTS` are there, get an error. Where a client leaves, its request ends, waiting or being answered.

    Args:
        app (`Callable`): The ASGI app around which it is put.
    """

    def __init__(self, app: Callable):
        self.app = app
        self.turn = asyncio.Lock()  # first come, first served
        self.num_requests = 0

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
        elif self.num_requests == MAX_REQUESTS:
            response = refuse(503, f"{MAX_REQUESTS} requests are waiting. Try again in {RETRY_SECONDS} seconds.")
            response.headers["retry-after"] = str(RETRY_SECONDS)
            await response(scope, receive, send)
        else:
            self.num_requests += 1
            try:
                await self._answer(scope, receive, send)
            finally:
                self.num_requests -= 1

    async def _answer(self, scope: dict, receive: Callable, send: Callable) -> None:
        from starlette.requests import ClientDisconnect, Request

        body, num_bytes = bytearray(), 0
        try:
            with anyio.fail_after(MAX_BODY_SECONDS):
                async for chunk in Request(scope, receive).stream():
                    num_bytes += len(chunk)
                    # the rest is read all the same: only then does a client look at the answer
                    body += chunk if num_bytes <= MAX_BODY_BYTES else b""
        except ClientDisconnect:
            return
        except TimeoutError:
            message = f"The request did not arrive within {MAX_BODY_SECONDS} seconds. Send fewer or smaller pictures."
            await refuse(408, message)(scope, receive, send)
            return
        if num_bytes > MAX_BODY_BYTES:
            message = f"The request exceeds {MAX_BODY_BYTES} bytes. Send fewer or smaller pictures."
            await refuse(413, message)(scope, receive, send)
            return
        messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        body.clear()  # once is enough while it waits

        async def replay() -> dict:
            return messages.pop() if messages else await receive()

        async def leave_with_client() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        # a client that reads slowly holds up nobody else: its answer waits here, where it is complete
        answer: asyncio.Queue[dict | None] = asyncio.Queue()

        async def deliver() -> None:
            while (message := await answer.get()) is not None:
                await send(message)
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(leave_with_client)
            group.start_soon(deliver)
            async with self.turn:
                await self.app(scope, replay, answer.put)
            await answer.put(None)


class Generation(GenerateManager):
    """transformers' generation in a thread, within the model's context and no longer than its client is there."""

    def generate_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: dict, gen_config: GenerationConfig, **options: Any
    ) -> Any:
        check_generation(model, inputs, gen_config)
        # stop texts are looked up in a tokenizer's vocabulary, which a processor has not
        return super().generate_streaming(model, processor.tokenizer, inputs, gen_config, **options)

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: dict, gen_config: GenerationConfig, **options: Any
    ) -> Any:
        check_generation(model, inputs, gen_config)
        is_over = threading.Event()
        criteria = StoppingCriteriaList([lambda ids, scores, **kwargs: is_over.is_set()])
        inputs = {**inputs, "stopping_criteria": criteria}
        try:
            # the thread wants to hand over its result, also if nobody is there any more
            return await asyncio.shield(
                asyncio.ensure_future(
                    super().generate_non_streaming(model, processor.tokenizer, inputs, gen_config, **options)
                )
            )
        finally:
            is_over.set()


def check_generation(model: PreTrainedModel, inputs: dict, gen_config: GenerationConfig) -> None:
    """
    Lets an answer end where the model's context does.

    Raises:
        fastapi.HTTPException: 400, if the prompt is empty, or alone as long, or a token in `logit_bias` unknown.
            Generation, which would find out as well, could say so only inside a stream.
    """
    from fastapi import HTTPException

    vocab_size = model.config.get_text_config().vocab_size
    for (token,) in gen_config.sequence_bias or ():
        if not 0 <= token < vocab_size:
            raise HTTPException(400, f"`logit_bias` has token {token}, but the last one is {vocab_size - 1}.")
    longest = model.config.context_length or math.inf
    num_tokens = inputs["input_ids"].shape[-1]
    if num_tokens == 0:
        raise HTTPException(400, "The prompt is empty. Send a text.")
    if num_tokens >= longest:
        raise HTTPException(
            400,
            f"The prompt has {num_tokens} tokens, but the model takes {longest} with the answer. Send fewer pictures "
            "or less text.",
        )
    gen_config.max_new_tokens = min(gen_config.max_new_tokens or MAX_NEW_TOKENS, longest - num_tokens)


def refuse(status_code: int, message: str) -> "JSONResponse":
    """An error in OpenAI's form: its clients show the sentence."""
    from fastapi.responses import JSONResponse

    kind = "invalid_request_error" if status_code < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status_code)


def build_server(
    build: Callable,
    model_manager: Any,
    chat_handler: Any,
    *,
    completion_handler: Any,
    response_handler: Any,
    generation_state: Any,
    host: str,
    **kwargs: Any,
) -> "FastAPI":
    """
    The app of `transformers serve`, with what it lacks.

    Args:
        build (`Callable`): `transformers.cli.serving.server.build_server`.
        model_manager, chat_handler, completion_handler, response_handler, generation_state, kwargs: Its arguments.
        host (`str`): Where the server listens.

    Returns:
        `FastAPI`: The app. It serves the one model that was named at the start.
    """
    from fastapi import Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = build(
        model_manager,
        chat_handler,
        completion_handler=completion_handler,
        response_handler=response_handler,
        generation_state=generation_state,
        **kwargs,
    )
    app.router.routes = [route for route in app.router.routes if route.path in ENDPOINTS]
    name = model_manager.force_model
    models = [{"id": name, "object": "model", "created": int(time.time()), "owned_by": modeling_llava_hr.__name__}]
    generation = Generation()
    # before 5.24 transformers lists what is in the Hub's cache
    model_manager.get_gen_models = lambda: models
    generation_state.get_manager = lambda model_id, use_cb=False: generation

    def validate(body: dict, check: Callable, ignored: set[str]) -> Any:
        body.setdefault("stream", False)  # OpenAI's default, which transformers does not have everywhere
        check_ignored(body, ignored)
        check_form(body)
        check_options(body)
        check_number("characters", len(body.get("prompt") or ""), MAX_CHARACTERS)
        return check(body)

    for handler in (chat_handler, response_handler, completion_handler):
        handler._validate_request = functools.partial(
            validate, check=handler._validate_request, ignored=handler._unused_fields
        )
        convert = handler.get_processor_inputs_from_messages
        handler.get_processor_inputs_from_messages = functools.partial(convert_messages, convert)

    async def explain(request: Request, error: Exception) -> "JSONResponse":
        if isinstance(error, StarletteHTTPException):
            return refuse(error.status_code, str(error.detail))
        if isinstance(error, RequestValidationError):
            return refuse(400, "The body of the request must be a JSON object in the form of OpenAI's API.")
        logger.warning("Refused a request", exc_info=error)
        if isinstance(error, (KeyError, TypeError)):
            return refuse(400, f"The request does not have the form of OpenAI's API: {error!r}.")
        return refuse(400, str(error))

    async def explain_memory(request: Request, error: Exception) -> "JSONResponse":
        logger.error("Out of memory", exc_info=error)
        return refuse(
            503,
            "The memory does not suffice for this request. Send fewer pictures, less text or smaller `max_tokens`.",
        )

    app.add_exception_handler(torch.OutOfMemoryError, explain_memory)
    # what processor, chat template and generation raise about their arguments, and transformers' parser of requests
    for error in (StarletteHTTPException, RequestValidationError, KeyError, TemplateError, TypeError, ValueError):
        app.add_exception_handler(error, explain)
    app.add_middleware(Gate)
    if host in LOOPBACK_HOSTS:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_HOSTS)
    return app


@functools.wraps(Serve, updated=())
def serve(**options: Any) -> None:
    model, host, port = options["force_model"], options["host"], options["port"]
    if not is_serve_available():
        sys.exit('error: serving needs FastAPI, uvicorn and openai: pip install ".[serving]" in the checkout')
    if model is None:
        sys.exit("error: the model is missing: give a folder or an id of the Hub before the options")
    if "@" in model and os.path.isdir(model):
        sys.exit(f"error: transformers serve takes what follows '@' in {model!r} for a revision; rename the folder")
    # before the weights are loaded, which takes minutes
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"error: cannot listen on --host {host} --port {port} ({error}); choose another --port")

    register()
    server.build_server = functools.partial(build_server, server.build_server, host=host)
    # uvicorn ends its work in good order, then raises the signal again
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        Serve(**options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """`transformers serve` with its own options, on the loopback interface unless `--host` says otherwise."""
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    app(default_map={"host": "127.0.0.1"})


if __name__ == "__main__":
    main()
