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
"""Image processor of LLaVA-HR: what both backends share, and the torchvision one."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

from .configuration_llava_hr import get_low_res_size
from .image_inputs_llava_hr import array_to_rgb, fetch_images, is_scaled, pil_to_rgb


AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_llava_hr.LlavaHrImageProcessor",
        "pil": "image_processing_pil_llava_hr.LlavaHrImageProcessorPil",
    }
}

# Pixels of a padded image per band, few enough for a CPU's cache
MAX_BAND_PIXELS = 2**20

_IMPORTED_BY = os.getpid()


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
        `"pad"`: the whole image, padded to a square. `"crop"`: shortest edge to `size`, then its center.
    return_low_res (`bool`, *optional*, defaults to `True`):
        Whether to return `low_res_pixel_values` as well, the view that the model otherwise computes itself.
    unpad (`bool`, *optional*, defaults to `False`):
        Whether to return `image_sizes`, with which the model drops the tokens of the padding.
    """

    low_res_size: int | dict[str, int] | None
    min_low_res_size: int
    patch_size: int
    high_res_stride: int
    image_aspect_ratio: str
    return_low_res: bool
    unpad: bool


class LlavaHrImageProcessorMixin:
    """What both backends share: arguments, their validation, and the steps from an image to the two views."""

    valid_kwargs = LlavaHrImageProcessorKwargs
    model_input_names = ["pixel_values", "low_res_pixel_values", "image_sizes"]
    _auto_class = "AutoImageProcessor"

    size = {"height": 1024, "width": 1024}
    low_res_size = None
    min_low_res_size = 336
    patch_size = 14
    high_res_stride = 32
    image_aspect_ratio = "pad"
    return_low_res = True
    unpad = False
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[LlavaHrImageProcessorKwargs]):
        super().__init__(**kwargs)
        # An inconsistent configuration fails when it is loaded, not at the first image
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
        if kwargs["unpad"] and image_aspect_ratio != "pad":
            raise ValueError('`unpad` drops padding, which only `image_aspect_ratio="pad"` adds. Leave it off.')
        self.get_low_res_size(**kwargs)
        for name in ("do_pad", "do_center_crop"):
            if kwargs[name]:
                raise ValueError(f'`{name}` has no effect here. Use `image_aspect_ratio="pad"` or `"crop"`.')

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Reads images that are not in memory yet, see [`~image_inputs_llava_hr.fetch_images`]."""
        return fetch_images(image_url_or_urls)

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        if os.getpid() != _IMPORTED_BY and torch.get_num_threads() > 1:
            torch.set_num_threads(1)  # torch's threads do not survive a fork: the first parallel operation would hang
        images = self._prepare_images_structure(images)
        if not kwargs["do_rescale"]:
            scaled = [is_scaled(image) for image in images]
            if any(scaled) and not all(scaled):
                raise ValueError(
                    "With `do_rescale=False` either all or none of `images` may be floats in [0, 1]. Leave "
                    "`do_rescale` on: such floats are recognized."
                )
            if all(scaled):  # `process_image` converts them to 8 bits
                kwargs.update(do_rescale=True, rescale_factor=1 / 255)
        processed, sizes = [], []
        for index, image in enumerate(images):
            try:
                image = self.process_image(image, **kwargs)
                height, width = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[-2:]
                _check_size(height, width, kwargs["size"].height, kwargs["do_resize"], kwargs["image_aspect_ratio"])
            except ValueError as error:
                raise ValueError(f"Image {index} of `images`: {error}") from error
            processed.append(image)
            sizes.append([height, width])
        pixel_values = self._preprocess(processed, **kwargs)
        data = {"pixel_values": pixel_values}
        if kwargs["return_low_res"]:
            data["low_res_pixel_values"] = make_low_res_view(pixel_values, self.get_low_res_size(**kwargs))
        if kwargs["unpad"]:
            data["image_sizes"] = torch.tensor(sizes)
        return BatchFeature(data=data, tensor_type=kwargs["return_tensors"])


class LlavaHrImageProcessor(LlavaHrImageProcessorMixin, TorchvisionBackend):
    r"""
    Prepares images for the two pathways (section 4.1 of the paper) with torchvision, on any device. Before
    normalization the values are within 2/255 of [`LlavaHrImageProcessorPil`], which equals the released code.

    `pixel_values` is the whole image, padded to a square with the mean color (or its center), resized to `size`.
    `low_res_pixel_values` is the same, resized bilinearly to `low_res_size`; the model makes it itself where that is
    the side saved with it or the released rule. The number of image tokens depends on `low_res_size` alone.

    Takes all modes of PIL (EXIF orientation applied, white behind transparency), arrays and tensors (floats in [0, 1]
    are recognized as scaled), paths, URLs, base64 strings and bytes.

    Args:
        size (`int` or `dict[str, int]`, *optional*, defaults to `{"height": 1024, "width": 1024}`):
            Side of the square image in pixels, a multiple of `high_res_stride`.
        low_res_size (`int` or `dict[str, int]`, *optional*):
            Side of the square low-resolution view in pixels, a multiple of `patch_size`. `None` is the released rule:
            as many patches as the high-resolution feature map has positions, but at least `min_low_res_size` pixels.
            The feature map (`size / high_res_stride` positions a side) must not be larger than the grid of patches, or
            an integer multiple of it.
        min_low_res_size (`int`, *optional*, defaults to 336):
            The ViT's own image size in pixels.
        patch_size (`int`, *optional*, defaults to 14):
            Side of a ViT patch in pixels.
        high_res_stride (`int`, *optional*, defaults to 32):
            Pixels of the image per position of the high-resolution feature map.
        image_aspect_ratio (`str`, *optional*, defaults to `"pad"`):
            `"pad"`: the whole image, padded to a square. `"crop"`: shortest edge to `size`, then its center.
        return_low_res (`bool`, *optional*, defaults to `True`):
            Whether to return `low_res_pixel_values`.
        unpad (`bool`, *optional*, defaults to `False`):
            Whether to return `image_sizes`, with which the model drops the tokens of the padding. The towers still see
            the padded square. Only with `image_aspect_ratio="pad"`.
        resample (`PILImageResampling`, *optional*, defaults to `BICUBIC`):
            Filter for resizing the image to `size`.
        do_resize (`bool`, *optional*, defaults to `True`):
            If off, images must be squares of `size` already.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb (*optional*):
            As in other image processors. The mean and standard deviation are CLIP's.

    Returns:
        `BatchFeature` with `pixel_values` of shape `(images, 3, H, H)` and `low_res_pixel_values` of shape
        `(images, 3, L, L)`, both float32; with `unpad` also `image_sizes` `(images, 2)`, height and width in pixels.

    Raises:
        ValueError: If the sides do not fit each other, at construction and at each call, or if something in `images`
            cannot be used as an image; the message says which.

    Example:

    ```python
    >>> from modeling_llava_hr import LlavaHrImageProcessor

    >>> image_processor = LlavaHrImageProcessor()
    >>> views = image_processor("street.jpg", size=1536, low_res_size=336, return_tensors="pt")
    >>> views["pixel_values"].shape, views["low_res_pixel_values"].shape
    (torch.Size([1, 3, 1536, 1536]), torch.Size([1, 3, 336, 336]))
    ```"""

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | None = None,
        device: "str | torch.device | None" = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Converts an image in memory to 8-bit RGB, `(3, height, width)`. Raises ValueError if that is impossible."""
        if isinstance(image, Image.Image):
            image = torch.from_numpy(np.array(pil_to_rgb(image, do_convert_rgb))).permute(2, 0, 1)
        else:
            image = array_to_rgb(image, do_convert_rgb, input_data_format)
        return image if device is None else image.to(device)

    def _preprocess(
        self,
        images: list[torch.Tensor],
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
        side, device = size.height, images[0].device
        scale = rescale_factor if do_rescale else 1
        if do_normalize:
            mean, std = (torch.tensor(x, device=device).view(-1, 1, 1) * (1 / scale) for x in (image_mean, image_std))
        high_res = torch.empty((len(images), 3, side, side), device=device)
        for view, image in zip(high_res, images, strict=True):
            if do_resize:
                image = self._fit(image, side, resample, image_aspect_ratio, padding_color(image_mean))
            view.copy_(image)  # 8 bits to float32, channels last to channels first
            if do_normalize:
                view.sub_(mean).div_(std)
            elif do_rescale:
                view.mul_(scale)
        return high_res

    def _fit(
        self,
        image: torch.Tensor,
        side: int,
        resample: PILImageResampling | int,
        image_aspect_ratio: str,
        color: tuple[int, ...],
    ) -> torch.Tensor:
        """`(3, height, width)` -> `(3, side, side)`, 8 bits"""
        square = SizeDict(height=side, width=side)
        height, width = image.shape[-2:]
        if image_aspect_ratio == "crop":
            new_height, new_width = shortest_edge_size(height, width, side)
            image = self.resize(image, SizeDict(height=new_height, width=new_width), resample)
            return self.center_crop(image, square)
        # Rows first, then columns, as torchvision itself does for 8 bits. So the first pass can run before rows of
        # padding are added, and on a few rows at a time.
        longest = max(height, width)
        if width > height:
            top = (longest - height) // 2
            rows = _fill(image, longest, side, color)
            rows[:, top : top + height] = self.resize(image, SizeDict(height=height, width=side), resample)
        elif height > width:
            rows, left = _fill(image, longest, side, color), (longest - width) // 2
            # Bands bound the memory of a CPU's cache; on a GPU they would only add kernel launches
            for top, bottom in [(0, longest)] if image.is_cuda else get_bands(longest):
                band = _fill(image, bottom - top, longest, color)
                band[:, :, left : left + width] = image[:, top:bottom]
                rows[:, top:bottom] = self.resize(band, SizeDict(height=bottom - top, width=side), resample)
        else:
            rows = image
        return self.resize(rows, square, resample)


def _fill(image: torch.Tensor, height: int, width: int, color: tuple[int, ...]) -> torch.Tensor:
    """`(3, height, width)` of one color. Channels are last in memory, as in PIL images, which is faster to resize."""
    return image.new_tensor(color).repeat(width).repeat(height, 1).unflatten(1, (-1, 3)).permute(2, 0, 1)


def _to_side(name: str, size: Any) -> Any:
    """Side in pixels of a square size in any form. Raises ValueError if it is not square."""
    if size is None or isinstance(size, int):
        return size
    sides = size if isinstance(size, SizeDict) else SizeDict(**get_size_dict(size, param_name=name))
    if sides.height is None or sides.height != sides.width:
        raise ValueError(f"`{name}` must be an int or a dict with equal height and width, but got {dict(sides)}.")
    return sides.height


def _check_size(height: int, width: int, side: int, do_resize: bool, aspect_ratio: str) -> None:
    """
    Raises ValueError if an image is too long to be made square within PIL's limit for decompression bombs (twice
    `PIL.Image.MAX_IMAGE_PIXELS`; six times that where the square is made in bands, which takes time but no memory), or
    if it is not resized and does not have the right size.
    """
    if not do_resize:
        if (height, width) != (side, side):
            raise ValueError(
                f"it has {width} x {height} pixels, but without `do_resize` it must have {side} x {side} (`size`)."
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
            f"with {width} x {height} pixels it would need {new_width} x {new_height} on the way to a square "
            f'(`image_aspect_ratio="{aspect_ratio}"`), over {factor} times PIL.Image.MAX_IMAGE_PIXELS. Make it '
            f"smaller, or cut it into several images."
        )


def get_bands(side: int) -> Iterator[tuple[int, int]]:
    """First row and end (exclusive) of each band of rows in which a square is resized."""
    step = max(1, MAX_BAND_PIXELS // side)
    for top in range(0, side, step):
        yield top, min(top + step, side)


def shortest_edge_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width in pixels after resizing the shortest edge to `side`, as transformers rounds it."""
    return (int(side * height / width), side) if width <= height else (side, int(side * width / height))


def padding_color(image_mean: float | tuple[float, ...] | None) -> tuple[int, ...]:
    """The mean color in 8 bits, truncated as in the released code; black without a mean."""
    return tuple(int(mean * 255) for mean in np.broadcast_to(0 if image_mean is None else image_mean, 3))


def make_low_res_view(pixel_values: torch.Tensor, low_res_size: int) -> torch.Tensor:
    """
    The low-resolution view as the released code makes it, from the normalized image: bilinear, corners aligned.

    Args:
        pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`): Images as the high-resolution pathway sees them, of
            any floating-point dtype.
        low_res_size (`int`): Side L of the low-resolution view in pixels.

    Returns:
        `torch.Tensor` of shape `(images, 3, L, L)` and dtype float32, computed in float32.
    """
    size = (low_res_size, low_res_size)
    return torch.nn.functional.interpolate(pixel_values.float(), size=size, mode="bilinear", align_corners=True)


__all__ = ["LlavaHrImageProcessor", "LlavaHrImageProcessorKwargs"]
