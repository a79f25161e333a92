# SPDX-License-Identifier: Apache-2.0
"""
The OpenAI-compatible server of transformers with LLaVA-HR: `python -m modeling_llava_hr.integrations.serve MODEL`.

`transformers serve` does not support LLaVA-HR, answers bad requests with `500 Internal Server Error`, and lets clients
read this machine's files, load other models and generate without limit. Here its handlers run in an app that enforces
limits.
"""

import asyncio
import functools
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import torch
import typer
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.cli.serve import Serve
from transformers.cli.serving import server
from transformers.cli.serving.utils import GenerateManager
from transformers.utils import logging

from modeling_llava_hr import LlavaHrForConditionalGeneration
from modeling_llava_hr.utils import OUT_OF_MEMORY_ADVICE, is_loopback, run_command

from .serve_requests import Body, Limits


logger = logging.get_logger(__name__)

MAX_CONNECTIONS = 512  # idle ones included; a process may have 1,024 files open


class Generation(GenerateManager):
    """transformers' generation in a thread, which rejects bad prompts and stops when the client leaves."""

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
    """Raises ValueError for what generation would reject too late: inside a stream, after status 200."""
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
    if is_loopback(host):  # against other sites' pages in a browser here, whose requests name their own host
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    generation, turn = Generation(), asyncio.Lock()
    generation_state.get_manager = lambda *_, **__: generation

    async def take_turn(request: Request) -> AsyncIterator[None]:
        """Handles one request at a time until its answer is sent: requests share neither memory nor random numbers."""
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
            logger.warning("Rejected a request", exc_info=error)  # it may be an error of the server itself
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message[:1000], "type": kind, "param": None, "code": None}}, status)

    # Errors of the processor, the chat template and generation about their arguments are the client's to fix
    for kind in (StarletteHTTPException, RequestValidationError, ValueError, torch.OutOfMemoryError):
        app.add_exception_handler(kind, explain)
    return app


class LlavaHrServe(Serve):
    """`transformers serve` with its own options."""

    def start_server(self) -> None:  # called for `non_blocking`
        self.server.config.limit_concurrency = MAX_CONNECTIONS
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn finishes open requests, then raises it again
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
    server.build_server = functools.partial(build_app, host=host)
    LlavaHrServe(**options | {"non_blocking": True})


def main() -> None:
    """`transformers serve`, on the loopback interface unless `--host` says otherwise."""
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    run_command(app, default_map={"host": "127.0.0.1"})


if __name__ == "__main__":
    main()
