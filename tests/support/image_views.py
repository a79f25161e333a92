# SPDX-License-Identifier: Apache-2.0
"""Small image processors of both backends, and what they make of an image."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrImageProcessorPil


BACKENDS = {"torchvision": LlavaHrImageProcessor, "pil": LlavaHrImageProcessorPil}

# 64 x 64 and 28 x 28 pixels: 2 x 2 features and 2 x 2 patches, so that odd images cost nothing
SMALL = {"size": 64, "low_res_size": 28}
RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}


def gradient(height=12, width=20):
    """`(height, width, 3)`, uint8, different in every corner and channel."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 255 - x * 3 - y * 4], axis=-1).astype(np.uint8)


def encode(image, format="PNG", **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, format, **kwargs)
    return buffer.getvalue()


def raw_view(processor, image, **kwargs):
    """The high-resolution view `(3, H, H)` with values from 0 to 255."""
    return processor(image, **RAW, **kwargs)["pixel_values"][0]


def center(processor, image, **kwargs):
    """The colour in the middle of the high-resolution view."""
    view = raw_view(processor, image, **kwargs)
    return view[:, view.shape[1] // 2, view.shape[2] // 2].tolist()


def draw_document(width=850, height=1100):
    """A page with a heading, small text, rules and a filled chart: the sharp edges on which resizing differs most."""
    page = Image.new("RGB", (width, height), "ivory")
    draw = ImageDraw.Draw(page)
    draw.text((40, 30), "Invoice 4711", fill="navy", font=ImageFont.load_default(42))
    for line in range(30):
        text = f"{line:02d}  screws, zinc-plated, M{line % 7 + 2}   {line * 137 % 900}.{line:02d} EUR"
        draw.text((40, 110 + 22 * line), text, fill="black", font=ImageFont.load_default(13))
        draw.line((40, 128 + 22 * line, width - 40, 128 + 22 * line), fill="lightgray")
    for bar in range(12):
        draw.rectangle((60 + 60 * bar, height - 40 - 17 * bar, 100 + 60 * bar, height - 40), fill=(20 * bar, 90, 160))
    return page


def released_pixels(image, side):
    """PIL's own arithmetic on the whole padded square, `(3, side, side)`, as design and recordings describe it."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))  # int(255 * CLIP's mean)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
