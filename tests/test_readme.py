# SPDX-License-Identifier: Apache-2.0
"""
The Python snippets of the README and the guides run as pasted: those of a document in their order and one namespace,
beside `examples`.
"""

import os
import re
from pathlib import Path

import openai
import pytest
from loopback_server import TINY_MODEL, run_server
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPast


ROOT = Path(__file__).parent.parent


@pytest.fixture
def run_snippets(tmp_path, monkeypatch, capsys):
    """Runs a document's snippets in a folder that has `examples`; returns what they print."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")

    def run_snippets(name: str, namespace: dict, replace: dict[str, str] | None = None) -> list[str]:
        snippets = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
        assert snippets
        capsys.readouterr()
        for snippet in snippets:
            for text, other in (replace or {}).items():
                assert text in snippet
                snippet = snippet.replace(text, other)
            if not hasattr(BaseModelOutputWithPast(), "cache"):  # transformers before 5.24, as the recipe says
                snippet = snippet.replace("cache=cache,", "past_key_values=cache,")
            exec(snippet, namespace)
        return capsys.readouterr().out.splitlines()

    return run_snippets


def test_readme_and_recipe_for_serving_from_python(run_snippets, tmp_path):
    namespace = {}
    assert run_snippets("README.md", namespace) == ["1471", "1471"]
    assert {file.name for file in (tmp_path / "llava-hr-4bit").iterdir()} >= {
        "model.safetensors",
        "processor_config.json",
    }
    answers = run_snippets("docs/performance.md", namespace)
    assert len(answers) == 2 and answers[0].strip() == "street"


def test_clients_of_the_server(run_snippets, tmp_path, monkeypatch):
    """Both requests of the guide, to this package's server: it streams the first and refuses a schema."""
    for name in ("street.png", "receipt.jpg"):
        Image.open(ROOT / "examples" / "pictures" / f"{Path(name).stem}.jpg").save(tmp_path / name)
    with run_server(TINY_MODEL, tmp_path) as (address, _):
        connect = openai.OpenAI
        monkeypatch.setattr(
            openai, "OpenAI", lambda base_url, api_key: connect(base_url=f"{address}/v1", api_key=api_key)
        )
        replace = {'"llava-hr-7b-sft-1024-hf"': repr(os.path.relpath(TINY_MODEL, ROOT))}
        with pytest.raises(openai.BadRequestError, match="response_format"):
            run_snippets("docs/serving.md", {}, replace)


def test_getting_started(run_snippets):
    first, batch, tokens, *answers, gates, shape = run_snippets("docs/getting_started.md", {})
    assert first == "1471"
    assert batch == "[' 1471', ' 2.58']"
    assert tokens == "64"
    assert answers == ["1471", "4144", "triangle"]
    assert len(gates.split(", ")) == 3 and shape == "torch.Size([1, 256, 8, 8])"
