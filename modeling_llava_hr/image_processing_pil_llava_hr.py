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
import os
import struct
from io import BytesIO
from typing import Annotated

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType
from transformers.utils.type_validators import image_size_validator


DOWNLOAD_TIMEOUT = 60  # seconds

# The released models' smallest ViT grid: that of CLIP ViT-L/14-336
MIN_GRID = 24


class LlavaHrImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    high_res_size (`int` or `dict[str, int]`, *optional*, defaults to `{"height": 1024, "width": 1024}`):
        Side of the square high-resolution view in pixels, a multiple of `high_res_stride`.
    patch_size (`int`, *optional*, defaults to 14):
        Side of a ViT patch in pixels; `size`, the side of the low-resolution view, is a multiple of it.
    high_res_stride (`int`, *optional*, defaults to 32):
        Pixels of the high-resolution view between two features of the CNN.
    image_aspect_ratio (`str`, *optional*, defaults to `"pad"`):
        `"pad"`: the whole picture, padded to a square. `"crop"`: shortest edge to `high_res_size`, then its centre.
    """

    high_res_size: Annotated[int | list[int] | tuple[int, ...] | dict[str, int] | None, image_size_validator()]
    patch_size: int
    high_res_stride: int
    image_aspect_ratio: str


class LlavaHrImageProcessorMixin:
    """Arguments, their validation, and the way from whatever a user brings to an 8-bit RGB picture."""

    valid_kwargs = LlavaHrImageProcessorKwargs
    model_input_names = ["pixel_values", "high_res_pixel_values"]

    size = {"height": 448, "width": 448}
    high_res_size = {"height": 1024, "width": 1024}
    patch_size = 14
    high_res_stride = 32
    image_aspect_ratio = "pad"
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[LlavaHrImageProcessorKwargs]):
        super().__init__(**kwargs)
        # A preprocessor_config.json that contradicts itself fails when it is loaded, not at the first picture
        _check_geometry(
            self.size, self.high_res_size, self.patch_size, self.high_res_stride, self.image_aspect_ratio
        )

    def _standardize_kwargs(self, high_res_size=None, **kwargs) -> dict:
        kwargs = super()._standardize_kwargs(**kwargs)
        if high_res_size is not None and not isinstance(high_res_size, SizeDict):
            high_res_size = SizeDict(**get_size_dict(high_res_size, param_name="high_res_size"))
        return {**kwargs, "high_res_size": high_res_size}

    def _validate_preprocess_kwargs(
        self, size, high_res_size, patch_size, high_res_stride, image_aspect_ratio, **kwargs
    ) -> None:
        super()._validate_preprocess_kwargs(size=size, **kwargs)
        _check_geometry(size, high_res_size, patch_size, high_res_stride, image_aspect_ratio)
        for name in ("do_pad", "do_center_crop"):
            if kwargs[name]:
                raise ValueError(f'`{name}` has no effect here. Use `image_aspect_ratio="pad"` or `"crop"`.')

    def fetch_images(self, image_url_or_urls):
        """
        Reads whatever is not a picture in memory yet. PIL decodes for both backends, so that modes, EXIF orientation
        and the guard against decompression bombs are the same.

        Args:
            image_url_or_urls: A picture or (nested) lists of pictures, each of them a `PIL.Image.Image`, an array or
                tensor (2-D grayscale, 3-D, or a 4-D batch), a path, an http(s) URL, a base64 string or data URI, or
                the bytes of a picture file. Of an animation the first frame is taken.

        Returns:
            The same nesting of `PIL.Image.Image` and 3-D or 4-D arrays.

        Raises:
            ValueError: If something cannot be read; the message says which and why.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        image = image_url_or_urls
        if isinstance(image, (str, bytes, bytearray, os.PathLike)):
            return _read_picture(image)
        if isinstance(image, Image.Image):
            return image
        if not isinstance(image, (np.ndarray, torch.Tensor)):
            raise ValueError(
                f"`images` must hold PIL images, arrays, tensors, paths, URLs, base64 strings or bytes, but got "
                f"{type(image).__name__}."
            )
        if image.ndim not in (2, 3, 4):
            raise ValueError(
                f"An array in `images` must have 2 (grayscale), 3 (a picture) or 4 (a batch) dimensions, but got shape "
                f"{tuple(image.shape)}."
            )
        # transformers knows pictures with a channel axis only
        return image if image.ndim > 2 else (np if isinstance(image, np.ndarray) else torch).stack([image] * 3)

    def _preprocess_image_like_inputs(self, images, **kwargs) -> BatchFeature:
        images = self._prepare_images_structure(images)
        if not images:
            raise ValueError("`images` is empty: give at least one picture.")
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
        return self._preprocess(pictures, **kwargs)


class LlavaHrImageProcessorPil(LlavaHrImageProcessorMixin, PilBackend):
    r"""
    Makes the two views of a picture with PIL, bit for bit as the released code does. See [`LlavaHrImageProcessor`] for
    arguments and results.
    """

    def process_image(
        self, image, do_convert_rgb: bool | None = None, input_data_format: str | None = None, **kwargs
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
        high_res_size: SizeDict,
        resample: PILImageResampling | int,
        image_aspect_ratio: str,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | tuple[float, ...] | None,
        image_std: float | tuple[float, ...] | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        side = high_res_size.height
        # One row per colour, one column per 8-bit value: three table look-ups instead of arithmetic on every pixel
        table = np.tile(np.arange(256) * (rescale_factor if do_rescale else 1), (3, 1)).astype(np.float32)
        if do_normalize:
            mean, std = (np.broadcast_to(x, 3).astype(np.float32)[:, None] for x in (image_mean, image_std))
            table = (table - mean) / std
        high_res = np.empty((len(images), 3, side, side), dtype=np.float32)
        for index, image in enumerate(images):
            check_picture_size(index, image.height, image.width, side, do_resize, image_aspect_ratio)
            if do_resize:
                image = self._fit(image, side, resample, image_aspect_ratio, padding_color(image_mean))
            for channel, values in enumerate(image.split()):
                np.take(table[channel], np.asarray(values), out=high_res[index, channel], mode="clip")
        low_res = low_res_view(torch.from_numpy(high_res), size).numpy()
        return BatchFeature(
            data={"pixel_values": low_res, "high_res_pixel_values": high_res}, tensor_type=return_tensors
        )

    def _fit(
        self,
        image: Image.Image,
        side: int,
        resample: PILImageResampling | int,
        image_aspect_ratio: str,
        color: tuple[int, int, int],
    ) -> Image.Image:
        if image_aspect_ratio == "crop":
            height, width = shortest_edge_size(image.height, image.width, side)
            left, top = (width - side) // 2, (height - side) // 2
            return image.resize((width, height), resample).crop((left, top, left + side, top + side))
        longest = max(image.size)
        if image.width > image.height:
            # PIL resizes rows first, then columns, with 8-bit values between. Rows of padding do not change in the
            # first pass, so that padding after it gives the same bits for less work.
            image = image.resize((side, image.height), resample)
        if image.height != image.width:
            canvas = Image.new("RGB", (max(image.width, side if longest > image.height else longest), longest), color)
            canvas.paste(image, ((canvas.width - image.width) // 2, (longest - image.height) // 2))
            image = canvas
        return image.resize((side, side), resample)
