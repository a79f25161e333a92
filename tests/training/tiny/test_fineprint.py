# SPDX-License-Identifier: Apache-2.0
import importlib.util
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import jinja2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from training.tiny.fineprint import (
    COLOR_NAMES,
    IGNORED,
    OBJECTS,
    SCENES,
    FinePrintArguments,
    FinePrintConfig,
    Painter,
    Scene,
    Sign,
    draw_sample,
    generate,
    get_caption,
    get_position,
    get_questions,
    get_rng,
    get_split,
    get_targets,
    reduce_and_enlarge,
)


ROOT = Path(__file__).parent.parent.parent.parent
CHARACTERS = FinePrintConfig().characters


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same FinePrint made by one process and by two."""
    root = tmp_path_factory.mktemp("fineprint")
    for workers in (1, 2):
        output = str(root / str(workers))
        generate(
            FinePrintArguments(
                output=output, num_train=40, num_validation=8, num_test=8, size=128, max_signs=2, workers=workers
            )
        )
    return root / "1", root / "2"


@pytest.fixture(scope="module")
def scenes():
    config = FinePrintConfig(size=256)
    return [Painter(config, "train", get_rng(0, "train", index)).paint()[1] for index in range(600)]


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
            assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (
                len(row["conversations"]) // 2
            )
            assert [turn["value"].count("<image>") for turn in row["conversations"][::2]][0] == 1
            assert all("<image>" not in turn["value"] for turn in row["conversations"][1:])
            assert all(turn["value"] for turn in row["conversations"])
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
    texts = {}
    for split in ("train", "validation", "test"):
        config = FinePrintConfig(size=256)
        drawn = [Painter(config, split, get_rng(0, split, index)).paint()[1] for index in range(150)]
        texts[split] = {sign.text for scene in drawn for sign in scene.signs}
        assert len(texts[split]) > 50
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_eight_tenths_of_the_texts_are_for_training():
    counts = Counter(get_split(f"{number:04d}") for number in range(10_000))
    # two buckets of 25 or 26 of 256 hash values for validation and test; standard deviation 0.003 to 0.004
    assert counts["train"] / 10_000 == pytest.approx(0.8, abs=0.015)
    assert counts["test"] / 10_000 == pytest.approx(0.1, abs=0.015)


def test_questions_do_not_tell_their_answers(scenes):
    answers = defaultdict(list)
    for scene in scenes:
        for kind, question, answer in get_questions(scene):
            answers[kind, question.split()[-1] if kind == "fine" else question].append(answer)
    for (kind, question), given in answers.items():
        commonest = Counter(given).most_common(1)[0][1] / len(given)
        if kind == "fine":
            assert commonest < 0.01
        elif len(given) >= 100:
            # five scenes, four quarters, four shapes, or eight colours
            assert commonest < 0.45, question


def test_a_question_has_one_answer(scenes):
    for scene in scenes:
        questions = [question for _, question, _ in get_questions(scene)]
        assert len(set(questions)) == len(questions)


def test_texts_are_where_the_scene_says():
    """Dark and light pixels lie at the characters, on clean images, and the plate is plain above them."""
    config = FinePrintConfig(size=128, min_signs=1, max_signs=1, max_shapes=0)
    for index in range(40):
        image, scene = Painter(config, "train", get_rng(3, "train", index)).paint()
        grey = np.asarray(image.convert("L")).astype(float)
        (sign,) = scene.signs
        assert [x for x, _ in sign.centers] == sorted(x for x, _ in sign.centers)
        x, y = (int(value) for value in sign.center)
        assert np.ptp(grey[y - 4 : y + 5, x - 12 : x + 13]) > 60


def test_texts_have_the_form_of_their_scene(scenes):
    assert {scene.name for scene in scenes} == set(SCENES)
    for scene in scenes:
        for sign in scene.signs:
            assert len(sign.text) == 4
            assert (sign.text.find("."), sign.object) == {
                "street": (-1, "sign"),
                "shelf": (1, "tag"),
                "receipt": (1, "line"),
                "table": (-1, "row"),
                "panel": (2, "dial"),
            }[scene.name]


def test_alphanumeric_texts_have_letters():
    config = FinePrintConfig(size=128, alphabet="alphanumeric")
    drawn = [Painter(config, "train", get_rng(0, "train", index)).paint()[1] for index in range(60)]
    assert any(character.isalpha() for scene in drawn for sign in scene.signs for character in sign.text)


def test_caption_tells_texts_only_if_asked(scenes):
    scene = next(scene for scene in scenes if scene.signs)
    assert scene.signs[0].text in get_caption(scene, with_texts=True)
    assert scene.signs[0].text not in get_caption(scene, with_texts=False)


@pytest.mark.parametrize(
    "center, position",
    [((10, 10), "top left"), ((90, 10), "top right"), ((10, 90), "bottom left"), ((90, 90), "bottom right")],
)
def test_position(center, position):
    scene = Scene("street", 100, 100, [], [])
    assert get_position(center, scene) == position
    assert get_position((50, 10), scene) is None


def test_natural_shapes_fit_the_scene_and_leave_square_images_as_they_were():
    config, natural = FinePrintConfig(), FinePrintConfig(natural_shapes=True)
    shapes = {}
    for index in range(30):
        file, scene = draw_sample(natural, "train", index)
        shapes[scene.name] = (scene.width, scene.height)
        assert Image.open(io.BytesIO(file)).size == (scene.width, scene.height)
        inside = [0 <= x < scene.width and 0 <= y < scene.height for x, y in (sign.center for sign in scene.signs)]
        assert all(inside)
        if scene.name == "panel":
            assert file == draw_sample(config, "train", index)[0]
    assert shapes == {
        "street": (256, 144),
        "shelf": (256, 192),
        "table": (182, 256),
        "receipt": (85, 256),
        "panel": (256, 256),
    }


def test_noise_blur_and_compression_change_the_image():
    config = FinePrintConfig(size=64)
    file, _ = draw_sample(config, "train", 0)
    clean, _ = Painter(config, "train", get_rng(0, "train", 0)).paint()
    difference = np.asarray(Image.open(io.BytesIO(file))).astype(float) - np.asarray(clean)
    assert 1 < difference.std() < 20


def test_reduced_images_keep_flat_parts_and_lose_fine_ones():
    flat = torch.full((1, 3, 64, 64), 100.0)
    torch.testing.assert_close(reduce_and_enlarge(flat, 0.21875), flat)
    # 64 -> 14 -> 64 columns: at most 14 values remain of 64
    assert torch.linalg.matrix_rank(reduce_and_enlarge(torch.randn(1, 1, 64, 64), 0.21875)[0, 0]) <= 14


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
        generate(FinePrintArguments(output=str(folders[0])))


def test_targets_are_at_the_objects_positions():
    centers = [(41.0, 70.0), (49.0, 70.0), (57.0, 70.0), (65.0, 70.0)]
    scene = Scene("street", 128, 128, [Sign("4711", "red", "sign", (53.0, 70.0), centers)], [])
    targets = get_targets(scene, CHARACTERS)
    # (53, 70) lies in column 1 and row 2 of positions of 32 pixels
    assert targets["objects"].nonzero().tolist() == [[2, 1]]
    assert targets["objects"][2, 1] == OBJECTS.index("sign")
    assert targets["colors"][2, 1] == COLOR_NAMES.index("red")
    assert "".join(CHARACTERS[index] for index in targets["texts"][2, 1]) == "4711"
    assert (targets["texts"] != IGNORED).sum() == 4
    # and in column 3 and row 4 of positions of 16 pixels
    assert (targets["words"][4, 3] == targets["texts"][2, 1]).all() and (targets["words"] != IGNORED).sum() == 4
    # 70 / 8 = 8.75; 41 / 4 = 10.25 and so on
    assert targets["strokes"].nonzero().tolist() == [[8, 10], [8, 12], [8, 14], [8, 16]]
    assert [CHARACTERS[index - 1] for index in targets["strokes"][8, 10:17:2]] == list("4711")


def test_pages_ask_for_characters_only():
    config = FinePrintConfig(size=64)
    _, scene = Painter(config, "train", get_rng(0, "train", 0)).paint_page()
    targets = get_targets(scene, CHARACTERS)
    assert len(scene.signs) >= 6 and (targets["strokes"] > 0).sum() > 3 * len(scene.signs)
    assert (targets["words"][..., 0] != IGNORED).sum() >= 5
    assert all((targets[name] == IGNORED).all() for name in ("objects", "colors", "texts"))
