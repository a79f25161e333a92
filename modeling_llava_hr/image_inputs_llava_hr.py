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
"""Converts image inputs of any kind to upright 8-bit RGB."""

import base64
import itertools
import os
import re
import struct
from io import BytesIO
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps


DOWNLOAD_TIMEOUT = 60  # seconds
# A data URI, or a string of base64 characters that is too long for a mistyped file name
_BASE64 = re.compile(r"data:[^,]*,.*|[A-Za-z0-9+/\s]{50,}[=\s]*", re.DOTALL)
# Tolerance for values that half-precision arithmetic moves out of their range
_ROUNDING = 1e-3


def fetch_images(images: Any) -> Any:
    """
    Reads images that are not in memory yet. Both backends decode with PIL, so that they share its modes and its guard
    against decompression bombs.

    Args:
        images: An image or (nested) lists of images, each of them a `PIL.Image.Image`, an array or tensor (2-D
            grayscale, 3-D, or a 4-D batch), a path, an http(s) URL, a base64 string or data URI, or the bytes of an
            image file. Only the first frame of an animation is used.

    Returns:
        The same nesting of decoded `PIL.Image.Image` and 3-D arrays.

    Raises:
        ValueError: If something cannot be read, or this is neither an image, nor a list of images, nor a list of such
            lists; the message says which and why.
    """
    images = _fetch(images, "images")
    if not isinstance(images, list):
        return images
    is_list = [isinstance(item, list) for item in images]
    if any(is_list) and not all(is_list):
        raise ValueError("`images` mixes images and lists of images. Give either images, or for each sample a list.")
    flat = list(itertools.chain(*images)) if any(is_list) else images
    if any(isinstance(item, list) for item in flat):
        raise ValueError("`images` is nested too deep. Give either images, or for each sample a list of them.")
    if not flat:
        raise ValueError("`images` is empty: give at least one image.")
    return images


def _fetch(image: Any, name: str) -> Any:
    if isinstance(image, (list, tuple)):
        return [_fetch(item, f"{name}[{index}]") for index, item in enumerate(image)]
    if isinstance(image, (str, bytes, bytearray, os.PathLike)):
        return _read(image, name)
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise ValueError(
            f"`{name}` must be a PIL image, array, tensor, path, URL, base64 string or bytes, but is of type "
            f"{type(image).__name__}."
        )
    if image.ndim not in (2, 3, 4):
        raise ValueError(
            f"`{name}` must have 2 dimensions (grayscale), 3 (an image) or 4 (a batch), but has shape "
            f"{tuple(image.shape)}."
        )
    if isinstance(image, torch.Tensor) and (image.layout is not torch.strided or image.is_quantized or image.is_meta):
        raise ValueError(f"`{name}` must be a dense tensor with values, but is {image.layout} on {image.device}.")
    if image.ndim == 4:
        return list(image)
    if image.ndim == 3:
        return image
    # transformers only takes images with a channel axis
    return np.stack([image] * 3) if isinstance(image, np.ndarray) else torch.stack([image] * 3)


def _read(source: str | bytes | bytearray | os.PathLike, name: str) -> Image.Image:
    """Decodes a path, URL, base64 string, data URI or file content."""
    file: BytesIO | str | os.PathLike
    try:
        if isinstance(source, (bytes, bytearray)):
            what, file = f"{len(source)} bytes", BytesIO(source)
        elif isinstance(source, str) and source.startswith(("http://", "https://")):
            what = f"the URL {source!r}"
            response = httpx.get(source, timeout=DOWNLOAD_TIMEOUT, follow_redirects=True)
            file = BytesIO(response.raise_for_status().content)
        elif isinstance(source, str) and not os.path.exists(source) and _BASE64.fullmatch(source):
            what = f"not an existing file, so read as base64: {source[:100]!r}"
            file = BytesIO(base64.decodebytes(source.split(",")[-1].encode()))
        else:
            what, file = f"the file {os.fspath(source)!r:.200}", source
            if os.path.exists(source) and not os.path.isfile(source):
                raise OSError("it is a folder, a device or a pipe")  # which might never end
        with Image.open(file) as image:
            _load(image)
            return image
    except Exception as error:  # the network's, the file system's, and every decoder's own
        raise ValueError(f"`{name}` cannot be read as an image ({what}): {error!s:.300}") from error


def _load(image: Image.Image) -> None:
    """Decodes an image that was only opened; does nothing if it is decoded already."""
    if image.format == "EPS":
        raise ValueError("it is PostScript, a program that Ghostscript would have to run. Give it as PNG.")
    try:
        image.load()
    except Exception:
        image.close()  # a second call would return the partial image without an error
        raise


def pil_to_rgb(image: Image.Image, do_convert_rgb: bool | None = True) -> Image.Image:
    """
    Converts an image to upright 8-bit RGB, with white behind transparency. 16-bit values are scaled to 8 bits.

    Args:
        image (`PIL.Image.Image`): An image of any mode, decoded or not.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): If off, the image must be RGB already.

    Returns:
        `PIL.Image.Image` of mode RGB; `image` itself if nothing has to be done.

    Raises:
        ValueError: If PIL cannot decode it, it has no pixels, or its values are not a brightness.
    """
    if not do_convert_rgb and image.mode != "RGB":
        raise ValueError(f"its mode is {image.mode}, but `do_convert_rgb` is off. Leave it on.")
    if 0 in image.size:
        raise ValueError(f"it has no pixels (width {image.width}, height {image.height}).")
    try:
        _load(image)
        image = _upright(image)
    except Exception as error:  # every decoder has errors of its own
        raise ValueError(f"PIL cannot decode it: {error}") from error
    if image.mode == "F" or image.mode.startswith("I"):
        image = _gray_to_8bit(image)
    try:
        if image.has_transparency_data:
            image = image.convert("LA") if image.mode == "La" else image
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # such as an invalid transparent color
        raise ValueError(f"PIL cannot convert it from {image.mode} to RGB: {error}") from error


