# SPDX-License-Identifier: Apache-2.0
"""Whatever is saved loads with `trust_remote_code=True` without this package, and can be saved again."""

import subprocess
import sys
import textwrap

import pytest


# Runs in a process of its own in which `import modeling_llava_hr` fails
SCRIPT = """
import sys
sys.modules["modeling_llava_hr"] = None

import torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
    AutoTokenizer, pipeline
)

folder, output = sys.argv[1:]
trust = {"trust_remote_code": True}
image = Image.new("RGB", (50, 40), "teal")

config = AutoConfig.from_pretrained(folder, **trust)
assert type(config).__module__.startswith("transformers_modules."), type(config)
assert type(AutoModel.from_pretrained(folder, **trust)).__name__ == "LlavaHrModel"
name = "LlavaHrForConditionalGeneration"
assert type(AutoModelForMultimodalLM.from_pretrained(folder, **trust)).__name__ == name
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
for backend, name in (("torchvision", "LlavaHrImageProcessor"), ("pil", "LlavaHrImageProcessorPil")):
    image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
    assert type(image_processor).__name__ == name, type(image_processor)
    assert image_processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 1024, 1024)

messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}]
pipe = pipeline("image-text-to-text", model=folder, **trust)
text = pipe(messages, max_new_tokens=4, return_full_text=False)[0]["generated_text"]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1]:]
print("TOKENS", tokens.tolist())

model.save_pretrained(output)
processor.save_pretrained(output)
AutoConfig.from_pretrained(folder, **trust).save_pretrained(output + "-config")
image_processor.save_pretrained(output + "-pil")
"""


def run(script, tmp_path, *arguments):
    """Output of a script, with a cache of its own for remote code and nothing of the checkout on its path."""
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_saved_folders_load_without_the_package_and_can_be_saved_again(tmp_path, converted_stage2, backend):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

    source = tmp_path / "source"
    processor = AutoProcessor.from_pretrained(converted_stage2)
    processor.image_processor = AutoImageProcessor.from_pretrained(converted_stage2, backend=backend)
    AutoModelForImageTextToText.from_pretrained(converted_stage2).save_pretrained(source)
    processor.save_pretrained(source)

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = run(SCRIPT, tmp_path / "first", source, tmp_path / "again")
    second = run(SCRIPT, tmp_path / "second", tmp_path / "again", tmp_path / "third")
    assert first.startswith("TOKENS") and second == first
    files = {path.name for path in source.glob("*.py")}
    assert {path.name for path in (tmp_path / "third").glob("*.py")} == files


def test_the_converter_writes_remote_code_as_well(tmp_path, converted_stage2):
    assert run(SCRIPT, tmp_path, converted_stage2, tmp_path / "out").startswith("TOKENS")
