# SPDX-License-Identifier: Apache-2.0
"""
What is saved, converted or uploaded by `push_to_hub` loads with `trust_remote_code=True` without this package, and can
be saved and uploaded again.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


ROOT = Path(__file__).parent.parent.parent
PUSH = """
import sys

from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr

folder, name = sys.argv[1:]
AutoModelForImageTextToText.from_pretrained(folder).push_to_hub(name)
AutoProcessor.from_pretrained(folder).push_to_hub(name)
"""

# Runs where `import modeling_llava_hr` fails. Arguments: a folder or repository, a file for the weights, and, if it is
# to be saved again, `save_pretrained` or `push_to_hub` and the name
LOAD = """
import sys
sys.modules["modeling_llava_hr"] = None

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
    AutoTokenizer, pipeline
)

source, output, *again = sys.argv[1:]
trust = {"trust_remote_code": True}

def load(auto_class, name, **kwargs):
    loaded = auto_class.from_pretrained(source, **trust, **kwargs)
    assert type(loaded).__name__ == name, type(loaded)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    return loaded

config = load(AutoConfig, "LlavaHrConfig")
processor = load(AutoProcessor, "LlavaHrProcessor")
base = load(AutoModel, "LlavaHrModel").state_dict()
load(AutoModelForMultimodalLM, "LlavaHrForConditionalGeneration")
model = load(AutoModelForImageTextToText, "LlavaHrForConditionalGeneration")
assert all(torch.equal(base[name], weight) for name, weight in model.model.state_dict().items())
save_file({name: weight.clone() for name, weight in model.state_dict().items()}, output)

image = Image.new("RGB", (50, 40), "teal")
for backend, name in (("torchvision", "LlavaHrImageProcessor"), ("pil", "LlavaHrImageProcessorPil")):
    image_processor = load(AutoImageProcessor, name, backend=backend)
    side = image_processor.size["height"]
    assert image_processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, side, side)
tokenizer = AutoTokenizer.from_pretrained(source, **trust)
assert tokenizer.decode(tokenizer("Hi", add_special_tokens=False)["input_ids"]) == "Hi"

messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]}]
pipe = pipeline("image-text-to-text", model=source, **trust)
text = pipe(messages, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
assert text
print("ANSWER", repr(text))

if again:
    method, name = again
    for part, suffix in ((model, ""), (processor, ""), (config, "-config"), (image_processor, "-pil")):
        getattr(part, method)(name + suffix)
"""


@pytest.mark.parametrize("backend", ["torchvision", "pil", "as converted"])
def test_folders_load_without_the_package_and_can_be_saved_again(hub, tmp_path, converted_stage2, backend):
    source, first = converted_stage2, tmp_path / "first.safetensors"
    if backend != "as converted":
        source = tmp_path / "source"
        processor = AutoProcessor.from_pretrained(converted_stage2)
        processor.image_processor = AutoImageProcessor.from_pretrained(converted_stage2, backend=backend)
        AutoModelForImageTextToText.from_pretrained(converted_stage2).save_pretrained(source)
        processor.save_pretrained(source)
    again = tmp_path / "again"
    answer = hub.run(LOAD, source, first, "save_pretrained", again, folder=tmp_path / "load")
    assert answer.startswith("ANSWER")
    assert_same_weights(load_file(first), source)
    second = (again, tmp_path / "second.safetensors", "save_pretrained", tmp_path / "third")
    assert hub.run(LOAD, *second, folder=tmp_path / "load_again") == answer
    assert {path.name for path in (tmp_path / "third").glob("*.py")} == {path.name for path in source.glob("*.py")}


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
    answer = hub.run(LOAD, "someone/llava-hr", first, "push_to_hub", "again", folder=tmp_path / "load", **token)
    assert answer.startswith("ANSWER")
    assert_same_weights(load_file(first), converted_stage1)
    assert_holds(hub.read("someone/again")[1], converted_stage1)

    # what was pushed from a downloaded model must not point back to where that came from
    del hub.commits["someone/llava-hr"]
    second = tmp_path / "second.safetensors"
    assert hub.run(LOAD, "someone/again", second, folder=tmp_path / "load_again") == answer
    assert_same_weights(load_file(second), converted_stage1)
    assert hub.unknown == []
