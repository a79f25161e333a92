# SPDX-License-Identifier: Apache-2.0
"""
The OpenAI-compatible server of transformers with LLaVA-HR: `python -m modeling_llava_hr.integrations.serve MODEL`.

`transformers serve` does not know LLaVA-HR, answers a bad request with `500 Internal Server Error`, and lets clients
read this machine's files, load other models and generate without limit. Its handlers run here in an app that has what
clients must not be able to bypass.
"""

import asyncio
import base64
import functools
import io
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

import anyio
import torch
import typer
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, Json, model_validator
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.cli.serve import Serve
from transformers.cli.serving import server
from transformers.cli.serving.utils import GenerateManager
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging

from modeling_llava_hr import LlavaHrConfig, LlavaHrForConditionalGeneration
from modeling_llava_hr.utils import OUT_OF_MEMORY_ADVICE, is_loopback, run_command


logger = logging.get_logger(__name__)

MAX_CONNECTIONS = 64
MAX_BODY_BYTES = 32 * 2**20  # room for 24 MB of images in base64
MAX_SECONDS = 60  # to send a request, and to take each piece of the answer
MAX_IMAGES = 16
MAX_PIXELS = 100 * 10**6  # of all images of a request
# Formats that Pillow decodes itself, whatever name or type was given. (For EPS it starts another program.)
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Fields that transformers ignores, where ignoring them is right: with any value, or with this one alone
IGNORED = {"metadata", "parallel_tool_calls", "service_tier", "store", "stream_options", "user"}
WITHOUT_EFFECT = {
    **{"n": 1, "best_of": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "echo": False, "tools": []},
    **{"modalities": ["text"], "response_format": {"type": "text"}, "text": {"format": {"type": "text"}}},
    **{"tool_choice": "auto", "truncation": "disabled"},
}


def count_pixels(url: str) -> int:
    """Pixels of the image in a data URL, of which none is decoded: clients read neither disk nor network here."""
    header, _, content = url.partition(",")
    if not header.startswith("data:image/") or "," in content:  # readers differ in what follows a second comma
        raise ValueError("An image must be a data URL (data:image/png;base64,...), not an address or a path.")
    try:
        with Image.open(io.BytesIO(base64.b64decode(content)), formats=IMAGE_FORMATS) as image:
            return image.width * image.height
    except Exception as error:  # whatever Pillow's decoders raise
        formats = ", ".join(IMAGE_FORMATS)
        raise ValueError(f"The image cannot be read. Send a complete file, one of {formats}.") from error


Text = Annotated[str, Field(max_length=500_000)]
MaxTokens = Annotated[int | None, Field(ge=1, le=4096)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(Fields):
    url: str
    detail: str | None = None


class Part(Fields):
    type: Literal["text", "image_url", "input_text", "output_text", "input_image"]
    text: Text | None = None
    image_url: ImageUrl | str | None = None
    detail: str | None = None

    @model_validator(mode="after")
    def check(self) -> "Part":
        name = "image_url" if "image" in self.type else "text"
        if getattr(self, name) is None:
            raise ValueError(f"A part of type {self.type} must have `{name}`.")
        return self


class Message(Fields):
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]
    type: Literal["message"] = Field("message", exclude=True)
    name: str | None = Field(None, exclude=True)


