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
"""Image processor class for LLaVA-HR."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import PILImageResampling, SizeDict

from .image_processing_pil_llava_hr import (
    LlavaHrImageProcessorKwargs,
    LlavaHrImageProcessorMixin,
    array_to_rgb,
    check_picture_size,
    get_bands,
    padding_color,
    pil_to_rgb,
    shortest_edge_size,
)


class LlavaHrImageProcessor(LlavaHrImageProcessorMixin, TorchvisionBackend):
    r"""
    Prepares images for the two pathways (section 4.1 of the paper) with torchvision, on any device. Before
    normalisation the values are within 2/255 of [`LlavaHrImageProcessorPil`], which equals the released code.

    `pixel_values` is the whole image, padded to a square with the mean colour (or its centre), resized to `size`.
    `low_res_pixel_values` is the same, resized bilinearly to `low_res_size`; the model makes it itself where that is
    the side saved with it or the released rule. The number of image tokens depends on `low_res_size` alone.

    Takes all modes of PIL (EXIF orientation applied, white behind transparency), arrays and tensors (floats in [0, 1]
    are recognised as scaled), paths, URLs, base64 strings and bytes.

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
            `"pad"`: the whole image, padded to a square. `"crop"`: shortest edge to `size`, then its centre.
        return_low_res (`bool`, *optional*, defaults to `True`):
            Whether to return `low_res_pixel_values`.
        resample (`PILImageResampling`, *optional*, defaults to `BICUBIC`):
            Filter for resizing the image to `size`.
        do_resize (`bool`, *optional*, defaults to `True`):
            If off, images must be squares of `size` already.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std, do_convert_rgb (*optional*):
            As in other image processors. The mean and standard deviation are CLIP's.

    Returns:
        `BatchFeature` with `pixel_values` of shape `(images, 3, H, H)` and `low_res_pixel_values` of shape
        `(images, 3, L, L)`, both float32.

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
        """A picture in memory as 8-bit RGB, `(3, height, width)`. Raises ValueError if it cannot be one."""
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
        for index, (view, image) in enumerate(zip(high_res, images, strict=True)):
            height, width = image.shape[-2:]
            check_picture_size(index, height, width, side, do_resize, image_aspect_ratio)
            if do_resize:
                image = self._fit(image, side, resample, image_aspect_ratio, padding_color(image_mean))
            view.copy_(image)  # 8 bits to float32, colours last to colours first
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
        # Rows first, then columns, as torchvision does itself for 8 bits: so the first pass can be made before rows of
        # padding are there, and a few rows at a time
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
    """`(3, height, width)` of one colour, in memory with colours last as pictures of PIL: faster to resize."""
    return image.new_tensor(color).repeat(width).repeat(height, 1).unflatten(1, (-1, 3)).permute(2, 0, 1)


__all__ = ["LlavaHrImageProcessor", "LlavaHrImageProcessorKwargs"]
