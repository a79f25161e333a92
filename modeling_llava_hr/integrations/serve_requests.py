# SPDX-License-Identifier: Apache-2.0
"""Limits of requests to the server: size and duration, fields, and images as data URLs only."""

import base64
import io
from collections.abc import Callable
from typing import Annotated, Any, Literal

import anyio
from fastapi import HTTPException
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, Json, model_validator


MAX_REQUESTS = 64  # that wait for their turn or are answered
MAX_BODY_BYTES = 32 * 2**20  # room for 24 MB of images in base64
MAX_SECONDS = 60  # to send a request, and to take each piece of the answer
MAX_IMAGES = 16
MAX_PIXELS = 100 * 10**6  # of all images of a request
# Formats that Pillow decodes itself, whatever name or type was given. (For EPS it starts another program.)
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Fields that transformers ignores, and that are allowed: with any value, or with this value only
IGNORED = {"metadata", "parallel_tool_calls", "service_tier", "store", "stream_options", "user"}
WITHOUT_EFFECT = {
    **{"n": 1, "best_of": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "echo": False, "tools": []},
    **{"modalities": ["text"], "response_format": {"type": "text"}, "text": {"format": {"type": "text"}}},
    **{"tool_choice": "auto", "truncation": "disabled"},
}


def count_pixels(url: str) -> int:
    """Pixels of the image in a data URL, without decoding it. Refuses paths and addresses."""
    header, _, content = url.partition(",")
    if not header.startswith("data:image/") or "," in content:  # parsers disagree about a second comma
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
    """Options of generation, within bounds that keep the server responsive."""

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
    ASGI middleware that bounds the number of requests (uvicorn counts connections, idle ones as well), the bytes of
    each, and the seconds that a client may take to send it and to take each piece of the answer.

    Args:
        app (`Callable`): The ASGI app around which it is put.
    """

    def __init__(self, app: Callable):
        self.app, self.places = app, anyio.Semaphore(MAX_REQUESTS)

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
            return await receive()  # after this only the disconnect arrives

        async def send_within_limits(message: dict) -> None:
            with anyio.fail_after(MAX_SECONDS):
                await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] != "POST":  # such as /health
            return await self.app(scope, receive_within_limits, send_within_limits)
        try:
            self.places.acquire_nowait()
        except anyio.WouldBlock:
            error = {"message": f"{MAX_REQUESTS} requests are waiting. Try again later.", "type": "server_error"}
            return await JSONResponse({"error": {**error, "param": None, "code": None}}, 503)(scope, receive, send)
        try:
            await self.app(scope, receive_within_limits, send_within_limits)
        finally:
            self.places.release()