class Options(BaseModel):
    """Options of generation, within what neither takes the server down nor keeps it busy for nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    do_sample: bool | None = None
    frequency_penalty: float | None = Field(None, ge=-0.9, le=2)  # transformers' repetition penalty is 1 more
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    max_completion_tokens: MaxTokens = None
    max_new_tokens: MaxTokens = None
    max_output_tokens: MaxTokens = None
    max_tokens: MaxTokens = None
    repetition_penalty: float | None = Field(None, ge=0.1, le=3)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=0, le=1000)
    top_p: float | None = Field(None, ge=0, le=1)
    transformers_version: str | None = None

    @model_validator(mode="after")
    def check_temperature(self) -> "Options":
        if self.temperature and self.temperature < 0.01:  # dividing by less leaves nothing finite
            raise ValueError("`temperature` must be 0, for greedy answers, or at least 0.01.")
        return self


class Body(Options):
    """A request to any endpoint; transformers rejects the fields that belong to another one."""

    model: str | None = None
    stream: bool = False
    messages: list[Message] | None = Field(None, min_length=1, max_length=1000)
    prompt: Text | None = None
    suffix: Text | None = None
    input: Text | Annotated[list[Message], Field(min_length=1, max_length=1000)] | None = None
    instructions: Text | None = None
    generation_config: Json[Options] | None = None  # JSON in a string, from `transformers chat`

    @model_validator(mode="before")
    @classmethod
    def drop_what_has_no_effect(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        dropped = IGNORED | {name for name, value in WITHOUT_EFFECT.items() if body.get(name) == value}
        return {name: value for name, value in body.items() if name not in dropped and value is not None}

    @model_validator(mode="after")
    def check_images(self) -> "Body":
        messages = self.messages or (self.input if isinstance(self.input, list) else [])
        parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
        images = [part.image_url for part in parts if part.image_url is not None]
        urls = [image.url if isinstance(image, ImageUrl) else image for image in images]
        if len(urls) > MAX_IMAGES or sum(map(count_pixels, urls)) > MAX_PIXELS:
            limits = f"{MAX_IMAGES} images with {MAX_PIXELS} pixels in all"
            raise ValueError(f"A request may have {limits}. Send fewer or smaller images.")
        return self


class Limits:
    """
    ASGI middleware that bounds the bytes of a request, and the seconds that a client may take to send it and to take
    each piece of the answer.

    Args:
        app (`Callable`): The ASGI app around which it is put.
    """

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        num_bytes, is_complete, until = 0, False, anyio.current_time() + MAX_SECONDS

        async def receive_within_limits() -> dict:
            nonlocal num_bytes, is_complete
            while not is_complete:
                with anyio.move_on_after(until - anyio.current_time()) as scope:
                    message = await receive()
                if scope.cancelled_caught:
                    raise HTTPException(408, f"The request did not arrive within {MAX_SECONDS} seconds.")
                is_complete = not message.get("more_body", False)
                num_bytes += len(message.get("body", b""))
                if num_bytes <= MAX_BODY_BYTES:
                    return message
                if is_complete:  # clients look at the answer only after they have sent everything
                    raise HTTPException(413, f"The request exceeds {MAX_BODY_BYTES} bytes. Send smaller images.")
            return await receive()  # from here on only the disconnect arrives

        async def send_within_limits(message: dict) -> None:
            with anyio.fail_after(MAX_SECONDS):
                await send(message)

        is_http = scope["type"] == "http"
        await self.app(scope, *((receive_within_limits, send_within_limits) if is_http else (receive, send)))


class Generation(GenerateManager):
    """transformers' generation in a thread, of prompts that the model can answer, and only while the client waits."""

    def generate_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: dict, gen_config: GenerationConfig, **options: Any
    ) -> Any:
        check_prompt(model, inputs, gen_config)
        # stop texts are looked up in a tokenizer's vocabulary, which a processor does not have
        return super().generate_streaming(model, processor.tokenizer, inputs, gen_config, **options)

    async def generate_non_streaming(
        self, model: PreTrainedModel, processor: Any, inputs: dict, gen_config: GenerationConfig, **options: Any
    ) -> Any:
        check_prompt(model, inputs, gen_config)
        has_left = threading.Event()
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([lambda *_, **__: has_left.is_set()])}
        generate = super().generate_non_streaming(model, processor.tokenizer, inputs, gen_config, **options)
        future = asyncio.ensure_future(generate)
        try:
            return await asyncio.shield(future)  # the thread must be able to set the result
        finally:
            has_left.set()
            await asyncio.wait([future])  # the next request must find the thread idle


def check_prompt(model: LlavaHrForConditionalGeneration, inputs: dict, gen_config: GenerationConfig) -> None:
    """Raises ValueError for what generation would reject as well, but inside a stream after status 200."""
    model.check_prompt_length(inputs["input_ids"].shape[-1])
    vocab_size = model.config.get_text_config().vocab_size
    if unknown := [token for (token,) in gen_config.sequence_bias or () if not 0 <= token < vocab_size]:
        raise ValueError(f"`logit_bias` has the tokens {unknown}, but the last one is {vocab_size - 1}.")


