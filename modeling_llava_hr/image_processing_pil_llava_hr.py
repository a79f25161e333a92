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
"""What both image processors of LLaVA-HR share, and the PIL one."""

import base64
import itertools
import os
import re
import struct
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .configuration_llava_hr import get_low_res_size


if TYPE_CHECKING:
    # Never runs: transformers copies the files that a file names in relative imports beside saved weights, and a
    # processor that was saved with one backend is to load with the other as well.
    from .image_processing_llava_hr import LlavaHrImageProcessor  # noqa: F401


AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_llava_hr.LlavaHrImageProcessor",
        "pil": "image_processing_pil_llava_hr.LlavaHrImageProcessorPil",
    }
}

DOWNLOAD_TIMEOUT = 60  # seconds

# Of a padded picture at a time: little enough for a processor's cache
MAX_BAND_PIXELS = 2**20

# A data URI, or text that is too long for a mistyped file name and has only characters of base64
_BASE64 = re.compile(r"data:[^,]*,.*|[A-Za-z0-9+/\s]{50,}[=\s]*", re.DOTALL)

_IMPORTED_BY = os.getpid()

# How far arithmetic in half precision may carry a value out of its range
ROUNDING = 1e-3


class LlavaHrImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # a TypedDict of transformers
    r"""
    low_res_size (`int` or `dict[str, int]`, *optional*):
        Side of the square low-resolution view in pixels, a multiple of `patch_size`. `None` is the released rule, see
        [`get_low_res_size`].
    min_low_res_size (`int`, *optional*, defaults to 336):
        Smallest side that the rule gives in pixels: the ViT's own image size.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a ViT patch in pixels.
    high_res_stride (`int`, *optional*, defaults to 32):
        Pixels of the image per position of the high-resolution feature map; `size` is a multiple of it.
    image_aspect_ratio (`str`, *optional*, defaults to `"pad"`):
        `"pad"`: the whole image, padded to a square. `"crop"`: shortest edge to `size`, then its centre.
    return_low_res (`bool`, *optional*, defaults to `True`):
        Whether to return `low_res_pixel_values` as well, the view that the model otherwise computes itself.
    """

    low_res_size: int | dict[str, int] | None
    min_low_res_size: int
    patch_size: int
    high_res_stride: int
    image_aspect_ratio: str
    return_low_res: bool


