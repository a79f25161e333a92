# SPDX-License-Identifier: Apache-2.0
import importlib.util
import io
import itertools
import json
from collections import Counter, defaultdict

import datasets
import jinja2
import numpy as np
import pytest
import torch
import yaml
from converted_checkpoints import ROOT
from PIL import Image

from training.tiny import fineprint
from training.tiny.fineprint import IGNORED, FinePrintArguments, FinePrintConfig, Painter, draw_sample, get_rng


CHARACTERS = FinePrintConfig().characters


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same FinePrint made by one process and by two."""
    root = tmp_path_factory.mktemp("fineprint")
    sizes = {"num_train": 40, "num_validation": 8, "num_test": 8, "size": 128, "max_signs": 2}
    for workers in (1, 2):
        fineprint.generate(FinePrintArguments(output=str(root / str(workers)), workers=workers, **sizes))
    return root / "1", root / "2"


def paint(index, split="train", seed=0, **options):
    """A clean image of a split, and what it shows."""
    return Painter(FinePrintConfig(**options), split, get_rng(seed, split, index)).paint()


@pytest.fixture(scope="module")
def scenes():
    return [paint(index, size=256)[1] for index in range(600)]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_same_files_whatever_the_number_of_workers(folders):
    first, second = ({path.name: path.read_bytes() for path in f.rglob("*") if path.is_file()} for f in folders)
    assert len(first) == 56 + 4  # images and row files
    assert first == second


def test_another_seed_draws_another_image():
    images = [draw_sample(FinePrintConfig(size=64, seed=seed), "train", 0)[0] for seed in (0, 0, 1)]
    assert images[0] == images[1] != images[2]


def test_rows_have_the_llava_format(folders):
    for name, num_rows in (("train", 40), ("captions", 40), ("test", None)):
        rows = read(folders[0] / f"{name}.jsonl")
        assert len(rows) == num_rows or num_rows is None
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            with Image.open(folders[0] / "images" / row["image"]) as image:
                assert image.size == (128, 128)
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
            assert all(turn["value"] for turn in turns)
    assert {len(row["conversations"]) for row in read(folders[0] / "test.jsonl")} == {2}
    assert {row["kind"] for row in read(folders[0] / "test.jsonl")} == {"fine", "coarse"}


def test_lmms_evals_tasks_read_it(folders, tmp_path, monkeypatch):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "fineprint").symlink_to(folders[0])
    monkeypatch.chdir(tmp_path)
    tasks = ROOT / "training" / "tiny" / "lmms_eval"
    spec = importlib.util.spec_from_file_location("utils", tasks / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    rows = read(folders[0] / "test.jsonl")
    for kind, select in (("fine", utils.select_fine), ("coarse", utils.select_coarse)):
        task = yaml.load((tasks / f"fineprint_{kind}.yaml").read_text().replace("!function", ""), yaml.SafeLoader)
        data = select(datasets.load_dataset("json", **task["dataset_kwargs"], split=task["test_split"]))
        expected = [row for row in rows if row["kind"] == kind]
        assert [row["id"] for row in data] == [row["id"] for row in expected]
        for row, source in zip(data, expected, strict=True):
            assert row["image"].size == (128, 128)
            for name, turn in zip(("doc_to_text", "doc_to_target"), source["conversations"], strict=True):
                assert jinja2.Template(task[name]).render(**row) == turn["value"].removeprefix("<image>\n")


def test_texts_of_the_splits_are_disjoint():
    texts = {
        split: {sign.text for index in range(150) for sign in paint(index, split, size=256)[1].signs}
        for split in fineprint.SPLITS
    }
    assert all(len(shown) > 50 for shown in texts.values())
    assert not any(one & other for one, other in itertools.combinations(texts.values(), 2))


def test_eight_tenths_of_the_texts_are_for_training():
    counts = Counter(fineprint.get_split(f"{number:04d}") for number in range(10_000))
    # two buckets of 25 or 26 of 256 hash values for validation and test; standard deviation 0.003 to 0.004
    assert counts["train"] / 10_000 == pytest.approx(0.8, abs=0.015)
    assert counts["test"] / 10_000 == pytest.approx(0.1, abs=0.015)


def test_questions_have_one_answer_and_do_not_tell_it(scenes):
    answers = defaultdict(list)
    for scene in scenes:
        questions = fineprint.get_questions(scene)
        assert len({question for _, question, _ in questions}) == len(questions)
        for kind, question, answer in questions:
            answers[kind, question.split()[-1] if kind == "fine" else question].append(answer)
    for (kind, question), given in answers.items():
        commonest = Counter(given).most_common(1)[0][1] / len(given)
        if kind == "fine":
            assert commonest < 0.01
        elif len(given) >= 100:
            # five scenes, four quarters, four shapes, or eight colours
            assert commonest < 0.45, question


def test_texts_are_where_the_scene_says():
    """Dark and light pixels lie at the characters, on clean images, and the plate is plain above them."""
    for index in range(40):
        image, scene = paint(index, seed=3, size=128, min_signs=1, max_signs=1, max_shapes=0)
        grey = np.asarray(image.convert("L")).astype(float)
        (sign,) = scene.signs
        assert [x for x, _ in sign.centers] == sorted(x for x, _ in sign.centers)
        x, y = (int(value) for value in sign.center)
        assert np.ptp(grey[y - 4 : y + 5, x - 12 : x + 13]) > 60


def test_texts_have_the_form_of_their_scene(scenes):
    # where the point is, and what carries the text
    forms = {"street": (-1, "sign"), "shelf": (1, "tag"), "receipt": (1, "line")}
    forms |= {"table": (-1, "row"), "panel": (2, "dial")}
    assert {scene.name for scene in scenes} == forms.keys()
    for scene in scenes:
        for sign in scene.signs:
            assert len(sign.text) == 4 and (sign.text.find("."), sign.object) == forms[scene.name]


def test_alphanumeric_texts_have_letters():
    drawn = [paint(index, size=128, alphabet="alphanumeric")[1] for index in range(60)]
    assert any(character.isalpha() for scene in drawn for sign in scene.signs for character in sign.text)


def test_caption_tells_texts_only_if_asked(scenes):
    scene = next(scene for scene in scenes if scene.signs)
    assert scene.signs[0].text in fineprint.get_caption(scene, with_texts=True)
    assert scene.signs[0].text not in fineprint.get_caption(scene, with_texts=False)


def test_position():
    scene = fineprint.Scene("street", 100, 100, [], [])
    positions = [fineprint.get_position(point, scene) for point in ((10, 10), (90, 10), (10, 90), (90, 90), (50, 10))]
    assert positions == ["top left", "top right", "bottom left", "bottom right", None]


def test_natural_shapes_fit_the_scene_and_leave_square_images_as_they_were():
    config, natural = FinePrintConfig(), FinePrintConfig(natural_shapes=True)
    shapes = {}
    for index in range(30):
        file, scene = draw_sample(natural, "train", index)
        shapes[scene.name] = (scene.width, scene.height)
        assert Image.open(io.BytesIO(file)).size == (scene.width, scene.height)
        for x, y in (sign.center for sign in scene.signs):
            assert 0 <= x < scene.width and 0 <= y < scene.height
        if scene.name == "panel":
            assert file == draw_sample(config, "train", index)[0]
    wide, tall = {"street": (256, 144), "shelf": (256, 192)}, {"table": (182, 256), "receipt": (85, 256)}
    assert shapes == {**wide, **tall, "panel": (256, 256)}


def test_noise_blur_and_compression_change_the_image():
    file, _ = draw_sample(FinePrintConfig(size=64), "train", 0)
    clean, _ = paint(0, size=64)
    difference = np.asarray(Image.open(io.BytesIO(file))).astype(float) - np.asarray(clean)
    assert 1 < difference.std() < 20


def test_reduced_images_keep_flat_parts_and_lose_fine_ones():
    flat = torch.full((1, 3, 64, 64), 100.0)
    torch.testing.assert_close(fineprint.reduce_and_enlarge(flat, 0.21875), flat)
    # 64 -> 14 -> 64 columns: at most 14 values remain of 64
    assert torch.linalg.matrix_rank(fineprint.reduce_and_enlarge(torch.randn(1, 1, 64, 64), 0.21875)[0, 0]) <= 14


@pytest.mark.parametrize(
    "options, name",
    [
        ({"size": 32}, "size"),
        ({"min_signs": 5, "max_signs": 4}, "max_signs"),
        ({"max_signs": 7}, "max_signs"),
        ({"max_shapes": 3}, "max_shapes"),
        ({"alphabet": "greek"}, "alphabet"),
    ],
)
def test_contradictions_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        FinePrintConfig(**options)


def test_a_finished_folder_is_not_overwritten(folders):
    with pytest.raises(ValueError, match="already holds"):
        fineprint.generate(FinePrintArguments(output=str(folders[0])))


def test_targets_are_at_the_objects_positions():
    centers = [(41.0, 70.0), (49.0, 70.0), (57.0, 70.0), (65.0, 70.0)]
    scene = fineprint.Scene("street", 128, 128, [fineprint.Sign("4711", "red", "sign", (53.0, 70.0), centers)], [])
    targets = fineprint.get_targets(scene, CHARACTERS)
    # (53, 70) lies in column 1 and row 2 of positions of 32 pixels
    assert targets["objects"].nonzero().tolist() == [[2, 1]]
    assert targets["objects"][2, 1] == fineprint.OBJECTS.index("sign")
    assert targets["colors"][2, 1] == fineprint.COLOR_NAMES.index("red")
    assert "".join(CHARACTERS[index] for index in targets["texts"][2, 1]) == "4711"
    assert (targets["texts"] != IGNORED).sum() == 4
    # and in column 3 and row 4 of positions of 16 pixels
    assert (targets["words"][4, 3] == targets["texts"][2, 1]).all() and (targets["words"] != IGNORED).sum() == 4
    # 70 / 8 = 8.75; 41 / 4 = 10.25 and so on
    assert targets["strokes"].nonzero().tolist() == [[8, 10], [8, 12], [8, 14], [8, 16]]
    assert [CHARACTERS[index - 1] for index in targets["strokes"][8, 10:17:2]] == list("4711")


def test_pages_ask_for_characters_only():
    _, scene = Painter(FinePrintConfig(size=64), "train", get_rng(0, "train", 0)).paint_page()
    targets = fineprint.get_targets(scene, CHARACTERS)
    assert len(scene.signs) >= 6 and (targets["strokes"] > 0).sum() > 3 * len(scene.signs)
    assert (targets["words"][..., 0] != IGNORED).sum() >= 5
    assert all((targets[name] == IGNORED).all() for name in ("objects", "colors", "texts"))
