# SPDX-License-Identifier: Apache-2.0
"""What image processors accept as an image: modes of PIL, arrays, paths, bytes, URLs; and every refusal."""

import base64
import functools
import http.server
import io
import threading
import warnings

import numpy as np
import pytest
import torch
from image_views import BACKENDS, RAW, SMALL, center, draw_document, encode, gradient, raw_view, released_pixels
from PIL import Image


@pytest.fixture(params=BACKENDS)
def processor(request):
    return BACKENDS[request.param](**SMALL)


# Images of PIL


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("1", 1, [255] * 3),
        ("L", 100, [100] * 3),
        ("LA", (100, 255), [100] * 3),
        ("LA", (100, 0), [255] * 3),
        ("La", (0, 0), [255] * 3),
        ("RGB", (1, 2, 3), [1, 2, 3]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255] * 3),
        ("RGBA", (0, 0, 0, 51), [204] * 3),  # a fifth of black on white
        ("RGBa", (0, 0, 0, 51), [204] * 3),
        ("RGBX", (1, 2, 3, 0), [1, 2, 3]),
        ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
        ("YCbCr", (76, 85, 255), [254, 0, 0]),
        ("HSV", (0, 255, 255), [255, 0, 0]),
        ("LAB", (255, 128, 128), [255] * 3),  # a* and b* are stored with an offset of 128
        ("I", 200, [200] * 3),
        ("I", 257 * 200, [200] * 3),
        ("F", 0.2, [51] * 3),
        ("F", 200.0, [200] * 3),
        ("I;16", 257 * 200, [200] * 3),
        ("I;16", 257, [1] * 3),
        ("I;16L", 257 * 200, [200] * 3),
        ("I;16B", 257 * 200, [200] * 3),
        ("I;16N", 257 * 200, [200] * 3),
    ],
)
def test_modes(processor, mode, color, expected):
    tolerance = 2 if mode == "LAB" else 0  # a colour-management transform, with rounding of its own
    assert center(processor, Image.new(mode, (6, 6), color)) == pytest.approx(expected, abs=tolerance)


def test_palettes(processor):
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert center(processor, image) == [10, 20, 30]
    assert center(processor, image.convert("PA")) == [10, 20, 30]
    assert center(processor, encode(image, transparency=0)) == [10, 20, 30]
    assert center(processor, encode(image, transparency=1)) == [255] * 3
    assert center(processor, encode(image, transparency=bytes([255, 0]))) == [255] * 3


@pytest.mark.parametrize(
    "image, transparent",
    [
        (Image.new("RGB", (6, 6), (1, 2, 3)), (1, 2, 3)),
        (Image.new("L", (6, 6), 9), 9),
        (Image.fromarray(np.full((6, 6), 30000, np.uint16)), 30000),
    ],
)
def test_a_colour_that_stands_for_transparency(processor, image, transparent):
    assert center(processor, encode(image, transparency=transparent)) == [255] * 3