class LlavaHrImageProcessorMixin:
    """Arguments, their validation, and the way from whatever a user brings to an 8-bit RGB picture."""

    valid_kwargs = LlavaHrImageProcessorKwargs
    model_input_names = ["pixel_values", "low_res_pixel_values"]
    _auto_class = "AutoImageProcessor"

    size = {"height": 1024, "width": 1024}
    low_res_size = None
    min_low_res_size = 336
    patch_size = 14
    high_res_stride = 32
    image_aspect_ratio = "pad"
    return_low_res = True
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[LlavaHrImageProcessorKwargs]):
        super().__init__(**kwargs)
        # A configuration that contradicts itself fails when it is loaded, not at the first image
        values: dict[str, Any] = {name: getattr(self, name, None) for name in self._valid_kwargs_names}
        self._validate_preprocess_kwargs(**values)

    def get_low_res_size(self, size: Any = None, low_res_size: Any = None, **kwargs: Any) -> int:
        """
        Side of the low-resolution view in pixels that a call with these arguments makes.

        Args:
            size (`int` or `dict[str, int]`, *optional*): Side of the image in pixels; the saved one by default.
            low_res_size (`int` or `dict[str, int]`, *optional*):
                Side of the low-resolution view in pixels; by default the saved one, or that of the released rule.
            kwargs: `patch_size`, `high_res_stride`, `min_low_res_size`; the rest is ignored.

        Raises:
            ValueError: If the sides do not fit each other.
        """
        return get_low_res_size(
            _to_side("size", self.size if size is None else size),
            _to_side("low_res_size", self.low_res_size if low_res_size is None else low_res_size),
            patch_size=kwargs.get("patch_size", self.patch_size),
            stride=kwargs.get("high_res_stride", self.high_res_stride),
            min_low_res_size=kwargs.get("min_low_res_size", self.min_low_res_size),
        )

    def _standardize_kwargs(self, low_res_size: Any = None, **kwargs: Any) -> dict[str, Any]:
        return {**super()._standardize_kwargs(**kwargs), "low_res_size": _to_side("low_res_size", low_res_size)}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "auto_map": AUTO_MAP}

    def _validate_preprocess_kwargs(self, image_aspect_ratio: str, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if image_aspect_ratio not in ("pad", "crop"):
            raise ValueError(f'`image_aspect_ratio` must be "pad" or "crop", but got {image_aspect_ratio!r}.')
        self.get_low_res_size(**kwargs)
        for name in ("do_pad", "do_center_crop"):
            if kwargs[name]:
                raise ValueError(f'`{name}` has no effect here. Use `image_aspect_ratio="pad"` or `"crop"`.')

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Reads whatever is not a picture in memory yet. PIL decodes for both backends, so that modes, EXIF orientation
        and the guard against decompression bombs are the same.

        Args:
            image_url_or_urls: A picture or (nested) lists of pictures, each of them a `PIL.Image.Image`, an array or
                tensor (2-D grayscale, 3-D, or a 4-D batch), a path, an http(s) URL, a base64 string or data URI, or
                the bytes of a picture file. Of an animation the first frame is taken.

        Returns:
            The same nesting of `PIL.Image.Image` and 3-D arrays.

        Raises:
            ValueError: If something cannot be read, or this is neither a picture, nor a list of pictures, nor a list
                of such lists; the message says which and why.
        """
        images = _fetch(image_url_or_urls, "images")
        _check_nesting(images)
        return images

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        if os.getpid() != _IMPORTED_BY and torch.get_num_threads() > 1:
            torch.set_num_threads(1)  # torch's threads do not survive a fork: the first parallel operation would hang
        images = self._prepare_images_structure(images)
        pictures = []
        for index, image in enumerate(images):
            try:
                pictures.append(self.process_image(image, **kwargs))
            except ValueError as error:
                raise ValueError(f"Picture {index} of `images`: {error}") from error
        if not kwargs["do_rescale"]:
            scaled = [_is_scaled(image) for image in images]
            if any(scaled) and not all(scaled):
                raise ValueError(
                    "With `do_rescale=False` either all or none of `images` may be floats in [0, 1]. Leave "
                    "`do_rescale` on: such floats are recognised."
                )
            if all(scaled):  # `process_image` made 8-bit values of them
                kwargs.update(do_rescale=True, rescale_factor=1 / 255)
        pixel_values = self._preprocess(pictures, **kwargs)
        data = {"pixel_values": pixel_values}
        if kwargs["return_low_res"]:
            data["low_res_pixel_values"] = make_low_res_view(pixel_values, self.get_low_res_size(**kwargs))
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])


class LlavaHrImageProcessorPil(LlavaHrImageProcessorMixin, PilBackend):
    r"""
    Makes the two views of a picture with PIL, for 8-bit pictures without transparency bit for bit as the released code
    does. See [`LlavaHrImageProcessor`] for arguments and results.
    """

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> Image.Image:
        """A picture in memory (PIL image, 3-D array or tensor) as 8-bit RGB. Raises ValueError if it cannot be one."""
        if isinstance(image, Image.Image):
            return pil_to_rgb(image, do_convert_rgb)
        array = array_to_rgb(image, do_convert_rgb, input_data_format)
        return Image.fromarray(array.permute(1, 2, 0).contiguous().numpy(force=True))

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int,
        image_aspect_ratio: str,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        side = size.height
        # One row per colour, one column per 8-bit value: three table look-ups instead of arithmetic on every pixel
        table = np.tile(np.arange(256) * (rescale_factor if do_rescale else 1), (3, 1)).astype(np.float32)
        if do_normalize:
            given: Any = (image_mean, image_std)
            mean, std = (np.broadcast_to(x, 3).astype(np.float32)[:, None] for x in given)
            table = (table - mean) / std
        high_res = np.empty((len(images), 3, side, side), dtype=np.float32)
        for index, image in enumerate(images):
            check_picture_size(index, image.height, image.width, side, do_resize, image_aspect_ratio)
            if do_resize:
                image = self._fit(image, side, resample, image_aspect_ratio, padding_color(image_mean))
            for channel, values in enumerate(image.split()):
                np.take(table[channel], np.asarray(values), out=high_res[index, channel], mode="clip")
        return torch.from_numpy(high_res)

    def _fit(
        self,
        image: Image.Image,
        side: int,
        resample: PILImageResampling | int,
        image_aspect_ratio: str,
        color: tuple[int, ...],
    ) -> Image.Image:
        if image_aspect_ratio == "crop":
            height, width = shortest_edge_size(image.height, image.width, side)
            left, top = (width - side) // 2, (height - side) // 2
            return image.resize((width, height), resample).crop((left, top, left + side, top + side))
        # PIL resizes rows first, then columns, with 8-bit values between. So the first pass can be made by itself,
        # before rows of padding are there, and a few rows at a time: the same bits without a square in memory.
        longest = max(image.size)
        if image.width > image.height:
            rows = Image.new("RGB", (side, longest), color)
            rows.paste(image.resize((side, image.height), resample), (0, (longest - image.height) // 2))
        elif image.height > image.width:
            rows, left = Image.new("RGB", (side, longest)), (longest - image.width) // 2
            for top, bottom in get_bands(longest):
                band = Image.new("RGB", (longest, bottom - top), color)
                band.paste(image, (left, -top))
                rows.paste(band.resize((side, bottom - top), resample), (0, top))
        else:
            rows = image
        return rows.resize((side, side), resample)


def _to_side(name: str, size: Any) -> Any:
    """The side in pixels of a square's size in any form. Raises ValueError if it is not a square's."""
    if size is None or isinstance(size, int):
        return size
    sides = size if isinstance(size, SizeDict) else SizeDict(**get_size_dict(size, param_name=name))
    if sides.height is None or sides.height != sides.width:
        raise ValueError(f"`{name}` must be an int or a dict with equal height and width, but got {dict(sides)}.")
    return sides.height


def _fetch(image: Any, name: str) -> Any:
    """[`LlavaHrImageProcessorMixin.fetch_images`] for what is called `name` in errors."""
    if isinstance(image, (list, tuple)):
        return [_fetch(item, f"{name}[{index}]") for index, item in enumerate(image)]
    if isinstance(image, (str, bytes, bytearray, os.PathLike)):
        return _read_picture(image, name)
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise ValueError(
            f"`{name}` must be a PIL image, array, tensor, path, URL, base64 string or bytes, but is of type "
            f"{type(image).__name__}."
        )
    if image.ndim not in (2, 3, 4):
        raise ValueError(
            f"`{name}` must have 2 dimensions (grayscale), 3 (a picture) or 4 (a batch), but has shape "
            f"{tuple(image.shape)}."
        )
    if isinstance(image, torch.Tensor) and (image.layout is not torch.strided or image.is_quantized or image.is_meta):
        kind = "quantized" if image.is_quantized else "empty" if image.is_meta else image.layout
        raise ValueError(f"`{name}` must be a dense tensor with values, but is {kind} ({image.device}).")
    if image.ndim == 4:
        return list(image)
    if image.ndim == 3:
        return image
    # transformers knows pictures with a channel axis only
    return np.stack([image] * 3) if isinstance(image, np.ndarray) else torch.stack([image] * 3)


def _check_nesting(images: Any) -> None:
    """Raises ValueError unless this is a picture, a list of pictures or a list of such lists, and not empty."""
    if not isinstance(images, list):
        return
    is_list = [isinstance(item, list) for item in images]
    if any(is_list) and not all(is_list):
        index = is_list.index(not is_list[0])
        kinds = ["one picture", "a list of pictures"]
        raise ValueError(
            f"`images[{index}]` is {kinds[is_list[index]]}, but `images[0]` is {kinds[is_list[0]]}. Give either "
            "pictures, or for each sample a list of them."
        )
    pictures = list(itertools.chain(*images)) if any(is_list) else images
    if any(isinstance(item, list) for item in pictures):
        raise ValueError("`images` is nested too deep. Give either pictures, or for each sample a list of them.")
    if not pictures:
        raise ValueError("`images` is empty: give at least one picture.")


def _read_picture(source: str | bytes | bytearray | os.PathLike, name: str) -> Image.Image:
    """A path, URL, base64 string, data URI or file content as a PIL image; ValueError if it is none of them."""
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
            return _upright(image)
    except Exception as error:  # the network's, the file system's, and every decoder's own
        raise ValueError(f"`{name}` cannot be read as an image ({what}): {error!s:.300}") from error


def _load(image: Image.Image) -> None:
    """Decodes a picture that may have been opened only. Raises whatever Pillow does."""
    if image.format == "EPS":
        raise ValueError("it is PostScript, a program that Ghostscript would have to run. Give it as PNG.")
    try:
        image.load()
    except Exception:
        image.close()  # the next time, Pillow would take what it has of the picture for the whole
        raise


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (OSError, SyntaxError, ValueError, struct.error):
        return image  # broken metadata of a good picture
    return ImageOps.exif_transpose(image) if orientation in range(2, 9) else image


def pil_to_rgb(image: Image.Image, do_convert_rgb: bool | None = True) -> Image.Image:
    """
    An upright 8-bit RGB picture, with white behind what is transparent. 16-bit values are scaled to 8 bits.

    Args:
        image (`PIL.Image.Image`): A picture of any mode.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): If not, the picture must be RGB already.

    Returns:
        `PIL.Image.Image` of mode RGB; the picture itself if there is nothing to do.

    Raises:
        ValueError: If PIL cannot decode it, it has no pixels, or its values are no brightness.
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
    except Exception as error:  # such as a transparent colour that is none
        raise ValueError(f"PIL cannot convert it from {image.mode} to RGB: {error}") from error