def build_app(
    model_manager: Any,
    chat_handler: Any,
    *,
    completion_handler: Any,
    response_handler: Any,
    generation_state: Any,
    host: str,
    **kwargs: Any,
) -> FastAPI:
    """
    The app around the handlers of `transformers serve`, in place of `transformers.cli.serving.server.build_server`.

    Args:
        model_manager, chat_handler, completion_handler, response_handler, generation_state: Those of transformers.
        host (`str`): Where the server listens.

    Returns:
        `FastAPI`: The app. It serves the one model that was named at the start.
    """
    app = FastAPI(openapi_url=None)
    app.add_middleware(Limits)
    if is_loopback(host):  # a page of another site, open in a browser here, names its own host
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    generation, turn = Generation(), asyncio.Lock()
    generation_state.get_manager = lambda *_, **__: generation

    async def take_turn(request: Request) -> AsyncIterator[None]:
        """One request at a time until its answer is sent: neither memory nor random numbers are shared."""
        async with turn:
            if await request.is_disconnected():
                raise HTTPException(499, "The client left.")
            yield

    def add(path: str, handler: Any, content: str) -> None:
        @app.post(path, dependencies=[Depends(take_turn)])
        async def answer(body: Body, request: Request) -> Response:
            if getattr(body, content) is None:
                raise ValueError(f"`{content}` is missing.")
            fields = body.model_dump(exclude_none=True, round_trip=True)
            task = asyncio.ensure_future(handler.handle_request(fields, request_id=str(uuid.uuid4())))
            while not task.done():
                await asyncio.wait([task], timeout=0.2)
                if not task.done() and await request.is_disconnected():
                    task.cancel()
                    await asyncio.wait([task])
                    raise HTTPException(499, "The client left.")
            return await task

    add("/v1/chat/completions", chat_handler, "messages")
    add("/v1/completions", completion_handler, "prompt")
    add("/v1/responses", response_handler, "input")

    @app.get("/v1/models")
    async def list_models() -> dict:
        model = {"id": model_manager.force_model, "object": "model", "created": int(time.time()), "owned_by": "user"}
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def check_health() -> dict:
        return {"status": "ok"}

    async def explain(request: Request, error: Exception) -> JSONResponse:
        """An error in OpenAI's form, whose clients show the message."""
        status, message = 400, str(error)
        if isinstance(error, StarletteHTTPException):
            status, message = error.status_code, str(error.detail)
        elif isinstance(error, RequestValidationError):
            # Of a field with several types, the error of the type that fits best
            error_ = max(error.errors(), key=lambda entry: len(entry["loc"]))
            message = f"`{'.'.join(map(str, error_['loc'][1:]))}`: {error_['msg']}, but got {error_['input']!r:.60}."
        elif isinstance(error, torch.OutOfMemoryError):
            status, message = 503, OUT_OF_MEMORY_ADVICE
        else:
            logger.warning(
                "Rejected a request", exc_info=error
            )  # the server's own errors would look like this as well
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message[:1000], "type": kind, "param": None, "code": None}}, status)

    # What processor, chat template and generation raise about their arguments is the client's to fix
    for kind in (StarletteHTTPException, RequestValidationError, TemplateError, ValueError, torch.OutOfMemoryError):
        app.add_exception_handler(kind, explain)
    return app


class LlavaHrServe(Serve):
    """`transformers serve` with its own options."""

    def start_server(self) -> None:  # called for `non_blocking`
        self.server.config.limit_concurrency = MAX_CONNECTIONS
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn answers what it has, then raises it again
        self.server.run()


@functools.wraps(Serve, updated=())
def serve(**options: Any) -> None:
    model, host, port = options["force_model"], options["host"], options["port"]
    if model is None:
        raise ValueError("The model is missing: name a folder or an id of the Hub before the options.")
    if "@" in model and os.path.isdir(model):
        raise ValueError(f"transformers takes what follows '@' in {model!r} for a revision. Rename the folder.")
    try:  # before the weights are loaded, which takes minutes
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"Cannot listen on --host {host} --port {port} ({error}). Choose another --port.") from error
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[LlavaHrConfig.model_type] = LlavaHrForConditionalGeneration.__name__
    server.build_server = functools.partial(build_app, host=host)
    LlavaHrServe(**options | {"non_blocking": True})


def main() -> None:
    """`transformers serve`, on the loopback interface unless `--host` says otherwise."""
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    run_command(app, default_map={"host": "127.0.0.1"})


if __name__ == "__main__":
    main()
