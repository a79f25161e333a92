# SPDX-License-Identifier: Apache-2.0
"""
Images of every kind, damaged, mislabelled, hostile, as Hypothesis strategies. All are made here; none is a file in the
repository.
"""

import base64
import io
import itertools
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from image_views import encode
from PIL import Image, ImageCms, ImageDraw, PngImagePlugin


# Small, so that ten thousand take minutes; odd, so that nothing fits by chance
WIDTH, HEIGHT = 37, 26
ORIENTATION = 0x0112
MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16 I;16B I;16L I;16N F".split()
SUFFIXES = (".png", ".jpg", ".gif", ".webp", ".tif", ".txt", "", ".png.exe")


@dataclass(frozen=True)
class Odd:
    """An input that is given as an image, and a label for messages."""

    label: str
    thing: Any

    def __repr__(self) -> str:
        return f"<{self.label}>"


def draw(mode: str = "RGB", width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A gradient with a mark in one corner, in a mode of PIL."""
    y, x = np.mgrid[:height, :width]
    colors = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) % 256], axis=-1)
    image = Image.fromarray(colors.astype(np.uint8))
    ImageDraw.Draw(image).rectangle((2, 2, 8, 5), fill="red")
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    return image.convert({"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)).convert(mode)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    exif[0x010F] = "A camera"
    return exif


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of 8-bit grey whose header claims a size, and `chunks`."""
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _png_chunk(b"IEND", b"")


@cache
def make_files() -> dict[str, bytes]:
    """Image files of every kind that Pillow writes, and files that only claim to be images, by name."""
    Image.init()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = [draw().rotate(angle) for angle in (90, 180)]
    animation = {"save_all": True, "append_images": frames}
    comment = PngImagePlugin.PngInfo()
    comment.add_text("comment", "zipped " * 100, zip=True)
    files = {}

    def add(format: str, mode: str = "RGB", note: str = "", **options) -> None:
        files[" ".join(filter(None, (format, mode, note)))] = encode(draw(mode), format, **options)

    add("ICNS", "RGBA")  # enlarges images to 1024 pixels: one is enough
    for format, mode in itertools.product(sorted(set(Image.SAVE) - {"ICNS"}), MODES):
        try:
            add(format, mode)
        except (KeyError, OSError, ValueError, Warning):  # not every format has every mode
            continue
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        add("TIFF", note=compression, compression=compression)
    add("TIFF", "1", "group4", compression="group4")
    for format in ("GIF", "PNG", "TIFF", "WEBP", "AVIF"):
        add(format, note="animated", **animation)
    for format in ("JPEG", "PNG", "TIFF", "WEBP"):
        for orientation in (3, 6, 99):
            add(format, note=f"turned {orientation}", exif=_exif(orientation))
        add(format, note="ICC", icc_profile=srgb)
        add(format, note="broken ICC", icc_profile=b"\0" * 128)
    add("JPEG", note="broken EXIF", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    add("JPEG", note="progressive", progressive=True, quality=30)
    add("MPO", note="two images", save_all=True, append_images=frames)
    add("PNG", "P", "transparent", transparency=bytes(range(256)))
    add("PNG", "RGB", "transparent", transparency=(1, 2, 3))
    add("PNG", note="comment", pnginfo=comment)
    add("GIF", "P", "transparent", transparency=3)
    for name, size in {"thin": (1, 20_000), "flat": (20_000, 1), "thin 3": (3, 900), "one pixel": (1, 1)}.items():
        files[f"PNG {name}"] = encode(Image.new("L", size, 90), "PNG")
    # Decompression bombs
    rows = zlib.compress(b"\0" * 10**6)
    files |= {
        "PNG bomb by its header": _png(100_000, 100_000, _png_chunk(b"IDAT", rows)),
        "PNG of no pixels": _png(0, 0, _png_chunk(b"IDAT", rows)),
        "PNG with a bomb as its comment": _png(9, 9, _png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * 2**27))),
        "PNG that unfolds far beyond its size": _png(9, 9, _png_chunk(b"IDAT", zlib.compress(b"\0" * 2**26))),
        "GIF bomb by its header": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b";",
        "BMP bomb by its header": encode(draw(), "BMP")[:18] + struct.pack("<ii", 2**30, 2**30) + b"\0" * 99,
        "TIFF whose directory is its own next": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "PNG bomb": encode(Image.new("1", (1600, 1600)), "PNG"),
        "PNG nearly a bomb": encode(Image.new("1", (1200, 1200)), "PNG"),
    }
    # Not images
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("image.png", encode(draw(), "PNG"))
    files |= {
        "empty": b"",
        "zero bytes": b"\0" * 500,
        "text": b"This is not a image.\n" * 9,
        "HTML": b"<!doctype html><img src=x onerror=alert(1)>",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        "PostScript that never ends": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{ } loop\n",
        "ZIP": buffer.getvalue(),
        "signature alone": b"\x89PNG\r\n\x1a\n",
        "JPEG markers alone": b"\xff\xd8\xff\xd9",
    }
    return files