def _gray_to_8bit(image: Image.Image) -> Image.Image:
    """Modes F, I and I;16 as L, or LA if one value stands for transparency. PIL would clip them to white."""
    array = np.asarray(image)
    if image.mode == "I" and array.min() >= 0 and 255 < array.max() < 2**16:
        array = array.astype(np.uint16)
    gray = Image.fromarray(array_to_rgb(array)[0].numpy())
    transparent = image.info.get("transparency")
    if transparent is None:
        return gray
    if not isinstance(transparent, int | float):
        raise ValueError(f"its transparent colour {transparent!r:.40} is no shade of grey.")
    return Image.merge("LA", (gray, Image.fromarray(np.where(array == transparent, 0, 255).astype(np.uint8))))


def array_to_rgb(
    image: np.ndarray | torch.Tensor, do_convert_rgb: bool | None = True, input_data_format: str | None = None
) -> torch.Tensor:
    """
    An 8-bit RGB tensor of an array. Floats are taken as brightness from 0 to 1 if none is above 1, else from 0 to
    255; uint16 from 0 to 65535; booleans as black and white; other integers from 0 to 255.

    Args:
        image (`np.ndarray` or `torch.Tensor`):
            `(height, width)`, or with 1, 3 or 4 (RGBA, onto white) channels first or last.
        do_convert_rgb (`bool`, *optional*, defaults to `True`): If not, there must be 3 channels already.
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"`; inferred where the shape leaves no doubt.

    Returns:
        `torch.Tensor` of shape `(3, height, width)` and dtype uint8 on the image's device.

    Raises:
        ValueError: If dtype, shape or values are not those of a picture.
    """
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "buif" or image.dtype.itemsize > 8:
            raise ValueError(f"its dtype must be boolean, integer or float, but is {image.dtype}.")
        # A copy, since torch knows no foreign byte orders, negative strides or read-only memory
        image = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("="), order="C"))
    if image.is_complex():
        raise ValueError(f"its dtype must be boolean, integer or float, but is {image.dtype}.")
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
    """A picture of any layout as `(channels, height, width)`."""
    if image.ndim == 2:
        return image[None]
    if image.ndim != 3:
        raise ValueError(f"it must have 2 or 3 dimensions, but has shape {tuple(image.shape)}.")
    # Three or four of something are channels rather than a picture of that many pixels if the other end has one
    likely = {1: 1, 3: 2, 4: 2}
    first, last = (likely.get(image.shape[axis], 0) for axis in (0, -1))
    if input_data_format is None and first == last and image.numel() > 1:
        raise ValueError(
            f"its shape {tuple(image.shape)} does not say which axis holds the 1, 3 or 4 channels. Give "
            '`input_data_format="channels_first"` or `"channels_last"`, and colours in one of these numbers.'
        )
    channels_last = last > first if input_data_format is None else input_data_format == "channels_last"
    image = image.permute(2, 0, 1) if channels_last else image
    if image.shape[0] not in likely:
        raise ValueError(f"it must have 1, 3 or 4 channels, but has {image.shape[0]} (shape {tuple(image.shape)}).")
    return image


