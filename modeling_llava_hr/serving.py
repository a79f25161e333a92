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
"""
The OpenAI-compatible server of transformers with LLaVA-HR: `python -m modeling_llava_hr.serving MODEL`.

`transformers serve` knows the architectures of transformers alone, and answers what is wrong with a request by
`500 Internal Server Error`. Both are added here to its app; options, endpoints and generation are its own.
"""

import functools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer
from jinja2 import TemplateError
from transformers.cli.serve import Serve
from transformers.cli.serving import server
from transformers.image_utils import load_image
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.utils import logging
from transformers.utils.import_utils import is_serve_available

import modeling_llava_hr


if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from PIL import Image

logger = logging.get_logger(__name__)

# Room for a picture of 48 MB in base64
MAX_BODY_BYTES = 64 * 2**20


def register() -> None:
    """Makes LLaVA-HR one of the architectures that `transformers serve` loads."""
    model_type = modeling_llava_hr.LlavaHrConfig.model_type
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type] = modeling_llava_hr.LlavaHrForConditionalGeneration.__name__


def load_picture(url: Any) -> "Image.Image":
    """
    The picture of an `image_url`.

    Args:
        url (`str`): A data URL. No path and no address: clients do not read the server's disk or network.

    Returns:
        `PIL.Image.Image`: The picture in RGB.

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
        return load_image(url)
    # whatever Pillow's decoders raise
    except Exception as error:
        raise HTTPException(
            400, f"The picture {url!r:.60} cannot be read. Send a whole file in a format that Pillow knows."
        ) from error


def refuse(status_code: int, message: str) -> "JSONResponse":
    """An error in OpenAI's form: its clients show the sentence."""
    from fastapi.responses import JSONResponse

    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status_code)


class BodyLimit:
    """
    ASGI middleware that answers too large requests with 413; after their end, so that the client gets to see it.

    Args:
        app (`Callable`): The ASGI app around which it is put.
        max_body_bytes (`int`): Length of the longest body that gets through.
    """

    def __init__(self, app: Callable, max_body_bytes: int):
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, num_bytes, is_complete = [], 0, False
        while not is_complete:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if num_bytes <= self.max_body_bytes:
                messages.append(message)

        async def replay() -> dict:
            return messages.pop(0) if messages else await receive()

        if num_bytes > self.max_body_bytes:
            response = refuse(413, f"The request exceeds {self.max_body_bytes} bytes. Send fewer or smaller pictures.")
            await response(scope, receive, send)
        else:
            await self.app(scope, replay, send)


def build_server(build: Callable, model_manager, chat_handler, *, response_handler, **kwargs) -> "FastAPI":
    """
    The app of `transformers serve`, with what it lacks.

    Args:
        build (`Callable`): `transformers.cli.serving.server.build_server`.
        model_manager, chat_handler, response_handler, kwargs: Its arguments.

    Returns:
        `FastAPI`: The app. It serves the one model that was named at the start.
    """
    from fastapi import HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException as StarletteHTTPException

    app = build(model_manager, chat_handler, response_handler=response_handler, **kwargs)
    name, process_model_name = model_manager.force_model, model_manager.process_model_name
    models = [{"id": name, "object": "model", "created": int(time.time()), "owned_by": modeling_llava_hr.__name__}]

    def check_model_name(model_id: str) -> str:
        if model_id != name:
            raise HTTPException(404, f"This server has the model {name!r} alone, but the request names {model_id!r}.")
        return process_model_name(model_id)

    # the original lists what is in the Hub's cache
    model_manager.get_gen_models = lambda: models
    model_manager.process_model_name = check_model_name

    for handler in (chat_handler, response_handler):

        def load_pictures(messages: list[dict], modality, convert=handler.get_processor_inputs_from_messages):
            messages = convert(messages, modality)
            for part in (part for message in messages for part in message["content"]):
                if part["type"] == "image":
                    part["image"] = load_picture(part.pop("url"))
                elif part["type"] != "text":
                    raise HTTPException(400, f"Content must be text or pictures, but got {part['type']!r}.")
            return messages

        def validate(body: dict, check=handler._validate_request):
            if body.get("chat_template_kwargs"):  # among them are pictures by their paths on this machine
                raise HTTPException(400, "This server takes no `chat_template_kwargs`. Leave them out.")
            return check(body)

        handler.get_processor_inputs_from_messages = load_pictures
        handler._validate_request = validate

    async def explain(request: Request, error: Exception) -> "JSONResponse":
        if isinstance(error, StarletteHTTPException):
            return refuse(error.status_code, str(error.detail))
        if isinstance(error, RequestValidationError):
            return refuse(400, "The body of the request must be a JSON object in the form of OpenAI's API.")
        logger.warning("Refused a request", exc_info=error)
        if isinstance(error, (KeyError, TypeError)):
            return refuse(400, f"The request does not have the form of OpenAI's API: {error!r}.")
        return refuse(400, str(error))

    # what processor, chat template and generation raise about their arguments, and transformers' parser of requests
    for error in (StarletteHTTPException, RequestValidationError, KeyError, TemplateError, TypeError, ValueError):
        app.add_exception_handler(error, explain)
    app.add_middleware(BodyLimit, max_body_bytes=MAX_BODY_BYTES)
    return app


@functools.wraps(Serve, updated=())
def serve(**options) -> None:
    model, host, port = options["force_model"], options["host"], options["port"]
    if not is_serve_available():
        sys.exit('error: serving needs FastAPI, uvicorn and openai: pip install "modeling-llava-hr[serving]"')
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
    server.build_server = functools.partial(build_server, server.build_server)
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
