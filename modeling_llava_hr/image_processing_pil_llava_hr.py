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
"""Image processor of LLaVA-HR with PIL."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict

from .image_inputs_llava_hr import array_to_rgb, pil_to_rgb
from .image_processing_llava_hr import (
    LlavaHrImageProcessorKwargs,
    LlavaHrImageProcessorMixin,
    get_bands,
    padding_color,
    shortest_edge_size,
)


class LlavaHrImageProcessorPil(LlavaHrImageProcessorMixin, PilBackend):
    r"""
    Makes the two views with PIL; for 8-bit images without transparency they equal the released code's bit for bit. See
    [`LlavaHrImageProcessor`] for arguments and results.
    """

    valid_kwargs = LlavaHrImageProcessorKwargs

    def process_image(
        self,
        image: Image.Image | np.ndarray | torch.Tensor,
        do_convert_rgb: bool | None = None,
        input_data_format: str | None = None,
        **kwargs: Any,
    ) -> Image.Image:
        """Converts an image in memory to 8-bit RGB. Raises ValueError if that is impossible."""
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
        # One row per channel, one column per 8-bit value: three table look-ups instead of arithmetic on every pixel
        table = np.tile(np.arange(256) * (rescale_factor if do_rescale else 1), (3, 1)).astype(np.float32)
        if do_normalize:
            given: Any = (image_mean, image_std)
            mean, std = (np.broadcast_to(x, 3).astype(np.float32)[:, None] for x in given)
            table = (table - mean) / std
        high_res = np.empty((len(images), 3, side, side), dtype=np.float32)
        for index, image in enumerate(images):
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
        # PIL resizes rows first, then columns, with 8-bit values between. So the first pass can run by itself, before
        # rows of padding are added, and on a few rows at a time: the same bits without a square in memory.
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


__all__ = ["LlavaHrImageProcessorPil"]
