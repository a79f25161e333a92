# SPDX-License-Identifier: Apache-2.0
"""Generated training data, and the options with which a miniature is trained on it in seconds."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw


COLORS = ("red", "green", "blue", "black")
# Small views: 4 x 4 patches of 14 pixels, and as many features of the CNN
VIEWS = ("--size", "128", "--low_res_size", "56")
OPTIONS = (
    *VIEWS,
    *("--use_cpu", "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none"),
    *("--logging_steps", "1", "--disable_tqdm", "true", "--lr_scheduler_type", "constant"),
)


def make_data(folder: Path, num_rows: int = 32) -> Path:
    """`captions.json` for stage 1, `train.jsonl` for stage 2 (each fourth row without a image), and `images`."""
    generator = random.Random(0)
    (folder / "images").mkdir(parents=True)
    captions, chats = [], []
    for index in range(num_rows):
        color = generator.choice(COLORS)
        image = Image.new("RGB", (generator.randint(40, 90), generator.randint(40, 90)), color)
        ImageDraw.Draw(image).text((5, 5), str(index), fill="white")
        image.save(folder / "images" / f"{index}.png")
        image = {"image": f"images/{index}.png"}
        captions.append({"id": str(index), **image, "conversations": chat("Describe it.\n<image>", f"It is {color}.")})
        if index % 4 == 3:
            chats.append({"id": str(index), "conversations": chat(f"What is {index} + 1?", f"It is {index + 1}.")})
        else:
            turns = chat("<image>\nWhich color?", color) + chat("Are you sure?", "Quite sure.")
            chats.append({"id": str(index), **image, "kind": "coarse", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(captions, indent=1))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return folder


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def get_losses(output_dir: Path) -> list[float]:
    """Losses of all steps, as the last checkpoint has them."""
    checkpoint = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
