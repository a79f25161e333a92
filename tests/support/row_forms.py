# SPDX-License-Identifier: Apache-2.0
"""The same four rows, a question about a red image, in every form that training takes."""

import gzip
import json
import tarfile
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage


IMAGE = PILImage.new("RGB", (40, 30), "red")
TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Red."}]
PART = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "What?"}]
PARTS = [{"role": "user", "content": PART}, {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]
LLAVA = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]}
MESSAGES = List({"role": Value("string"), "content": Value("string")})
ROWS = {
    "llava": {**LLAVA, "image": "red.png"},
    "llava, list": {**LLAVA, "image": ["red.png"]},
    "roles": {"conversations": TURNS, "image": "red.png"},
    "messages, name": {"messages": TURNS, "images": "red.png"},
    "messages, list": {"messages": TURNS, "images": ["red.png"]},
    "messages, nested": {"messages": TURNS, "images": [["red.png"]]},
    "messages, path": {"messages": TURNS, "image": {"bytes": None, "path": "red.png"}},
    "parts": {"messages": PARTS},
    "prompt": {"prompt": "What?", "completion": "Red.", "image": "red.png"},
}
FILES = ["rows.jsonl.gz", "rows.parquet", "rows.csv", "rows.tar", "rows.yaml", "row?.json", "saved", "saved, splits"]


def write_rows(form: str, folder: Path) -> Path:
    """Writes rows of a form into a folder that has `red.png`; returns what `data_path` is."""
    IMAGE.save(folder / "red.png")
    lines, path = "\n".join([json.dumps(ROWS.get(form, ROWS["llava"]))] * 4), folder / form
    dataset = Dataset.from_dict(
        {"messages": [TURNS] * 4, "image": [IMAGE] * 4}, features=Features({"messages": MESSAGES, "image": Image()})
    )
    if form in ROWS:
        path = folder / "rows.jsonl"
        path.write_text(lines)
    elif form == "rows.jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif form == "rows.parquet":
        dataset.to_parquet(path)
    elif form == "rows.csv":
        Dataset.from_list([{**ROWS["prompt"], "image": '["red.png"]'}] * 4).to_csv(path)
    elif form == "rows.tar":
        (folder / "row.json").write_text(json.dumps({"messages": TURNS}))
        with tarfile.open(path, "w") as tar:
            for index in range(4):
                tar.add(folder / "red.png", f"{index}.png")
                tar.add(folder / "row.json", f"{index}.json")
    elif form == "rows.yaml":
        (folder / "rows.jsonl").write_text(f"{lines}\n{lines}")
        entries = [{"json_path": "rows.jsonl", "sampling_strategy": strategy} for strategy in ("first:25%", "end:2")]
        path.write_text(yaml.safe_dump({"datasets": entries}))
    elif form == "row?.json":
        for name in ("row1.json", "row2.json"):
            (folder / name).write_text("\n".join(lines.split("\n")[:2]))
    elif form == "saved":
        dataset.save_to_disk(path)
    else:
        DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(path)
    return path
