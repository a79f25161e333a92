# SPDX-License-Identifier: Apache-2.0
"""Both image processors: recorded outputs, PIL's own arithmetic, real images, sizes, saving, and every refusal."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_views import BACKENDS, RAW, SMALL, center, draw_document, encode, gradient, raw_view, released_pixels
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoImageProcessor

import modeling_llava_hr.image_processing_llava_hr as shared
from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrImageProcessorPil


REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"

# What makes the processors fast changes no result: views of these shapes, computed the plain way
SIZES = {"size": 384, "low_res_size": 336}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]  # CLIP's
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
SHAPES = [(500, 375), (375, 500), (401, 300), (300, 401), (40, 30), (31, 40), (384, 384), (1, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (850, 1100)])
def test_views_made_on_a_gpu_are_those_of_the_cpu(shape):
    processor, image = LlavaHrImageProcessor(**SIZES), draw_document(*shape)
    options = {"return_tensors": "pt", "return_low_res": True, "do_rescale": False, "do_normalize": False}
    expected, actual = (processor(image, device=device, **options) for device in ("cpu", "cuda"))
    assert actual["pixel_values"].is_cuda and actual.keys() == expected.keys()
    for name, view in expected.items():
        torch.testing.assert_close(actual[name].cpu(), view, atol=2, rtol=0)  # levels of 255


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def processor(backend):
    return BACKENDS[backend](**SMALL)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def photographs():
    """Two photographs of 640 x 427 pixels, CC BY 2.0, that scikit-learn ships (sources in the README beside them)."""
    spec = importlib.util.find_spec("sklearn")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "images"
    return [Image.open(folder / name) for name in ("china.jpg", "flower.jpg")]


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
    for image in (noise(width, height), draw_document().resize((width, height))):
        difference = raw_view(BACKENDS[backend](), image) - released_pixels(image, 1024)
        assert np.abs(difference).max() <= (0 if backend == "pil" else 2)


def test_photographs_and_documents(backend):
    for image in [*photographs(), draw_document(), draw_document(1700, 600)]:
        views = BACKENDS[backend](size=1536, low_res_size=672)(image, return_tensors="pt")
        expected = (torch.from_numpy(released_pixels(image, 1536).copy()) / 255 - MEAN) / STD
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", [{}, {"disable_grouping": False}])
def test_an_image_does_not_depend_on_its_batch(backend, threads, options):
    before, processor = torch.get_num_threads(), BACKENDS[backend](**SIZES)
    torch.set_num_threads(threads)
    try:
        images = [*(noise(*shape) for shape in SHAPES), gradient()[::-1], np.full((64, 64, 3), 7, np.uint8)]
        together = processor(images, return_tensors="pt", **options)
        for index, image in enumerate(images):
            alone = processor(image, return_tensors="pt", **options)
            for name in ("pixel_values", "low_res_pixel_values"):
                assert torch.equal(together[name][index], alone[name][0])
                assert together[name].is_contiguous()
    finally:
        torch.set_num_threads(before)


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
    datasets = pytest.importorskip("datasets", reason="the GPU image may lack it")
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
    image = noise(*size)
    whole = processor(image)
    monkeypatch.setattr(shared, "MAX_BAND_PIXELS", 10 * 301)
    in_pieces = processor(image)
    for name in whole:
        np.testing.assert_array_equal(in_pieces[name][0], whole[name][0])


def to_low_res(high_res):
    return F.interpolate(high_res, (336, 336), mode="bilinear", align_corners=True)


@pytest.mark.parametrize("width, height", SHAPES)
def test_pil_backend_gives_the_bits_of_the_released_procedure(width, height):
    image = noise(width, height)
    pixels = released_pixels(image, 384).astype(np.float64) * (1 / 255)
    high_res = (torch.from_numpy(pixels.astype(np.float32)) - MEAN) / STD
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
