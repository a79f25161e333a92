# SPDX-License-Identifier: Apache-2.0
"""What `push_to_hub` uploads loads by its name with `trust_remote_code=True` without this package."""

from pathlib import Path

import torch
from safetensors.torch import load, load_file


ROOT = Path(__file__).parent.parent.parent
PUSH = """
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr

folder, name = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(folder).push_to_hub(name)
AutoProcessor.from_pretrained(folder).push_to_hub(name)
"""

# Runs where `import modeling_llava_hr` fails; a third argument is the name to upload again under
LOAD = """
import sys
sys.modules["modeling_llava_hr"] = None

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
)

repo_id, output, *again = sys.argv[1:]
trust = {"trust_remote_code": True}

def load(auto_class, name, **kwargs):
    loaded = auto_class.from_pretrained(repo_id, **trust, **kwargs)
    assert type(loaded).__name__ == name, type(loaded)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    return loaded

load(AutoConfig, "LlavaHrConfig")
processor = load(AutoProcessor, "LlavaHrProcessor")
base = load(AutoModel, "LlavaHrModel").state_dict()
model = load(AutoModelForImageTextToText, "LlavaHrForConditionalGeneration")
assert all(torch.equal(base[name], weight) for name, weight in model.model.state_dict().items())
save_file({name: weight.clone() for name, weight in model.state_dict().items()}, output)

image = Image.new("RGB", (50, 40), "teal")
for backend, name in (("torchvision", "LlavaHrImageProcessor"), ("pil", "LlavaHrImageProcessorPil")):
    pixels = load(AutoImageProcessor, name, backend=backend)(image, return_tensors="pt")
    assert pixels["low_res_pixel_values"].shape == (1, 3, 336, 336)
    assert pixels["pixel_values"].shape == (1, 3, 384, 384)
tokenizer = AutoTokenizer.from_pretrained(repo_id, **trust)
assert tokenizer.decode(tokenizer("Hi", add_special_tokens=False)["input_ids"]) == "Hi"

messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}]
pipe = pipeline("image-text-to-text", model=repo_id, **trust)
text = pipe(messages, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
assert text
print("ANSWER", repr(text))

for name in again:
    model.push_to_hub(name)
    processor.push_to_hub(name)
"""


def assert_holds(files: dict[str, bytes], expected: Path):
    """The repository holds the weights of a converted folder and this checkout's code."""
    assert_same_weights(load(files["model.safetensors"]), expected)
    code = {path: content for path, content in files.items() if path.endswith(".py")}
    assert code == {path.name: path.read_bytes() for path in (ROOT / "modeling_llava_hr").glob("*_llava_hr*.py")}


def assert_same_weights(actual: dict[str, torch.Tensor], folder: Path):
    expected = load_file(folder / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        assert actual[name].dtype == weight.dtype and actual[name].equal(weight), name


def test_pushed_models_load_by_name_without_the_package_and_can_be_pushed_again(hub, converted_stage1, tmp_path):
    token = {"HF_TOKEN": hub.token}
    hub.run(PUSH, converted_stage1, "llava-hr", folder=tmp_path / "push", PYTHONPATH=str(ROOT), **token)
    assert list(hub.commits) == ["someone/llava-hr"]
    assert_holds(hub.read("someone/llava-hr")[1], converted_stage1)

    first = tmp_path / "first.safetensors"
    answer = hub.run(LOAD, "someone/llava-hr", first, "again", folder=tmp_path / "load", **token)
    assert answer.startswith("ANSWER")
    assert_same_weights(load_file(first), converted_stage1)
    assert_holds(hub.read("someone/again")[1], converted_stage1)

    # what was pushed from a downloaded model must not point back to where that came from
    del hub.commits["someone/llava-hr"]
    second = tmp_path / "second.safetensors"
    assert hub.run(LOAD, "someone/again", second, folder=tmp_path / "load_again") == answer
    assert_same_weights(load_file(second), converted_stage1)
    assert hub.unknown == []
