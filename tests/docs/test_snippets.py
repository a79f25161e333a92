# SPDX-License-Identifier: Apache-2.0
"""
Every Python and bash block of the README and the guides, in a folder that looks like the checkout.

Python blocks run as pasted, those of a group of documents in one namespace. bash blocks are run by bash itself, whose
programs only note how they were called; `python -m MODULE ...` then runs in this process, with the tiny model in the
place of real ones and fewer steps (`REPLACE`). What cannot run here (`NOT_RUN`) goes through the parser of its module.
"""

import argparse
import configparser
import contextlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from converted_checkpoints import REFERENCE, TINY_MODEL
from loopback_server import run_server
from packaging.requirements import Requirement
from PIL import Image
from snippets import ROOT, expand, get_blocks
from torch.distributed.run import get_args_parser
from transformers import HfArgumentParser
from transformers.modeling_outputs import BaseModelOutputWithPast


SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# Documents of a group share a folder and a Python namespace
GROUPS = [
    ("README.md", "docs/performance.md", "docs/training.md"),
    ("docs/getting_started.md",),
    ("docs/finetune.md",),
    ("docs/serving.md",),
    ("docs/convert.md", "docs/evaluation.md", "docs/export.md", "docs/publish.md", "docs/quantization.md"),
    ("docs/results.md", "examples/README.md"),
]
TINY_TRAINING = (
    "--use_cpu true --bf16 false --dtype float32 --size 256 --low_res_size 56 --max_steps 1 --report_to none "
    "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --dataloader_num_workers 0 --disable_tqdm true"
)
CONVERT = "--checkpoint favor123/llava-hr-7b-sft-1024 --output "
# What makes commands and snippets fit here. Each text must occur in its document.
REPLACE = {
    "README.md": {
        f"{CONVERT}llava-hr-7b-sft-1024-hf": f"--checkpoint {REFERENCE}/stage2-1024/checkpoint --output converted",
        "--output_dir llava-hr-7b-mine": f"--output_dir llava-hr-7b-mine {TINY_TRAINING}",
        "--output results": "--output results --max_questions 1 --device cpu",
    },
    "docs/training.md": {"FILE": "images/questions.jsonl", "DIR": "images", "MODEL": "examples/tiny-llava-hr"},
    "docs/finetune.md": {
        "range(200)": "range(24)",
        "lines[:40]": "lines[:4]",
        "lines[40:]": "lines[4:]",
        "--max_steps 200": "--max_steps 30 --report_to none --disable_tqdm true",
        "--per_device_train_batch_size 8": "--per_device_train_batch_size 4",
        "--max_new_tokens 32": "--max_new_tokens 24",
        "max_tokens=20": "max_tokens=4",
    },
    "docs/convert.md": {
        f"{CONVERT}llava-hr-7b-sft-1024-hf": f"--checkpoint {REFERENCE}/stage2-1024/checkpoint --output converted"
    },
    "docs/evaluation.md": {
        "--model MODEL": "--max_questions 1 --device cpu --model examples/tiny-llava-hr",
        "results/base": "results/model",
    },
    "docs/publish.md": {"--model llava-hr-7b-sft-1024 ": "--model llava-hr-7b-sft-1024-hf "},
}
# Commands that are parsed instead, as patterns of their beginning, and why
NOT_RUN = {
    "benchmarks": "minutes; tests/benchmarks runs them",
    "conversion.assemble": "downloads from the Hub; tests/conversion/test_assemble.py has local parts",
    "examples.export_onnx": "tests/examples/test_examples.py runs it",
    "modeling_llava_hr.integrations.serve": "does not end; the Python blocks of its document ask such a server",
    "training.tiny.": "minutes to hours, or a GPU; tests/training/tiny runs them",
    "training.train --config training/configs/pretrain_7b": "7B; tests/training trains this stage",
    r"training.train --config \S*qlora.yaml($|.*receipts)": "7B; test_notebooks.py trains the tiny model with it",
    "training.train --config training/tiny/": "an hour of training",
    "venv": "the tests run in one",
}
# Programs that are not in this environment, and what looks at their commands
NOT_HERE = {
    "docker": "tests/reliability/test_dockerfile.py, without Docker itself",
    "lmms-eval": "tests/modeling_llava_hr/integrations/test_lmms_eval.py, by its own parser",
    "ray": "nothing",
    "vllm": "tests/vllm/test_commands.py, by its own parser",
}
# What a group prints, in this order, among other lines
PRINTED = {
    "README.md": ["1471", "1471", "1471", " street"],
    "docs/getting_started.md": ["1471", "[' 1471', ' 2.58']", "64", "1471", "4144", "triangle"],
    "docs/results.md": ["You:   Model:  street", "You:   Model:  1471"],
}
# Files that a group leaves
WRITTEN = {
    "README.md": ["converted/model.safetensors", "llava-hr-4bit/model.safetensors", "results/report.html"]
    + ["llava-hr-4bit/processor_config.json", "llava-hr-7b-sft-1024/model.safetensors"],
    "docs/finetune.md": ["receipts/after/report.html", "receipts/merged/model.safetensors"],
    "docs/convert.md": ["converted/model.safetensors", "results/comparison/report.html"],
}