def _to_uint8(image: torch.Tensor) -> torch.Tensor:
    """Brightness of any dtype as 8-bit values."""
    if image.dtype == torch.uint8:
        return image
    if image.dtype == torch.bool:
        return image.to(torch.uint8) * 255
    if image.dtype == torch.uint16:
        return ((image.int() + 128) // 257).to(torch.uint8)
    image = image.float() if image.is_floating_point() else image.long()
    low, high = image.min().item(), image.max().item()
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds NaN or infinite values.")
    # A float picture from 0 to 255 without a value above 2 would be black: rather one from 0 to 1 that overshoots
    tolerance = ROUNDING if image.is_floating_point() else 0
    in_unit_range = image.is_floating_point() and high <= 1 + tolerance
    if low < -tolerance or high > 255 + tolerance or (image.is_floating_point() and not in_unit_range and high < 2):
        expected = "[0, 1] or [0, 255]" if image.is_floating_point() else "[0, 255] (or [0, 65535] as uint16)"
        raise ValueError(f"its values must lie in {expected}, but go from {low:g} to {high:g}.")
    return (image * 255 if in_unit_range else image).round().clamp(0, 255).to(torch.uint8)


def _is_scaled(image: Image.Image | np.ndarray | torch.Tensor) -> bool:
    """Whether an array that is known to be a picture holds floats in [0, 1]."""
    if isinstance(image, Image.Image):
        return False
    is_float = image.dtype.kind == "f" if isinstance(image, np.ndarray) else image.is_floating_point()
    return bool(is_float and image.max() <= 1 + ROUNDING)


def check_picture_size(index: int, height: int, width: int, side: int, do_resize: bool, aspect_ratio: str) -> None:
    """
    Raises ValueError if a picture is too long to be made square within PIL's limit for decompression bombs (from which
    PIL itself refuses a file: twice `PIL.Image.MAX_IMAGE_PIXELS`; where the square is made piece by piece, which needs
    time but no memory, six times as much), or has another size though it is not resized.
    """
    if not do_resize:
        if (height, width) != (side, side):
            raise ValueError(
                f"Picture {index} of `images` is {width} x {height} pixels, but without `do_resize` it must be "
                f"{side} x {side} (`size`)."
            )
        return
    factor = 2
    if aspect_ratio == "crop":
        new_height, new_width = shortest_edge_size(height, width, side)
    elif width >= height:
        new_height, new_width = width, side  # rows are resized before columns, and before they are padded
    else:
        new_height, new_width, factor = height, height, 12
    if Image.MAX_IMAGE_PIXELS is not None and new_height * new_width > factor * Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"Picture {index} of `images` ({width} x {height} pixels) would have {new_width} x {new_height} pixels on "
            f'the way to a square (`image_aspect_ratio="{aspect_ratio}"`), over {factor} times '
            "PIL.Image.MAX_IMAGE_PIXELS. Make it smaller, or cut it into several pictures."
        )


