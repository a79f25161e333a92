# SPDX-License-Identifier: Apache-2.0
"""
Greedy tokens of vLLM's Transformers back end equal those of transformers: `make test-vllm`, in vLLM's own environment.

Both run in a process that cannot import this package: they have the saved folder alone, as a server would.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor


pytest.importorskip("vllm", reason="vLLM is not installed here: `make test-vllm` has an environment of its own")

from conversion.convert_llava_hr_weights_to_hf import convert


ROOT = Path(__file__).parent.parent.parent
TRAINED = ROOT / "examples" / "tiny-llava-hr"
NUM_TOKENS = 16
SHAPES = {"square": (256, 256), "wide": (300, 90), "tall": (70, 220)}
CHATS = {
    "square": [("What does the red sign say?", "square")],
    "wide": [("What does the sign say?", "wide")],
    "tall": [("What is there?", "tall")],
    "two images": [("What is different?", "square", "tall")],
    "text only": [("What is a sign?",)],
    "two turns": [("What does the sign say?", "wide"), ("Are you sure?",)],
}

# Prints the token ids of each chat's prompt and answer: from transformers, from vLLM in a batch and one by one
SCRIPT = """
import sys
sys.modules["modeling_llava_hr"] = None

import json
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, num_tokens, chats = sys.argv[1], int(sys.argv[2]), json.load(open(sys.argv[3]))
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
for chat in chats:
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)[0].tolist()
    length = inputs["input_ids"].shape[1]
    print("TRANSFORMERS", json.dumps([output[:length], output[length:]]), flush=True)

import vllm
from vllm.sampling_params import StructuredOutputsParams

llm = vllm.LLM(
    folder, model_impl="transformers", trust_remote_code=True, dtype="float32", enforce_eager=True, seed=0,
    max_model_len=512, max_num_batched_tokens=2048, max_num_seqs=8, limit_mm_per_prompt={"image": 2},
    structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
)
for chat in chats:
    for part in (part for message in chat for part in message["content"]):
        if part["type"] == "image":
            part["type"], part["image_pil"] = "image_pil", Image.open(part.pop("path"))
# two things that vLLM does not take from the folder
logit_bias = {token: -100.0 for token in model.generation_config.suppress_tokens or []}
sampling = vllm.SamplingParams(temperature=0, max_tokens=num_tokens, logit_bias=logit_bias)
options = {"use_tqdm": False}
for name, outputs in (
    ("BATCH", llm.chat(chats, sampling, **options)),
    ("ALONE", [llm.chat(chat, sampling, **options)[0] for chat in chats]),
):
    for output in outputs:
        print(name, json.dumps([list(output.prompt_token_ids), list(output.outputs[0].token_ids)]), flush=True)

schema = StructuredOutputsParams(json=json.load(open(sys.argv[4])))
structured = vllm.SamplingParams(temperature=0, max_tokens=64, structured_outputs=schema)
print("SCHEMA", json.dumps(llm.chat(chats[0], structured, **options)[0].outputs[0].text), flush=True)
"""
# What an answer is constrained to, as a server's `response_format`
SCHEMA = {
    "type": "object",
    "properties": {"sign": {"type": "string", "pattern": "^[0-9]{4}$"}},
    "required": ["sign"],
    "additionalProperties": False,
}


def make_chats(folder: Path) -> list[list[dict]]:
    for name, (width, height) in SHAPES.items():
        image = Image.new("RGB", (width, height), "skyblue")
        draw = ImageDraw.Draw(image)
        draw.rectangle((10, 10, 60, 30), fill="firebrick")
        draw.text((14, 14), str(width + height), fill="white")
        image.save(folder / f"{name}.png")
    chats = []
    for turns in CHATS.values():
        chat = []
        for question, *names in turns:
            if chat:
                chat.append({"role": "assistant", "content": [{"type": "text", "text": "4711"}]})
            images = [{"type": "image", "path": str(folder / f"{name}.png")} for name in names]
            chat.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        chats.append(chat)
    return chats


@pytest.fixture(scope="module", params=["random", "trained", "unpad"])
def model_folder(request, tmp_path_factory):
    """A recorded checkpoint of the released code with Vicuna's kind of tokenizer, and the trained tiny model twice."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param != "random":  # saved again, since it is kept without its code
        AutoModelForImageTextToText.from_pretrained(TRAINED).save_pretrained(folder)
        AutoProcessor.from_pretrained(TRAINED).save_pretrained(folder)
        edit(folder / "processor_config.json", "image_processor", unpad=request.param == "unpad")
        return folder
    convert(str(ROOT / "tests" / "fixtures" / "reference" / "stage2-1024" / "checkpoint"), str(folder))
    # vLLM's attention on the CPU has no heads of 16 channels; small views take less time
    edit(folder / "config.json", "text_config", num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"low_res_size": 112})
    )
    edit(folder / "processor_config.json", "image_processor", size=square(256), low_res_size=112)
    return folder


def edit(path: Path, section: str, **values) -> None:
    content = json.loads(path.read_text())
    content[section].update(values)
    path.write_text(json.dumps(content))


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def test_greedy_tokens_are_those_of_transformers(model_folder, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "chats.json").write_text(json.dumps(make_chats(tmp_path)))
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    defaults = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    result = subprocess.run(
        [sys.executable, "script.py", str(model_folder), str(NUM_TOKENS), "chats.json", "schema.json"],
        cwd=tmp_path,
        env={**os.environ, **defaults},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    expected, batch, alone = (
        [json.loads(line.removeprefix(name)) for line in result.stdout.splitlines() if line.startswith(f"{name} ")]
        for name in ("TRANSFORMERS", "BATCH", "ALONE")
    )
    for name, (prompt, answer), *from_vllm in zip(CHATS, expected, batch, alone, strict=True):
        print(f"\n{name}: prompt of {len(prompt)} tokens, answer {answer}", end="")
        assert [ids for ids, _ in from_vllm] == [prompt, prompt], f"prompt of {name}"
        assert [ids for _, ids in from_vllm] == [answer, answer], f"answer to {name}"
    (answer,) = (line.removeprefix("SCHEMA ") for line in result.stdout.splitlines() if line.startswith("SCHEMA "))
    print(f"\nby schema: {answer}", end="")
    assert re.fullmatch(r'\{"sign": ?"[0-9]{4}"\}', json.loads(answer))
