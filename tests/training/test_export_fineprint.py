# SPDX-License-Identifier: Apache-2.0
import io
import json

import pytest
import yaml
from datasets import Image, load_from_disk
from PIL import Image as PILImage

from training.export_fineprint import ExportFinePrintArguments, export
from training.fineprint import FinePrintArguments, generate


@pytest.fixture(scope="module")
def fineprint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fineprint") / "data"
    generate(FinePrintArguments(output=str(folder), num_train=0, num_validation=0, num_test=8, size=64, workers=1))
    return folder


def test_tasks_hold_all_questions_and_the_pictures_themselves(fineprint, tmp_path):
    tasks = tmp_path / "tasks"
    export(ExportFinePrintArguments(data=str(fineprint), output=str(tasks)))
    rows = [json.loads(line) for line in (fineprint / "test.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"fine", "coarse"}
    for kind in ("fine", "coarse"):
        task = yaml.safe_load((tasks / f"fineprint_{kind}.yaml").read_text())
        assert task["dataset_path"] == str(tasks / "data") and task["test_split"] == kind
        data = load_from_disk(task["dataset_path"])[kind].cast_column("image", Image(decode=False))
        expected = [row for row in rows if row["kind"] == kind]
        assert [row["id"] for row in data] == [row["id"] for row in expected]
        for exported, row in zip(data, expected, strict=True):
            question, answer = (turn["value"] for turn in row["conversations"])
            assert f"<image>\n{exported['question']}" == question and exported["answer"] == answer
            assert exported["image"]["bytes"] == (fineprint / "images" / row["image"]).read_bytes()
    group = yaml.safe_load((tasks / "fineprint.yaml").read_text())
    assert group == {"group": "fineprint", "task": ["fineprint_fine", "fineprint_coarse"]}


def test_pictures_are_read_from_the_export_alone(fineprint, tmp_path):
    export(ExportFinePrintArguments(data=str(fineprint), output=str(tmp_path / "tasks"), max_questions=3))
    data = load_from_disk(tmp_path / "tasks" / "data")
    assert sum(len(split) for split in data.values()) == 3
    row = next(iter(data.values())).cast_column("image", Image(decode=False))[0]
    with PILImage.open(io.BytesIO(row["image"]["bytes"])) as image:
        assert image.size == (64, 64)


def test_what_is_missing_or_in_the_way_is_named(fineprint, tmp_path):
    with pytest.raises(ValueError, match="nothing"):
        export(ExportFinePrintArguments(data=str(tmp_path / "nothing"), output=str(tmp_path / "tasks")))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "note").touch()
    with pytest.raises(ValueError, match="tasks"):
        export(ExportFinePrintArguments(data=str(fineprint), output=str(tmp_path / "tasks")))
