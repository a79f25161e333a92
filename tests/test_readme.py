# SPDX-License-Identifier: Apache-2.0
"""
The Python snippets of the README and of docs/performance.md run, in their order and one namespace, with a converted
checkpoint in place.
"""

import re
from pathlib import Path

from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPast

from conversion.convert_llava_hr_weights_to_hf import convert


ROOT = Path(__file__).parent.parent


def test_python_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = ROOT / "tests" / "fixtures" / "reference" / "stage2-1024" / "checkpoint"
    convert(str(checkpoint), "llava-hr-7b-sft-1024-hf")
    Image.new("RGB", (60, 40), "navy").save("street.png")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 6
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "performance.md").read_text(), flags=re.DOTALL)
    if not hasattr(BaseModelOutputWithPast(), "cache"):  # transformers before 5.24, as the recipe says
        recipe = recipe.replace("cache=cache", "past_key_values=cache")
    exec(recipe, namespace)
    assert "tensor(576)" in capsys.readouterr().out
    assert (tmp_path / "llava-hr-7b-sft-1024-4bit" / "model.safetensors").exists()