class Accepted(BaseException):
    """A parser has accepted a command line."""


def run_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE ...` in this process."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)  # runpy warns if it was imported
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert not end.code, f"{module} {arguments}: {end.code}"


def parse_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE ...` up to where its own parser has read the command line."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        namespace, unknown = parse_known_args(parser, *args, **kwargs)
        assert not unknown, f"{module}: {unknown}"
        if type(parser) is HfArgumentParser:  # whose dataclasses look at the values
            parser.parse_dict(vars(namespace))
        raise Accepted

    def invoke(command: typer.core.TyperCommand, context: Any) -> None:
        raise Accepted

    with monkeypatch.context() as patch, pytest.raises(Accepted):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(typer.core.TyperCommand, "invoke", invoke)
        run_module(module, arguments, monkeypatch)


def handle(words: list[str], piped: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, parses or looks at a command."""
    program, *arguments = words
    if program.startswith("python"):
        assert arguments[0] == "-m", words
        module, arguments = arguments[1], arguments[2:]
        if any(re.match(pattern, " ".join((module, *arguments))) for pattern in NOT_RUN):
            parse_module(module, arguments, monkeypatch)
        else:
            file = Path("piped")
            file.write_text(piped)
            with file.open() as stream, monkeypatch.context() as patch:
                patch.setattr(sys, "stdin", stream)
                run_module(module, arguments, monkeypatch)
    elif program in ("accelerate", "torchrun"):
        launcher = get_args_parser() if program == "torchrun" else launch_command_parser()
        parsed = launcher.parse_args(arguments[program == "accelerate" :])
        assert parsed.module and Path(getattr(parsed, "config_file", None) or ROOT).exists()
        parse_module(parsed.training_script, parsed.training_script_args, monkeypatch)
    elif program == "pip":
        assert arguments[0] == "install"
        for requirement in arguments[1:]:
            here = re.sub(r"^\.", "modeling-llava-hr", requirement)
            assert Requirement(here).extras <= {*SETUP["options.extras_require"]}, requirement
    elif program == "make":
        subprocess.run(["make", "--dry-run", "--directory", ROOT, *arguments], check=True, capture_output=True)
    else:
        assert program in NOT_HERE
        if program == "docker" and arguments[0] == "run":  # what follows the image's name is for the server
            served = arguments[arguments.index("llava-hr") + 1 :] or ["/model"]
            parse_module("modeling_llava_hr.integrations.serve", served, monkeypatch)
        if "--include_path" in arguments:
            assert Path(arguments[arguments.index("--include_path") + 1]).is_dir(), words


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder like the checkout, with what the documents name as the reader's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    for name in ("Dockerfile", "benchmarks", "conversion", "examples", "modeling_llava_hr", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "llava-hr-7b-sft-1024-hf").symlink_to(TINY_MODEL)
    (tmp_path / "llava-hr-7b-sft-1024-qlora").symlink_to("llava-hr-7b-mine")  # which the README trains
    pictures = ROOT / "examples" / "pictures"
    (tmp_path / "images").symlink_to(pictures)
    Image.open(pictures / "street.jpg").save(tmp_path / "street.png")
    shutil.copy(pictures / "receipt.jpg", tmp_path)
    (tmp_path / "data").mkdir()
    rows = (pictures / "questions.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mine.jsonl").write_text(rows[0])
    rows = [json.loads(row) for row in rows[:2]]
    for row in rows:
        row["image"] = f"images/{row['image']}"
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[1]))
    (tmp_path / "data" / "images").symlink_to(pictures)
    (tmp_path / "data" / "llava_v1_5_mix665k.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_client(checkout, monkeypatch) -> Iterator[Callable[[str, dict], None]]:
    """Runs a block with a client, which asks a server of the model that the block names."""
    connect, addresses = openai.OpenAI, {}

    def run(block: str, namespace: dict) -> None:
        model = re.search(r'model="(.*?)"', block)[1]
        if model not in addresses:
            addresses[model], _ = servers.enter_context(run_server(checkout / model, checkout, cwd=checkout))
        with monkeypatch.context() as patch:
            options = {"base_url": f"{addresses[model]}/v1", "api_key": "none"}
            patch.setattr(openai, "OpenAI", lambda **_: connect(**options))
            if "response_format" in block:  # which vLLM takes, and this package's server refuses
                with pytest.raises(openai.BadRequestError, match="response_format"):
                    exec(block, namespace)
            else:
                exec(block, namespace)

    with contextlib.ExitStack() as servers:
        yield run


@pytest.mark.filterwarnings("ignore")  # of whole commands, which have tests of their own
@pytest.mark.parametrize(
    ("documents", "replacements"),
    [
        *(pytest.param(documents, REPLACE, id=documents[0]) for documents in GROUPS),
        pytest.param(("docs/finetune.md",), {}, id="docs/finetune.md as written", marks=pytest.mark.slow),
    ],
)
def test_blocks_run_in_their_order(documents, replacements, checkout, run_client, monkeypatch, capsys):
    namespace: dict[str, Any] = {}
    for document in documents:
        replace, used = replacements.get(document, {}), set()
        for language, block in get_blocks(document):
            for text, other in replace.items():
                used |= {text} if text in block else set()
                block = block.replace(text, other)
            if language == "bash":
                commands = expand(block, checkout)
                assert commands, block
                for *words, piped in commands:
                    handle(words, piped, monkeypatch)
            elif "OpenAI(" in block:
                run_client(block, namespace)
            else:
                if not hasattr(BaseModelOutputWithPast(), "cache"):  # transformers before 5.24, as the comment says
                    block = block.replace("cache=cache,", "past_key_values=cache,")
                exec(block, namespace)
        assert used == replace.keys()
    lines = iter(capsys.readouterr().out.splitlines())
    for expected in PRINTED.get(documents[0], []):
        assert expected in lines
    for name in WRITTEN.get(documents[0], []):
        assert Path(name).exists(), name
    if documents[0] == "docs/finetune.md":  # it has learned to answer with JSON
        comparison = json.loads(Path("receipts/comparison/results.json").read_text())["comparison"]["anls"]
        assert comparison["questions"] == (8 if replacements else 80) and comparison["difference"] > 0


def test_no_document_is_left_out():
    documents = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} | {"README.md", "examples/README.md"}
    assert {name for name in documents if get_blocks(name)} == {name for group in GROUPS for name in group}
