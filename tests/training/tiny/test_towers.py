# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from conversion.assemble import assemble
from modeling_llava_hr import LlavaHrImageProcessorPil
from training.tiny import towers
from training.tiny.fineprint import COLOR_NAMES, IGNORED, OBJECTS, FinePrintConfig, Painter, get_rng
from training.tiny.towers import PretrainTowersArguments, Reader


CHARACTERS = FinePrintConfig().characters
DEPTHS, DIMS = [1, 1, 1, 1], [8, 16, 32, 64]


def test_crops_hold_the_text_at_any_place():
    config, xs = FinePrintConfig(size=128, max_signs=1), []
    for index in range(40):
        image, scene = Painter(config, "train", get_rng(0, "train", index)).paint()
        pixels = np.asarray(image).transpose(2, 0, 1)
        cut, part = towers.crop(pixels, scene, 64, np.random.default_rng(index))
        assert cut.shape == (3, 64, 64) and (part.width, part.height) == (64, 64)
        (before,), (after,) = scene.signs, part.signs
        left, top = (round(a - b) for a, b in zip(before.center, after.center, strict=True))
        assert (cut == pixels[:, top : top + 64, left : left + 64]).all()
        assert all(a[0] - b[0] == left for a, b in zip(before.centers, after.centers, strict=True))
        xs.append(after.center[0])
    assert min(xs) < 24 and max(xs) > 40


def test_reading_loss_of_even_scores():
    """Equal scores give the logarithm of the number of classes for each target."""
    images = towers.draw_images(FinePrintConfig(size=64, max_signs=1), "train", 2, workers=0)
    reader = Reader(DEPTHS, DIMS, len(CHARACTERS))
    for head in (*reader.heads, reader.word_head, reader.stroke_head):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    targets = {name: images[name] for name in ("objects", "colors", "texts", "words", "strokes")}
    loss = towers.get_reading_loss(reader(torch.zeros(2, 3, 64, 64)), targets)
    num_strokes = 1 + len(CHARACTERS)
    num_classes = (len(OBJECTS), len(COLOR_NAMES), len(CHARACTERS), len(CHARACTERS))
    expected = sum(math.log(number) for number in num_classes) + 1.25 * math.log(num_strokes)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_texts_count_only_without_a_fault():
    texts = torch.full((1, 2, 2, 4), IGNORED)
    texts[0, 0, 0], texts[0, 1, 1] = torch.tensor([4, 7, 1, 1]), torch.tensor([0, 0, 0, 1])
    scores = torch.zeros(1, 2, 2, 4, 11)
    scores[0, 0, 0, range(4), [4, 7, 1, 1]] = 1.0
    assert towers.count_texts_read({"texts": scores}, {"texts": texts}) == (1, 2)


def test_low_res_view_is_the_image_processors():
    processor = LlavaHrImageProcessorPil(size=128, low_res_size=28)
    views = processor(torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8), return_tensors="pt")
    torch.testing.assert_close(towers.get_low_res_view(views["pixel_values"], 28 / 128), views["low_res_pixel_values"])


def test_towers_can_be_assembled_after_a_few_steps(language_model, tmp_path):
    tokenizer, output = str(language_model[0]), tmp_path / "towers"
    steps = {"reading_steps": 4, "joint_steps": 2, "reading_batch_size": 4, "joint_batch_size": 4}
    images = {"size": 128, "max_signs": 2, "num_images": 16, "num_test": 16, "workers": 0}
    sizes = {"depths": DEPTHS, "dims": DIMS, "vision_width": 64, "vision_layers": 4}
    result = towers.pretrain(PretrainTowersArguments(str(output), tokenizer, **images, **steps, **sizes))
    assert result["num_texts"] == 16 and 0 <= result["texts_read"] <= 1
    parts = (str(output / name) for name in ("vision_tower", "high_res_tower"))
    assemble(*parts, tokenizer, str(tmp_path / "model"), size=128)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert model.config.high_res_vision_config.model_args == {"depths": DEPTHS, "dims": DIMS}
    assert model.config.vision_config.hidden_size == 64
    # Layer scale is there as it was trained, near the 1 it started from
    gamma = model.state_dict()["model.vision_tower.high_res_tower.timm_model.stages.0.blocks.0.gamma"]
    assert 0.9 < gamma.mean() < 1.1


def test_a_missing_tokenizer_is_named_before_anything_is_drawn(tmp_path):
    arguments = PretrainTowersArguments(output=str(tmp_path / "made"), tokenizer=str(tmp_path / "no-tokenizer"))
    with pytest.raises(OSError, match="no-tokenizer"):
        towers.pretrain(arguments)
    assert list(tmp_path.iterdir()) == []
