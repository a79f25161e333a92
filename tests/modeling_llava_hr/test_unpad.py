# SPDX-License-Identifier: Apache-2.0
"""`unpad`: tokens of the padding are dropped, and those that remain are the same as without it."""

import io
from pathlib import Path

import pytest
import torch
from chats import chat, tokenize
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrImageProcessorPil, get_unpadded_cells


EXAMPLES = Path(__file__).parents[2] / "examples"
STREET = Image.open(EXAMPLES / "pictures" / "street.jpg").convert("RGB")
QUESTION = "What does the green sign say?"
WIDE, TALL, SQUARE = STREET.crop((0, 60, 256, 204)), STREET.crop((80, 0, 165, 256)), STREET


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(EXAMPLES / "tiny-llava-hr", dtype=torch.float32)


@pytest.fixture
def processor():
    processor = AutoProcessor.from_pretrained(EXAMPLES / "tiny-llava-hr")
    processor.image_processor.unpad = True
    return processor


def encode(processor, *chats, **kwargs):
    return tokenize(processor, list(chats), processor_kwargs={"padding": True, "padding_side": "left", **kwargs})


sides = st.integers(1, 3000)


@settings(max_examples=300, deadline=None)
@given(height=sides, width=sides, grid=st.integers(1, 64))
def test_kept_cells_are_those_that_overlap_the_image(height, width, grid):
    """Independent: cell by cell, whether its stretch of the square and that of the image have an inside in common."""
    side = max(height, width)
    for length, kept in zip((height, width), get_unpadded_cells(height, width, grid), strict=True):
        start = (side - length) // 2  # in pixels; in units of pixels / grid, everything is an integer
        overlaps = [
            min((cell + 1) * side, (start + length) * grid) > max(cell * side, start * grid) for cell in range(grid)
        ]
        assert overlaps == [kept.start <= cell < kept.stop for cell in range(grid)] and any(overlaps)


def test_shapes_of_the_paper_keep_what_they_show():
    """Of 32 x 32 cells at 1024 pixels: 18 rows of a 16:9 photo, 12 columns of a 1:3 receipt, one row of a line."""
    for size, expected in (
        ((900, 1600), (7, 25, 0, 32)),
        ((3000, 1000), (0, 32, 10, 22)),
        ((1, 3000), (15, 16, 0, 32)),
        ((2, 3000), (15, 17, 0, 32)),
    ):
        rows, columns = get_unpadded_cells(*size, 32)
        assert (rows.start, rows.stop, columns.start, columns.stop) == expected


@pytest.mark.parametrize("backend", [LlavaHrImageProcessor, LlavaHrImageProcessorPil])
def test_the_image_processor_returns_sizes_and_the_same_views(backend):
    exif, turned = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6  # 90 degrees
    Image.new("RGB", (40, 30), "teal").save(turned, "JPEG", exif=exif)
    images = [WIDE, turned.getvalue()]
    padded, unpadded = (backend(size=64, low_res_size=28, unpad=unpad)(images) for unpad in (False, True))
    assert "image_sizes" not in padded
    assert torch.equal(unpadded["pixel_values"], padded["pixel_values"])
    assert unpadded["image_sizes"].tolist() == [[144, 256], [40, 30]]
    with pytest.raises(ValueError, match="`unpad` drops padding.*image_aspect_ratio"):
        backend(unpad=True, image_aspect_ratio="crop")


