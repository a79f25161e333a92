# SPDX-License-Identifier: Apache-2.0
"""Both image processors: recorded outputs, PIL's own arithmetic, real images, odd images, and every refusal."""

import base64
import http.server
import importlib.util
import io
import json
import threading
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoImageProcessor

import modeling_llava_hr.image_processing_llava_hr as shared
from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrImageProcessorPil


REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"
BACKENDS = {"torchvision": LlavaHrImageProcessor, "pil": LlavaHrImageProcessorPil}

# 64 x 64 and 28 x 28 pixels: 2 x 2 features and 2 x 2 patches, so that odd images cost nothing
SMALL = {"size": 64, "low_res_size": 28}
RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}

# What makes the processors fast changes no result: views of these shapes, computed the plain way
SIZES = {"size": 384, "low_res_size": 336}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SHAPES = [(500, 375), (375, 500), (401, 300), (300, 401), (40, 30), (31, 40), (384, 384), (1, 1)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def processor(backend):
    return BACKENDS[backend](**SMALL)


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


def photographs():
    """Two photographs of 640 x 427 pixels, CC BY 2.0, that scikit-learn ships (sources in the README beside them)."""
    spec = importlib.util.find_spec("sklearn")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "images"
    return [Image.open(folder / name) for name in ("china.jpg", "flower.jpg")]


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


def released_pixels(image, side):
    """PIL's own arithmetic on the whole padded square, `(3, side, side)`, as design and recordings describe it."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))  # int(255 * CLIP's mean)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


# Recorded outputs


@pytest.mark.parametrize(
    "folder, case, sizes",
    [
        ("stage1-384", 0, {"size": 384, "low_res_size": 336}),
        ("stage2-1024", 0, {}),
        ("stage2-1024", 1, {}),
        ("stage2-1024", 2, {}),
    ],
)
def test_recorded_pixels(backend, folder, case, sizes):
    recorded = json.loads((REFERENCE / folder / "cases.json").read_text())["cases"][case]
    expected = load_file(REFERENCE / folder / "expected.safetensors")
    paths = [REFERENCE / folder / "images" / name for name in recorded["images"]]
    views = BACKENDS[backend](**sizes)(paths, return_tensors="pt")

    high_res = views["pixel_values"]
    assert high_res.dtype == views["low_res_pixel_values"].dtype == torch.float32
    assert list(high_res.shape) == recorded["high_res_pixel_values_shape"]
    # 2/255 before normalisation is 0.030 after it; PIL is to give the same bits (1e-6 is float32's own rounding)
    tolerance = 1e-6 if backend == "pil" else 2 / 255 / 0.2613 + 1e-4
    for name, view in (("low_res", views["low_res_pixel_values"]), ("high_res", high_res)):
        key = f"{recorded['name']}.{name}_pixel_values_sample"
        if key in expected:
            torch.testing.assert_close(view[:, :, ::16, ::16], expected[key], atol=tolerance, rtol=0)
    # One level too much in a single value would change the sum by 0.014
    total, tolerance = recorded["high_res_pixel_values_sum"], 1e-3 if backend == "pil" else 1e-5 * high_res.numel()
    assert high_res.double().sum().item() == pytest.approx(total, abs=tolerance)


# Arithmetic


@pytest.mark.parametrize("width, height", [(300, 200), (201, 300), (1100, 900), (900, 1101), (1024, 1024), (1, 1)])
def test_high_resolution_view_equals_pil(backend, width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), draw_document().resize((width, height))):
        difference = raw_view(BACKENDS[backend](), image) - released_pixels(image, 1024)
        assert np.abs(difference).max() <= (0 if backend == "pil" else 2)


def test_photographs_and_documents(backend):
    for image in [*photographs(), draw_document(), draw_document(1700, 600)]:
        views = BACKENDS[backend](size=1536, low_res_size=672)(image, return_tensors="pt")
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
        expected = (torch.from_numpy(released_pixels(image, 1536).copy()) / 255 - mean) / std
        tolerance = 1e-6 if backend == "pil" else 2 / 255 / 0.2613 + 1e-4
        torch.testing.assert_close(views["pixel_values"][0], expected, atol=tolerance, rtol=0)
        # align_corners: the corners of both views are the same pixels
        corners = views["low_res_pixel_values"][..., ::671, ::671], views["pixel_values"][..., ::1535, ::1535]
        torch.testing.assert_close(*corners, atol=1e-5, rtol=0)


def test_low_resolution_view_interpolates_between_aligned_corners(processor):
    # A linear ramp stays one, whatever lies between the pixels
    ramp = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    low_res = processor(ramp, **RAW)["low_res_pixel_values"][0]
    np.testing.assert_allclose(low_res, np.broadcast_to(np.linspace(0, 63, 28), (3, 28, 28)), atol=1e-4)


@pytest.mark.parametrize("width, height", [(300, 200), (200, 301)])
def test_centre_crop_equals_pil(backend, width, height):
    image = draw_document().resize((width, height))
    scaled = image.resize((int(64 * width / height), 64) if width > height else (64, int(64 * height / width)), 3)
    left, top = (scaled.width - 64) // 2, (scaled.height - 64) // 2
    expected = np.asarray(scaled.crop((left, top, left + 64, top + 64))).transpose(2, 0, 1)
    view = raw_view(BACKENDS[backend](**SMALL, image_aspect_ratio="crop"), image)
    assert np.abs(view - expected).max() <= (0 if backend == "pil" else 2)
    assert not np.array_equal(view, raw_view(BACKENDS[backend](**SMALL), image))


def test_an_image_does_not_depend_on_its_batch(processor):
    images = [gradient(), gradient(30, 9), gradient()[::-1], np.full((64, 64, 3), 7, np.uint8), gradient(30, 9)]
    for kwargs in ({}, {"disable_grouping": False}):
        together = processor(images, return_tensors="pt", **kwargs)
        for index, image in enumerate(images):
            alone = processor(image, return_tensors="pt", **kwargs)
            for name in ("pixel_values", "low_res_pixel_values"):
                torch.testing.assert_close(together[name][index], alone[name][0], atol=1e-6, rtol=0)


def test_nested_lists_and_batches_are_flattened_in_order(processor):
    images = [np.full((5, 5, 3), value, np.uint8) for value in (10, 20, 30)]
    expected = processor(images, **RAW)["low_res_pixel_values"]
    assert expected[:, 0, 0, 0].tolist() == [10, 20, 30]
    for nested in ([images[:1], images[1:]], np.stack(images), torch.from_numpy(np.stack(images))):
        assert np.array_equal(processor(nested, **RAW)["low_res_pixel_values"], expected)


def test_device_is_respected():
    views = LlavaHrImageProcessor(**SMALL)(gradient(), device="meta", return_tensors="pt")
    assert {view.device.type for view in views.values()} == {"meta"}


# Sizes


@pytest.mark.parametrize("size, low_res_size", [(384, 336), (768, 336), (1024, 448), (1536, 672), (1536, 336)])
@pytest.mark.parametrize("as_dict", [True, False])
def test_sizes_per_call(backend, size, low_res_size, as_dict):
    sizes = {"size": size, "low_res_size": low_res_size}
    if as_dict:
        sizes = {name: {"height": side, "width": side} for name, side in sizes.items()}
    views = BACKENDS[backend]()(gradient(), return_tensors="pt", **sizes)
    assert views["pixel_values"].shape == (1, 3, size, size)
    assert views["low_res_pixel_values"].shape == (1, 3, low_res_size, low_res_size)


@pytest.mark.parametrize("size, low_res_size", [(384, 336), (768, 336), (1024, 448), (1536, 672)])  # design, section 1
def test_the_released_rule_gives_the_other_side(backend, size, low_res_size):
    for views in (BACKENDS[backend](size=size)(gradient()), BACKENDS[backend]()(gradient(), size=size)):
        assert views["low_res_pixel_values"][0].shape == (3, low_res_size, low_res_size)


def test_the_low_resolution_view_can_be_left_to_the_model(processor):
    views = processor(gradient(), return_low_res=False)
    assert list(views) == ["pixel_values"]
    assert np.array_equal(views["pixel_values"], processor(gradient())["pixel_values"])


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"low_res_size": 450}, ["`low_res_size`", "multiple of the patch size 14", "450"]),
        ({"size": 1000}, ["`size` (1000)", "`high_res_stride` (32)", "`size=992` with `low_res_size=434` fits"]),
        (
            {"low_res_size": 336},
            ["`size=1024`", "32 x 32", "24 x 24", "`low_res_size=336`", "`low_res_size=448` fits"],
        ),
        ({"low_res_size": 0}, ["`low_res_size`", "positive", "0"]),
        ({"size": -32}, ["`size`", "positive", "-32"]),
        ({"size": {"height": 448, "width": 336}}, ["`size`", "equal height and width", "448", "336"]),
        ({"low_res_size": {"shortest_edge": 448}}, ["`low_res_size`", "shortest_edge"]),
        ({"patch_size": 0}, ["`patch_size`", "positive", "0"]),
        ({"image_aspect_ratio": "anyres"}, ["`image_aspect_ratio`", '"pad" or "crop"', "'anyres'"]),
    ],
)
def test_refused_geometry_at_construction_and_per_call(backend, arguments, named):
    for call in (lambda: BACKENDS[backend](**arguments), lambda: BACKENDS[backend]()(gradient(), **arguments)):
        with pytest.raises(ValueError) as error:
            call()
        assert all(part in str(error.value) for part in named), str(error.value)


def test_the_pair_that_a_refusal_names_fits(backend):
    for wrong in (100, 700, 1000, 1100):
        with pytest.raises(ValueError) as error:
            BACKENDS[backend](size=wrong)
        size, low_res_size = (int(part.split("`")[0]) for part in str(error.value).split("size=")[1:])
        assert low_res_size == max(int(size / 32 * 14), 336)
        BACKENDS[backend](size=size, low_res_size=low_res_size)


def test_other_ways_to_pad_and_crop_are_refused(processor):
    with pytest.raises(ValueError, match="`do_pad` has no effect here.*image_aspect_ratio"):
        processor(gradient(), do_pad=True, pad_size=64)
    with pytest.raises(ValueError, match="`do_center_crop` has no effect here.*image_aspect_ratio"):
        processor(gradient(), do_center_crop=True, crop_size=64)


def test_without_resizing_an_image_must_have_the_size(processor):
    image = gradient(64, 64)
    assert np.array_equal(raw_view(processor, image, do_resize=False), image.transpose(2, 0, 1))
    with pytest.raises(ValueError, match=r"Image 1 of `images`: it has 20 x 12 pixels.*64 x 64 \(`size`\)"):
        processor([image, gradient()], do_resize=False)


def _prepare(row, image_processor):
    return {"mean": float(image_processor(np.full((40, 30, 3), row["value"], np.uint8))["pixel_values"].mean())}


def test_forked_processes_after_use_in_the_parent(processor):
    """torch's threads do not survive a fork: the first parallel operation of the child would wait for them forever."""
    rows = datasets.Dataset.from_dict({"value": [10, 90, 170, 250]})
    expected = [_prepare(row, processor) for row in rows]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        processor([draw_document()] * 2)
        mapped = rows.map(_prepare, num_proc=2, fn_kwargs={"image_processor": processor})
    finally:
        torch.set_num_threads(threads)
    assert [row["mean"] for row in mapped] == pytest.approx([row["mean"] for row in expected])


@pytest.mark.parametrize("name", ["receipt.jpg", "scans/receipt", "a" * 300 + ".png", "C:\\scans\\a.png"])
def test_a_mistyped_file_name_is_called_a_missing_file(processor, name):
    with pytest.raises(
        ValueError, match="`images` cannot be read as an image .the file '.*(No such file|too long)"
    ) as error:
        processor(name)
    assert "base64" not in str(error.value)


# Saving and loading


@pytest.mark.parametrize("saved, loaded", [("pil", "torchvision"), ("torchvision", "pil"), ("pil", "pil")])
def test_save_and_load(tmp_path, saved, loaded):
    arguments = {
        **SMALL,
        "patch_size": 7,
        "high_res_stride": 16,
        "image_aspect_ratio": "crop",
        "image_mean": [0.5] * 3,
    }
    before = BACKENDS[saved](**arguments)
    before.save_pretrained(tmp_path)
    after = AutoImageProcessor.from_pretrained(tmp_path, backend=loaded)
    assert type(after) is BACKENDS[loaded]
    assert after.to_dict() == before.to_dict()
    assert (after.size, after.low_res_size, after.patch_size) == (before.size, 28, 7)
    kinds = [
        "configuration",
        "image_inputs",
        "image_processing",
        *(["image_processing_pil"] if saved == "pil" else []),
    ]
    assert {path.name for path in tmp_path.glob("*.py")} == {f"{kind}_llava_hr.py" for kind in kinds}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"patch_size": 7', '"patch_size": 9'))
    with pytest.raises(ValueError, match="`low_res_size`.*patch size 9, but got 28"):
        AutoImageProcessor.from_pretrained(tmp_path, backend=loaded)


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

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
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
        "A" * 60: "not an existing file, so read as base64: .*AAAA",
    }.items():
        with pytest.raises(ValueError, match=rf"`images` cannot be read as an image .*{named}"):
            processor(source)


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


