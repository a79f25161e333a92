# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism with real processes: two of them, on gloo, share the language model."""

import json
import subprocess
import sys

import torch
from tiny_configs import make_inputs, make_model


SCRIPT = """
import json, sys

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText

import modeling_llava_hr

folder = sys.argv[1]
dist.init_process_group("gloo")
try:
    from transformers.distributed import DistributedConfig

    plan = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=2)}
except (ImportError, TypeError):  # transformers before 5.18
    plan = {"tp_plan": "auto"}
model = AutoModelForImageTextToText.from_pretrained(folder, **plan)
weight = model.model.language_model.layers[0].self_attn.q_proj.weight
inputs = torch.load(folder + "/inputs.pt")
with torch.no_grad():
    logits = model(**inputs).logits
tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
if dist.get_rank() == 0:
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    result = {"logits": logits.tolist(), "tokens": tokens.tolist(), "rows": local.shape[0]}
    with open(folder + "/result.json", "w") as file:
        json.dump(result, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(tmp_path):
    model, inputs = make_model(), make_inputs(1, 2)
    assert model.tp_plan["lm_head"] == "colwise_gather_output"
    folder = tmp_path / "model"  # not beside the script, which would import the code that is saved there
    model.save_pretrained(folder)
    torch.save(inputs, folder / "inputs.pt")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*command, tmp_path / "script.py", folder], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    result = json.loads((folder / "result.json").read_text())
    assert result["rows"] == 32  # half of q_proj's 64
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(torch.tensor(result["logits"])[kept], expected[kept], atol=1e-4, rtol=1e-4)
    assert result["tokens"] == model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