def get_upright_size(image: Image.Image) -> tuple[int, int]:
    """Height and width in pixels of an image after applying its EXIF orientation; does not decode it."""
    return image.size if _get_orientation(image) in range(5, 9) else image.size[::-1]


def _get_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, struct.error):
        return 1  # broken metadata of a good image


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _get_orientation(image) in range(2, 9) else image


def _gray_to_8bit(image: Image.Image) -> Image.Image:
    """Converts modes F, I and I;16 to L, or LA if one value marks transparency. PIL would clip them to white."""
    array = np.asarray(image)
    if image.mode == "I" and array.min() >= 0 and 255 < array.max() < 2**16:
        array = array.astype(np.uint16)
    gray = Image.fromarray(array_to_rgb(array)[0].numpy())
    transparent = image.info.get("transparency")
    if transparent is None:
        return gray
    if not isinstance(transparent, int | float):
        raise ValueError(f"its transparent color {transparent!r:.40} is not a shade of gray.")
    return Image.merge("LA", (gray, Image.fromarray(np.where(array == transparent, 0, 255).astype(np.uint8))))


def array_to_rgb(
    image: np.ndarray | torch.Tensor, do_convert_rgb: bool | None = True, input_data_format: str | None = None
) -> torch.Tensor:
    """
    Converts an array to an 8-bit RGB tensor. Floats are brightness from 0 to 1 if none is above 1, else from 0 to 255;
    uint16 is from 0 to 65535; booleans are black and white; other integers are from 0 to 255.

    Args:
        image (`np.ndarray` or `torch.Tensor`):
            `(height, width)`, or with 1, 3 or 4 (RGBA, onto white) channels first or last.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): If off, there must be 3 channels already.
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"`; inferred where the shape is unambiguous.

    Returns:
        `torch.Tensor` of shape `(3, height, width)` and dtype uint8 on the image's device.

    Raises:
        ValueError: If dtype, shape or values are not those of an image.
    """
    is_numeric = image.dtype.kind in "buif" if isinstance(image, np.ndarray) else not image.is_complex()
    if not is_numeric or image.dtype.itemsize > 8:
        raise ValueError(f"its dtype must be boolean, integer or float, but is {image.dtype}.")
    if isinstance(image, np.ndarray):
        # A copy, since torch does not support foreign byte orders, negative strides or read-only memory
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
    if image.numel() == 0:
        raise ValueError(f"it has no pixels (shape {tuple(image.shape)}).")
    image = _to_uint8(_channels_first(image, input_data_format))
    if image.shape[0] == 3:
        return image
    if not do_convert_rgb:
        raise ValueError(f"it has {image.shape[0]} channels, but `do_convert_rgb` is off. Leave it on.")
    if image.shape[0] == 1:
        return image.expand(3, -1, -1)
    color, alpha = image[:3].int(), image[3:].int()
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def _channels_first(image: torch.Tensor, input_data_format: str | None) -> torch.Tensor:
    """An image of any layout as `(channels, height, width)`."""
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"it must have 2 or 3 dimensions, but has shape {tuple(image.shape)}.")
    # if one end has 3 or 4 and the other 1, then 3 or 4 is more likely the number of channels
    likely = {1: 1, 3: 2, 4: 2}
    first, last = (likely.get(image.shape[axis], 0) for axis in (0, -1))
    if input_data_format is None and first == last and image.numel() > 1:
        raise ValueError(
            f"its shape {tuple(image.shape)} does not say which axis holds the 1, 3 or 4 channels. Give "
            '`input_data_format="channels_first"` or `"channels_last"`, and the image in one of these numbers.'
        )
    channels_last = last > first if input_data_format is None else input_data_format == "channels_last"
    image = image.permute(2, 0, 1) if channels_last else image
    if image.shape[0] not in likely:
        raise ValueError(f"it must have 1, 3 or 4 channels, but has {image.shape[0]} (shape {tuple(image.shape)}).")
    return image


def _to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Converts brightness of any dtype to 8-bit values."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if image.dtype == torch.uint16:
        return ((image.int() + 128) // 257).to(torch.uint8)
    is_float = image.is_floating_point()
    image = image.float() if is_float else image.long()
    low, high = image.min().item(), image.max().item()
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds NaN or infinite values.")
    # In a range of 0 to 255, a float image without a value above 2 would be black: more likely it overshoots [0, 1]
    tolerance = _ROUNDING if is_float else 0
    in_unit_range = is_float and high <= 1 + tolerance
    if low < -tolerance or high > 255 + tolerance or (is_float and not in_unit_range and high < 2):
        expected = "[0, 1] or [0, 255]" if is_float else "[0, 255] (or [0, 65535] as uint16)"
        raise ValueError(f"its values must be in {expected}, but go from {low:g} to {high:g}.")
    return (image * 255 if in_unit_range else image).round().clamp(0, 255).to(torch.uint8)


def is_scaled(image: Image.Image | np.ndarray | torch.Tensor) -> bool:
    """Whether an image that [`array_to_rgb`] accepts holds floats in [0, 1]."""
    if isinstance(image, Image.Image):
        return False
    is_float = image.dtype.kind == "f" if isinstance(image, np.ndarray) else image.is_floating_point()
    return bool(is_float and image.max() <= 1 + _ROUNDING)