def test_visible_tokens_are_what_they_were(model, processor):
    inputs = encode(processor, chat(QUESTION, WIDE, TALL, SQUARE))
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output
        padded = model.get_image_features(inputs["pixel_values"]).pooler_output
    grid = round(padded.shape[1] ** 0.5)
    for image, part, whole in zip((WIDE, TALL, SQUARE), features, padded, strict=True):
        rows, columns = get_unpadded_cells(image.height, image.width, grid)
        assert torch.equal(part, whole.view(grid, grid, -1)[rows, columns].flatten(0, 1))
    assert [len(part) for part in features[:2]] < [grid * grid] * 2 and len(features[2]) == grid * grid
    num_tokens = (inputs["input_ids"] == model.config.image_token_id).sum()
    assert num_tokens == sum(map(len, features))
    counts = processor._get_num_multimodal_tokens([(image.height, image.width) for image in (WIDE, TALL, SQUARE)])
    assert counts.num_image_tokens == [len(part) for part in features] and counts.num_image_patches == [1, 1, 1]


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"use_cache": False}, {"prefill_chunk_size": 16}])
def test_batches_of_mixed_shapes_give_the_single_answers(model, processor, kwargs):
    chats = [chat(QUESTION, WIDE), chat(QUESTION, TALL, SQUARE), chat("Hello?"), chat(QUESTION, SQUARE, WIDE)]
    options = {"max_new_tokens": 6, "do_sample": False, **kwargs}
    inputs = encode(processor, *chats)
    answers = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for one, answer in zip(chats, answers, strict=True):
        single = encode(processor, one)
        expected = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert answer[: len(expected)].tolist() == expected.tolist()


def test_an_encoded_image_serves_many_questions(model, processor):
    inputs = encode(processor, chat(QUESTION, WIDE, TALL))
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    views = [inputs.pop(name) for name in ("pixel_values", "image_sizes")]
    encoded = model.get_image_features(views[0], image_sizes=views[1])
    for _ in range(2):
        tokens = model.generate(**inputs, mm_encoder_outputs={"image": encoded}, max_new_tokens=6, do_sample=False)
        assert torch.equal(tokens, expected)


def test_it_is_saved_and_can_be_set_per_call(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    padded = encode(loaded, chat(QUESTION, WIDE), unpad=False)
    unpadded = encode(loaded, chat(QUESTION, WIDE))
    assert "image_sizes" not in padded and unpadded["image_sizes"].tolist() == [[WIDE.height, WIDE.width]]
    assert unpadded["input_ids"].shape[1] < padded["input_ids"].shape[1]
    assert "image_sizes" in loaded.model_input_names


def test_the_pipeline_batches_it(model, processor):
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chats = [chat(QUESTION, WIDE), chat(QUESTION, TALL), chat(QUESTION, WIDE, SQUARE)]
    options = {"max_new_tokens": 6, "return_full_text": False}
    expected = [pipe([one], **options)[0][0]["generated_text"] for one in chats]
    answers = [answer[0]["generated_text"] for answer in pipe(chats, batch_size=2, **options)]
    assert answers == expected


def test_sizes_that_do_not_fit_are_named(model, processor):
    inputs = encode(processor, chat(QUESTION, WIDE, TALL))
    sizes = inputs["image_sizes"]
    for wrong, got in ((sizes[:1], r"\(1, 2\)"), (sizes.tolist(), "list")):  # an exporter passes a list
        with pytest.raises(ValueError, match=rf"`image_sizes` must be a tensor of shape \(2, 2\).*got {got}\."):
            model.get_image_features(inputs["pixel_values"], image_sizes=wrong)
    del inputs["image_sizes"]
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize("source", ["tiny", "recorded"])
def test_models_trained_with_padding_give_finite_logits_without_it(source, converted, model):
    """How far the next token's logits move is printed; docs/results.md has the figures."""
    folder = EXAMPLES / "tiny-llava-hr" if source == "tiny" else converted["stage2-1024"]
    if source == "recorded":
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    for image in (WIDE, TALL):
        logits = []
        for unpad in (False, True):
            inputs = encode(processor, chat(QUESTION, image), unpad=unpad)
            with torch.no_grad():
                logits.append(model(**inputs).logits[0])
            assert logits[-1].shape == (inputs["input_ids"].shape[1], model.config.text_config.vocab_size)
        padded, unpadded = (output[-1] for output in logits)
        assert unpadded.isfinite().all() and len(logits[1]) < len(logits[0])
        distance = (unpadded - padded).norm() / padded.norm()
        print(f"{source}, {image.width} x {image.height}: {len(logits[0])} -> {len(logits[1])} tokens, {distance:.1%}")
        assert 0 < distance < 1
