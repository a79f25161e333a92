# SPDX-License-Identifier: Apache-2.0
import json
import sys

import pytest
from PIL import Image

from training.tiny.report import main, read_run


@pytest.fixture
def runs(tmp_path):
    """What two trainings leave, as far as a report reads it."""
    folders = []
    for name, fine in (("both", 0.9), ("blind", 0.1)):
        folder = tmp_path / name
        for stage in ("0-pretrain", "1-finetune"):
            for step in (20, 100):  # the later one counts: as a text, 100 would come first
                checkpoint = folder / stage / f"checkpoint-{step}"
                checkpoint.mkdir(parents=True)
                history = [{"step": s, "loss": 1 / s} for s in range(10, step + 1, 10)] + [{"step": step, "eval": 1}]
                (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        accuracy = {"accuracy": fine, "standard_error": 0.01, "num_questions": 100}
        result = {"accuracy": {"fine": accuracy, "coarse": accuracy}, "mean_gates": {"fine": [0.1], "coarse": [0.2]}}
        (folder / "evaluation.json").write_text(json.dumps(result))
        (folder / "seconds.jsonl").write_text('{"step": "towers", "seconds": 3}\n')
        folders.append(folder)
    return folders


def test_report_has_every_run(runs, tmp_path, monkeypatch, capsys):
    output = tmp_path / "report"
    monkeypatch.setattr(sys, "argv", ["report", "--runs", *map(str, runs), "--output", str(output)])
    main()
    assert capsys.readouterr().out.splitlines() == [
        "| both | 90.0% ± 1.0% | 90.0% ± 1.0% |",
        "| blind | 10.0% ± 1.0% | 10.0% ± 1.0% |",
    ]
    results = json.loads((output / "results.json").read_text())
    assert results["blind"]["accuracy"]["fine"]["accuracy"] == 0.1 and results["both"]["seconds"] == {"towers": 3}
    for name in ("accuracy", "learning_curves", "gates"):
        with Image.open(output / f"{name}.png") as image:
            assert len(image.convert("L").getcolors(256)) > 10  # something is drawn


def test_the_last_checkpoint_has_the_losses(runs):
    losses = read_run(runs[0])["losses"]
    assert list(losses) == ["0-pretrain", "1-finetune"]
    assert losses["1-finetune"][-1] == (100, 0.01)


def test_unfinished_training_is_named(runs, tmp_path, monkeypatch):
    (runs[1] / "evaluation.json").unlink()
    monkeypatch.setattr(sys, "argv", ["report", "--runs", *map(str, runs), "--output", str(tmp_path / "report")])
    with pytest.raises(ValueError, match="blind has no evaluation.json"):
        main()
