# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The README's Python snippets run, in their order and one namespace, with a converted checkpoint in place."""

import re
from pathlib import Path

from PIL import Image

from conversion.convert_llava_hr_weights_to_hf import convert


ROOT = Path(__file__).parent.parent


def test_python_snippets_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = ROOT / "tests" / "fixtures" / "reference" / "stage2-1024" / "checkpoint"
    convert(str(checkpoint), "llava-hr-7b-sft-1024-hf")
    Image.new("RGB", (60, 40), "navy").save("street.png")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(snippets) == 5
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    assert "tensor(576)" in capsys.readouterr().out
    assert (tmp_path / "llava-hr-7b-sft-1024-4bit" / "model.safetensors").exists()
