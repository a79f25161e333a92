# SPDX-License-Identifier: Apache-2.0
"""docs/finetune.md as a user follows it, block by block, with fewer receipts and steps."""

import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from loopback_server import run_server


ROOT = Path(__file__).parents[2]
# What makes it short, and what the test's folder changes
SHORT = {
    "range(200)": "range(24)",
    "lines[:40]": "lines[:4]",
    "lines[40:]": "lines[4:]",
    "--max_steps 200": "--max_steps 30 --report_to none --disable_tqdm true",
    "--per_device_train_batch_size 8": "--per_device_train_batch_size 4",
    "--max_new_tokens 32": "--max_new_tokens 24",
    "max_tokens=20": "max_tokens=4",
}


def run_command_line(line: str, monkeypatch) -> None:
    """`python -m MODULE ...` in this process."""
    python, m, module, *arguments = shlex.split(line)
    assert (python, m) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not end.value.code, line


@pytest.mark.filterwarnings("ignore")  # of a whole training, which has tests of its own
def test_the_guide_from_data_to_server(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    guide = (ROOT / "docs" / "finetune.md").read_text().partition("## For a 7B model")[0]
    for text in SHORT:
        assert text in guide
    namespace, run = {}, []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", guide, flags=re.DOTALL):
        for text, short in SHORT.items():
            block = block.replace(text, short)
        if language == "python" and "OpenAI" not in block:
            exec(block, namespace)
        elif language == "python":
            capsys.readouterr()
            with run_server(tmp_path / "receipts" / "merged", tmp_path) as (address, _):
                block = block.replace("http://127.0.0.1:8000", address)
                block = block.replace('"receipts/merged"', repr(os.path.relpath("receipts/merged", ROOT)))
                exec(block, namespace)
            assert capsys.readouterr().out.strip()
        elif block.startswith("python -m training."):
            for line in block.splitlines():
                run.append(line.split()[2])
                run_command_line(line, monkeypatch)
        else:  # installation, and the server, which runs above
            assert block.startswith(("pip install", "python -m modeling_llava_hr.integrations.serve receipts/merged"))
    evaluate = "training.evaluate"
    assert run == ["training.check_data", evaluate, "training.train", evaluate, evaluate]
    comparison = json.loads((tmp_path / "receipts" / "comparison" / "results.json").read_text())
    assert comparison["comparison"]["anls"]["questions"] == 8
    assert comparison["comparison"]["anls"]["difference"] > 0  # it has learned to answer with JSON
    assert (tmp_path / "receipts" / "after" / "report.html").exists()
    # what docs/training.md says about such a result
    (tmp_path / "llava-hr-7b-sft-1024-qlora").symlink_to("receipts/lora")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL):
        exec(block, namespace)
    assert (tmp_path / "llava-hr-7b-sft-1024" / "processor_config.json").exists()