def test_16_bit_files_keep_their_range(processor):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected = np.round(ramp / 257)
    for source in (ramp, Image.fromarray(ramp), encode(Image.fromarray(ramp)), encode(Image.fromarray(ramp), "TIFF")):
        assert np.array_equal(raw_view(processor, source), np.stack([expected] * 3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(processor, tmp_path, orientation):
    upright = Image.fromarray(gradient(48, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    # How the camera stored it, by EXIF's definition of the eight values
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    path = tmp_path / "camera.png"
    stored.save(path, exif=exif)
    expected = raw_view(processor, upright)
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        assert np.array_equal(raw_view(processor, source), expected)


def test_broken_exif_is_ignored(processor):
    content = encode(Image.new("RGB", (6, 6), "red"), "JPEG", exif=b"Exif\0\0no TIFF header")
    assert center(processor, content) == [254, 0, 0]


@pytest.mark.parametrize("format", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_an_animation(processor, tmp_path, format):
    frames = [Image.new("RGB", (6, 6), color) for color in ("white", "black")]
    path = tmp_path / "animation"
    path.write_bytes(encode(frames[0], format, save_all=True, append_images=frames[1:]))
    assert center(processor, path) == [255] * 3
    with Image.open(path) as image:
        assert center(processor, image) == [255] * 3


@pytest.mark.parametrize("width, height", [(1, 1), (1, 3000), (3000, 1), (2, 1)])
@pytest.mark.parametrize("as_array", [True, False])
def test_extreme_shapes(processor, width, height, as_array):
    pixels = np.full((height, width, 3), 200, np.uint8)
    image = pixels if as_array else Image.fromarray(pixels)
    view = raw_view(processor, image)
    assert np.abs(view - released_pixels(Image.fromarray(pixels), 64)).max() <= 2


# Arrays


@pytest.mark.parametrize("to", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize(
    "dtype, scale", [("uint8", 1), ("int64", 1), ("uint16", 257), ("float32", 1), ("float32", 1 / 255), ("float64", 1)]
)
def test_arrays_of_any_dtype_and_layout(processor, to, dtype, scale):
    pixels = gradient()
    expected = raw_view(processor, Image.fromarray(pixels))
    array = (pixels * np.float64(scale)).astype(dtype)
    for layout in (array, array.transpose(2, 0, 1).copy()):
        view = processor(to(layout), do_normalize=False, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(view * 255, expected, atol=1e-3)  # float32's rounding of n / 255 * 255


def test_arrays_that_torch_cannot_wrap(processor):
    pixels = gradient()
    expected = raw_view(processor, Image.fromarray(pixels))
    read_only = pixels.copy()
    read_only.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for array in (
            read_only,
            pixels[::-1][::-1],
            (pixels * np.uint16(257)).astype(">u2"),
            np.asfortranarray(pixels),
        ):
            assert np.array_equal(raw_view(processor, array), expected)


@pytest.mark.parametrize("to", [np.asarray, torch.from_numpy])
def test_channels(processor, to):
    pixels = gradient()
    gray = raw_view(processor, Image.fromarray(pixels[..., 0]))
    for array in (pixels[..., 0], pixels[..., :1], pixels[None, ..., 0]):
        assert np.array_equal(raw_view(processor, to(array.copy())), gray)
    black_and_white = pixels[..., 0] > 128
    expected = raw_view(processor, Image.fromarray(black_and_white))
    assert np.array_equal(raw_view(processor, to(black_and_white)), expected)
    rgba = np.concatenate([pixels, pixels[..., :1]], axis=-1)
    expected = raw_view(processor, Image.fromarray(rgba))
    assert np.array_equal(raw_view(processor, to(rgba)), expected)
    assert np.array_equal(raw_view(processor, to(rgba.transpose(2, 0, 1).copy())), expected)


def test_ambiguous_layouts(processor):
    pixels = np.zeros((3, 9, 3), np.uint8)
    pixels[..., 0] = 255
    with pytest.raises(ValueError, match=r"Image 1 of `images`.*\(3, 9, 3\).*`input_data_format"):
        processor([gradient(), pixels])
    last = raw_view(processor, pixels, input_data_format="channels_last")
    assert np.array_equal(last, raw_view(processor, Image.fromarray(pixels)))
    first = raw_view(processor, pixels.transpose(2, 0, 1).copy(), input_data_format="channels_first")
    assert np.array_equal(first, last)


def test_floats_without_rescaling_are_taken_as_scaled(processor):
    pixels = gradient()
    expected = processor(pixels, return_tensors="pt")["low_res_pixel_values"]
    scaled = (pixels / 255).astype(np.float32)
    for array in (scaled, torch.from_numpy(scaled)):
        values = processor(array, do_rescale=False, return_tensors="pt")["low_res_pixel_values"]
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="`do_rescale=False`.*all or none"):
        processor([scaled, pixels], do_rescale=False)


@pytest.mark.parametrize("to", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize(
    "array, named",
    [
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((5, 5, 2), np.uint8), "1, 3 or 4 channels"),
        (np.full((5, 5, 3), np.nan, np.float32), "NaN"),
        (np.full((5, 5, 3), np.inf, np.float32), "infinite"),
        (np.full((5, 5, 3), -1.0), r"\[0, 1\] or \[0, 255\], but go from -1 to -1"),
        (np.full((5, 5, 3), 300.0), "from 300 to 300"),
        (np.full((5, 5, 3), 1.2), "from 1.2 to 1.2"),
        (np.full((5, 5, 3), 256), r"\[0, 255\].*from 256 to 256"),
        (np.full((5, 5, 3), -1), "from -1 to -1"),
        (np.zeros((5, 5, 3), complex), "dtype.*complex"),
    ],
)
def test_refused_arrays(processor, to, array, named):
    with pytest.raises(ValueError, match=f"Image 1 of `images`: it.*{named}"):
        processor([gradient(), to(array)])


@pytest.mark.parametrize(
    "image, named",
    [
        (np.full((5, 5, 3), None), "dtype.*object"),
        (np.full((5, 5, 3), "a"), "dtype.*<U1"),
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("F", (5, 5), -3.0), "from -3 to -3"),
        (Image.new("I", (5, 5), 70000), "from 70000 to 70000"),
    ],
)
def test_refused_images_in_memory(processor, image, named):
    with pytest.raises(ValueError, match=f"Image 1 of `images`.*{named}"):
        processor([gradient(), image])


def test_without_conversion_images_must_be_rgb(processor):
    assert processor(gradient(), do_convert_rgb=False)["low_res_pixel_values"] is not None
    with pytest.raises(ValueError, match="mode is RGBA.*`do_convert_rgb`"):
        processor(Image.new("RGBA", (5, 5)), do_convert_rgb=False)
    with pytest.raises(ValueError, match="4 channels.*`do_convert_rgb`"):
        processor(np.zeros((5, 5, 4), np.uint8), do_convert_rgb=False)


# Paths, bytes, strings, URLs


@pytest.fixture
def server(tmp_path):
    """Address of an HTTP server on this machine that serves `tmp_path`."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_sources(processor, tmp_path, server):
    # 16 bits, which transformers' own loading would turn white
    pixels = np.linspace(0, 65535, 20 * 12).reshape(12, 20).astype(np.uint16)
    content = encode(Image.fromarray(pixels))
    path = tmp_path / "image.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    expected = raw_view(processor, Image.fromarray(pixels))
    sources = [path, str(path), content, bytearray(content), text, f"data:image/png;base64,{text}"]
    for source in [*sources, f"{server}/image.png"]:
        assert np.array_equal(raw_view(processor, source), expected)
    views = processor([[sources[0]], sources[1:3]], **RAW)["pixel_values"]
    assert np.array_equal(views, np.stack([expected] * 3))


def test_refused_sources(processor, tmp_path, server):
    document = encode(draw_document())
    for name, content in {"cut.png": document[: len(document) // 2], "empty.png": b"", "page.html": b"<html>"}.items():
        (tmp_path / name).write_bytes(content)
        for source in (tmp_path / name, str(tmp_path / name), f"{server}/{name}"):
            with pytest.raises(ValueError, match=rf"`images\[1\]\[0\]` cannot be read as an image .*{name}"):
                processor([[gradient()], [source]])
        with pytest.raises(ValueError, match=rf"`images\[1\]` cannot be read as an image \({len(content)} bytes\)"):
            processor([gradient(), content])
    for source, named in {
        tmp_path / "missing.png": "missing.png.*No such file",
        str(tmp_path / "missing.png"): "No such file.*missing.png",
        tmp_path: "the file",
        f"{server}/missing.png": "the URL .*missing.png.*404",
        "http://127.0.0.1:1/closed.png": "the URL .*closed.png",
        "data:image/png;base64,AAAA": "base64.*AAAA",
        "ü": "No such file.*ü",
        # mistyped names of files are not called base64
        "receipt.jpg": "the file '.*No such file",
        "scans/receipt": "the file '.*No such file",
        "a" * 300 + ".png": "the file '.*too long",
        "C:\\scans\\a.png": "the file '.*No such file",
        "A" * 60: "not an existing file, so read as base64: .*AAAA",
    }.items():
        with pytest.raises(ValueError, match=rf"`images` cannot be read as an image .*{named}") as error:
            processor(source)
        assert ("base64" in str(error.value)) == ("AAAA" in named)


@pytest.mark.parametrize("cut", [0.5, 0.99])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_truncated_files_of_every_format(processor, format, cut):
    content = encode(draw_document(), format)
    with pytest.raises(ValueError, match=r"`images\[1\]` cannot be read as an image"):
        processor([gradient(), content[: int(cut * len(content))]])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF"])
def test_a_truncated_file_that_pil_opened_lazily(processor, format):
    content = encode(draw_document(), format)
    image = Image.open(io.BytesIO(content[: len(content) // 2]))
    for _ in range(2):  # at a second attempt, Pillow takes the part that it has read for the whole image
        with pytest.raises(ValueError, match="Image 1 of `images`: PIL cannot decode it"):
            processor([gradient(), image])


@pytest.mark.parametrize("thing, named", [(3, "int"), (None, "NoneType"), ({"url": "a"}, "dict")])
def test_refused_types(processor, thing, named):
    with pytest.raises(ValueError, match=rf"`images\[1\]` must be a PIL image, .*type {named}"):
        processor([gradient(), thing])


@pytest.mark.parametrize("shape", [(), (5,), (1, 1, 5, 5, 3)])
def test_refused_dimensions(processor, shape):
    for array in (np.zeros(shape), torch.zeros(shape)):
        with pytest.raises(ValueError, match=r"`images\[0\]` must have 2 dimensions.*shape"):
            processor([array])


def test_no_image_at_all(processor):
    with pytest.raises(ValueError, match="`images` is empty"):
        processor([])