def get_bands(side: int) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of the pieces in which the rows of a square are resized."""
    step = max(1, MAX_BAND_PIXELS // side)
    for top in range(0, side, step):
        yield top, min(top + step, side)


def shortest_edge_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width in pixels after resizing the shortest edge to `side`, as transformers rounds it."""
    return (int(side * height / width), side) if width <= height else (side, int(side * width / height))


def padding_color(image_mean: float | tuple[float, ...] | None) -> tuple[int, ...]:
    """The mean colour in 8 bits, cut as in the released code; black without a mean."""
    return tuple(int(mean * 255) for mean in np.broadcast_to(0 if image_mean is None else image_mean, 3))


def make_low_res_view(pixel_values: torch.Tensor, low_res_size: int) -> torch.Tensor:
    """
    The low-resolution view as the released code makes it, from the normalised image: bilinear, corners aligned.

    Args:
        pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`): Images as the high-resolution pathway sees them, of
            any floating-point dtype.
        low_res_size (`int`): Side L of the low-resolution view in pixels.

    Returns:
        `torch.Tensor` of shape `(images, 3, L, L)` and dtype float32, computed in float32.
    """
    size = (low_res_size, low_res_size)
    return torch.nn.functional.interpolate(pixel_values.float(), size=size, mode="bilinear", align_corners=True)


__all__ = ["LlavaHrImageProcessorKwargs", "LlavaHrImageProcessorPil"]
