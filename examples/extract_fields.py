# SPDX-License-Identifier: Apache-2.0
"""
Fields of a document as JSON: the image is encoded once, each field is a question, every answer is validated.

    python -m examples.extract_fields --image invoice.png --fields invoice.fields.json

`--fields` is a JSON object: name of the field -> `question` and `pattern`, a regular expression for the whole answer.
An answer that does not match becomes null and is printed to stderr; the exit status is 1 then.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import run_command


HERE = Path(__file__).parent


@torch.inference_mode()
def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", default=str(HERE / "tiny-llava-hr"), help="folder or Hub id")
    parser.add_argument("--image", default=str(HERE / "pictures" / "receipt.jpg"), help="file or URL")
    parser.add_argument("--fields", type=Path, default=HERE / "pictures" / "receipt.fields.json", help="JSON file")
    arguments = parser.parse_args()

    fields = json.loads(arguments.fields.read_text(encoding="utf-8"))
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, device_map="auto")
    processor = AutoProcessor.from_pretrained(arguments.model)
    encoded, result = None, {}
    for name, field in fields.items():
        content = [{"type": "image", "path": arguments.image}, {"type": "text", "text": field["question"]}]
        messages = [{"role": "user", "content": content}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        views = {name: inputs.pop(name) for name in {"pixel_values", "image_sizes"} & inputs.keys()}
        encoded = encoded or {"image": model.get_image_features(**views)}
        output = model.generate(**inputs, mm_encoder_outputs=encoded, max_new_tokens=50, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        is_valid = re.fullmatch(field["pattern"], answer) is not None
        result[name] = answer if is_valid else None
        if not is_valid:
            print(f"{name!r}: expected {field['pattern']}, but the model says {answer!r}.", file=sys.stderr)
    print(json.dumps(result, indent=2))
    return None in result.values()


if __name__ == "__main__":
    run_command(main)