DAMAGES = ("none", "cut", "bits", "bits of its head", "blank range", "another file's end", "noise at its end")


def _damage(content: bytes, kind: str, place: float, seed: int) -> bytes:
    start, random, others = int(place * len(content)), np.random.default_rng(seed), list(make_files().values())
    if kind == "cut":
        return content[:start]
    if kind.startswith("bits"):
        flipped, end = bytearray(content), len(content) if kind == "bits" else min(80, len(content))
        for position in random.integers(0, end, random.integers(1, 9)) if content else ():
            flipped[position] ^= 1 << random.integers(8)
        return bytes(flipped)
    if kind == "blank range":
        return content[:start] + b"\0" * min(64, len(content) - start) + content[start + 64 :]
    if kind == "another file's end":
        return content[:start] + others[seed % len(others)]
    return content + random.bytes(200) if kind == "noise at its end" else content


@st.composite
def odd_files(draw_value) -> Odd:
    """The content of a file, whole or damaged."""
    name, kind = draw_value(st.sampled_from(sorted(make_files()))), draw_value(st.sampled_from(DAMAGES))
    place, seed = draw_value(st.floats(0, 1)), draw_value(st.integers(0, 2**20))
    return Odd(f"{name}, damage: {kind} ({place:.3f}, {seed})", _damage(make_files()[name], kind, place, seed))


def _open_lazily(content: bytes) -> Any:
    try:
        return Image.open(io.BytesIO(content))
    except Exception:  # then there is nothing but bytes to give
        return content


@st.composite
def odd_sources(draw_value, folder: Path) -> Odd:
    """A file in one of the forms in which an image processor takes it."""
    file = draw_value(odd_files())
    form = draw_value(st.sampled_from(["bytes", "bytearray", "path", "string", "base64", "data URI", "opened"]))
    path = folder / f"odd{draw_value(st.sampled_from(SUFFIXES))}"
    thing = file.thing
    if form in ("path", "string"):
        path.write_bytes(file.thing)
        thing = path if form == "path" else str(path)
    elif form == "bytearray":
        thing = bytearray(file.thing)
    elif form in ("base64", "data URI"):
        thing = ("data:image/png;base64," if form == "data URI" else "") + base64.b64encode(file.thing).decode()
    elif form == "opened":
        thing = _open_lazily(file.thing)
    return Odd(f"{file.label}, as {form} {path.suffix}", thing)


NUMPY_DTYPES = (
    "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64 >u2 >f4 longdouble complex64 "
    "object U3 S3 datetime64[s] u1,u1"
).split()
TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn),
]
TORCH_KINDS = ("dense", "sparse", "meta", "with gradient", "quantized", "turned", "expanded")
SHAPES = [
    *[(26, 37), (26, 37, 3), (3, 26, 37), (26, 37, 4), (4, 26, 37), (26, 37, 1), (1, 26, 37), (26, 37, 2)],
    *[(5, 26, 37), (3, 26, 3), (3, 3, 3), (1, 1, 3), (1, 1), (1, 1, 1), (3, 1, 1), (3, 3), (1, 3000, 3)],
    *[(3000, 1, 3), (2, 26, 37, 3), (2, 3, 26, 37), (0, 3, 26, 37), (0, 37, 3), (26, 0, 3), (0,), (), (37,)],
    *[(1, 1, 26, 37, 3), (1, 20_000), (20_000, 1)],
]
FILLS = ("gradient", "scaled", "zeros", "ones", "noise", "NaN", "one NaN", "infinite", "negative", "huge", "large")


def _fill(shape: tuple[int, ...], fill: str, seed: int) -> np.ndarray:
    size, random = int(np.prod(shape)), np.random.default_rng(seed)
    values = {
        "gradient": lambda: np.arange(size) % 256,
        "scaled": lambda: (np.arange(size) % 256) / 255,
        "zeros": lambda: np.zeros(size),
        "ones": lambda: np.ones(size),
        "noise": lambda: random.normal(128, 99, size),
        "NaN": lambda: np.full(size, np.nan),
        "one NaN": lambda: np.where(np.arange(size) == seed % max(size, 1), np.nan, 0.5),
        "infinite": lambda: np.full(size, [np.inf, -np.inf][seed % 2]),
        "negative": lambda: np.full(size, -1.0),
        "huge": lambda: np.full(size, 1e38),
        "large": lambda: np.full(size, 60_000.0),
    }[fill]()
    return values.reshape(shape).astype(np.float64)