# Decompression bombs


def test_the_guard_of_pil_stays_on(processor, monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3  # Pillow's own value: importing changed nothing
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.warns(Image.DecompressionBombWarning, match="2500 pixels"):
        assert center(processor, encode(Image.new("RGB", (50, 50), "red"))) == [255, 0, 0]
    with pytest.raises(ValueError, match="`images` cannot be read as an image .*exceeds limit of 4000 pixels"):
        processor(encode(Image.new("RGB", (70, 70))))


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("aspect_ratio, on_the_way", [("pad", "20000 x 20000"), ("crop", "64 x 1280000")])
def test_an_image_whose_square_would_be_a_bomb(processor, as_array, aspect_ratio, on_the_way, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 20000 // 2 - 1)
    image = Image.new("RGB", (1, 20000))
    with pytest.raises(ValueError, match=rf"Image 1 of `images`: with 1 x 20000 pixels.*{on_the_way}"):
        processor([gradient(), np.asarray(image) if as_array else image], image_aspect_ratio=aspect_ratio)


@pytest.mark.parametrize("as_array", [True, False])
@pytest.mark.parametrize("size", [(20000, 500), (500, 20000)])
def test_long_images_need_no_square_in_memory(processor, as_array, size):
    """20000 x 20000 pixels would be over PIL's limit, and 1.2 GB."""
    image = Image.new("RGB", size, "red")
    views = processor(np.asarray(image) if as_array else image)
    assert views["pixel_values"][0].shape == (3, 64, 64)


@pytest.mark.parametrize("size", [(90, 301), (299, 300)])
def test_pieces_of_a_tall_image_make_no_difference(processor, size, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    whole = processor(image)
    monkeypatch.setattr(shared, "MAX_BAND_PIXELS", 10 * 301)
    in_pieces = processor(image)
    for name in whole:
        np.testing.assert_array_equal(in_pieces[name][0], whole[name][0])


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def to_low_res(high_res):
    return F.interpolate(high_res, (336, 336), mode="bilinear", align_corners=True)


@pytest.mark.parametrize("width, height", SHAPES)
def test_pil_backend_gives_the_bits_of_the_released_procedure(width, height):
    image, longest = noise(width, height), max(width, height)
    square = Image.new("RGB", (longest, longest), (122, 116, 104))  # int(255 * MEAN)
    square.paste(image, ((longest - width) // 2, (longest - height) // 2))
    pixels = np.asarray(square.resize((384, 384), Image.Resampling.BICUBIC)).astype(np.float64) * (1 / 255)
    high_res = (torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) - MEAN) / STD
    views = LlavaHrImageProcessorPil(**SIZES)([image, image], return_tensors="pt")
    expected = torch.stack([high_res.contiguous()] * 2)
    assert torch.equal(views["pixel_values"], expected)
    assert torch.equal(views["low_res_pixel_values"], to_low_res(expected))


@pytest.mark.parametrize("width, height", SHAPES)
def test_torchvision_backend_gives_the_bits_of_padding_and_resizing_the_plain_way(width, height):
    """The whole square is padded and resized, colours first in memory, and normalised out of place."""
    pixels = torch.from_numpy(np.array(noise(width, height))).permute(2, 0, 1).contiguous()
    longest = max(width, height)
    square = torch.tensor([122, 116, 104], dtype=torch.uint8)[:, None, None].repeat(1, longest, longest)
    top, left = (longest - height) // 2, (longest - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    resized = tvF.resize(square, [384, 384], tvF.InterpolationMode.BICUBIC)
    scale = 1 / (1 / 255)  # in double precision not quite 255
    high_res = ((resized.float() - MEAN * scale) / (STD * scale))[None]
    for image in (noise(width, height), pixels):
        views = LlavaHrImageProcessor(**SIZES)(image, input_data_format="channels_first", return_tensors="pt")
        assert torch.equal(views["pixel_values"], high_res)
        # float32's rounding: torch sums in another order on one thread
        torch.testing.assert_close(views["low_res_pixel_values"], to_low_res(high_res), atol=1e-6, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_holds_what_each_image_gives(threads):
    before, processor = torch.get_num_threads(), LlavaHrImageProcessor(**SIZES)
    torch.set_num_threads(threads)
    try:
        images = [noise(*shape) for shape in SHAPES]
        together = processor(images, return_tensors="pt")
        for index, image in enumerate(images):
            alone = processor(image, return_tensors="pt")
            for name in ("pixel_values", "low_res_pixel_values"):
                assert torch.equal(together[name][index], alone[name][0])
                assert together[name].is_contiguous()
    finally:
        torch.set_num_threads(before)