def _to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "u1,u1":
        return np.zeros(values.shape, dtype)
    if np.dtype(dtype).kind in "iuMSU":  # from floats beyond their range the result is undefined
        return np.nan_to_num(values, posinf=0, neginf=0).astype(np.int64).astype(dtype)
    return values.astype(dtype)


@st.composite
def odd_arrays(draw_value) -> Odd:
    """An array or tensor of any dtype, shape, layout and values; most of them are not images."""
    shape, fill = draw_value(st.sampled_from(SHAPES)), draw_value(st.sampled_from(FILLS))
    values = _fill(shape, fill, draw_value(st.integers(0, 2**20)))
    if draw_value(st.booleans()):
        dtype = draw_value(st.sampled_from(NUMPY_DTYPES))
        with np.errstate(all="ignore"):
            array = _to_dtype(values, dtype)
        layout = draw_value(st.sampled_from(["C", "F", "mirrored", "read-only"]))
        if layout == "F":
            array = np.asfortranarray(array)
        elif layout == "mirrored" and array.ndim:
            array = array[::-1]
        elif layout == "read-only":
            array.setflags(write=False)
        return Odd(f"array {dtype} {shape} {fill} {layout}", array)
    dtype, kind = draw_value(st.sampled_from(TORCH_DTYPES)), draw_value(st.sampled_from(TORCH_KINDS))
    tensor = torch.from_numpy(values)
    if not dtype.is_floating_point and not dtype.is_complex:
        tensor = tensor.nan_to_num(posinf=0, neginf=0).long()
    tensor = tensor.to(dtype)
    if kind == "sparse" and dtype is torch.float32:
        tensor = tensor.to_sparse()
    elif kind == "meta":
        tensor = tensor.to("meta")
    elif kind == "with gradient" and tensor.is_floating_point():
        tensor.requires_grad_()
    elif kind == "quantized" and dtype is torch.float32 and tensor.numel():
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch is about to drop them
            tensor = torch.quantize_per_tensor(tensor, 1.0, 0, torch.quint8)
    elif kind == "turned" and tensor.ndim:
        tensor = tensor.permute(*range(tensor.ndim)[::-1])
    elif kind == "expanded" and tensor.numel():
        tensor = tensor.flatten()[0].expand(tensor.shape)
    return Odd(f"tensor {dtype} {shape} {fill} {kind}", tensor)


@st.composite
def odd_pil_images(draw_value) -> Odd:
    """A PIL image in memory, of any mode and size, with odd metadata."""
    mode = draw_value(st.sampled_from(MODES))
    size = draw_value(st.sampled_from([(WIDTH, HEIGHT), (1, 1), (0, 5), (5, 0), (1, 20_000), (20_000, 1), (64, 64)]))
    value = draw_value(st.sampled_from([0, 1, 255, -5, 256, 65_535, 70_000, float("nan"), float("inf")]))
    info = draw_value(
        st.sampled_from(
            [
                *({}, {"transparency": 0}, {"transparency": b"\0\x80"}, {"transparency": (0, 0, 0)}),
                *({"exif": b"broken"}, {"exif": _exif(6).tobytes()}, {"exif": _exif(99).tobytes()}),
                *({"icc_profile": b"broken"}, {"dpi": (float("nan"), 0)}),
            ]
        )
    )
    low, high = (-np.inf, np.inf) if mode == "I" else (0, 65_535 if mode.startswith("I;16") else 255)
    color = value if mode == "F" else int(np.clip(np.nan_to_num(value, posinf=7), low, high))
    bands = Image.getmodebands(mode)
    image = Image.new(mode, size, color if bands == 1 else (color,) * bands)
    image.info.update(info)
    return Odd(f"PIL {mode} {size} of {value} with {info}", image)


def odd_things() -> st.SearchStrategy[Odd]:
    """Not images in any form."""
    things = [
        *(None, 7, 1.5, True, "", "text", "\0", "/", "/dev/zero", "\ud83d", "a" * 10_000, "data:image/png;base64,"),
        *("data:,", "file:///etc/hostname", "http://", "https://[", "ftp://a/b.png", b"", {}, {"url": "a.png"}),
        *(Path("/"), Path("/dev/zero"), Path("missing.png"), Path("a\0b"), [[]], [[], []], [None], [["a"]], ()),
        *(object, slice(3)),
    ]
    return st.sampled_from([Odd(f"{thing!r:.60}", thing) for thing in things])


def odd_inputs(folder: Path) -> st.SearchStrategy[Odd]:
    """Any of the above."""
    return st.one_of(odd_sources(folder), odd_sources(folder), odd_arrays(), odd_pil_images(), odd_things())
