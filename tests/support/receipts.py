# SPDX-License-Identifier: Apache-2.0
"""
Drawn receipts with questions about them, as a user's own data:

    python tests/support/receipts.py FOLDER
"""

import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def make_receipts(folder: Path, num_receipts: int = 300, seed: int = 0) -> Path:
    """`train.jsonl` (five sixths), `test.jsonl` and `images`: for each a question about the total, one for JSON."""
    generator, rows = random.Random(seed), []
    (folder / "images").mkdir(parents=True)
    for index in range(num_receipts):
        total, table = str(generator.randrange(1000, 10000)), str(generator.randrange(10, 100))
        image = Image.new("RGB", (generator.randint(200, 256), 256), "white")
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
        for line, text in enumerate(("RECEIPT", f"TABLE {table}", "--------", f"TOTAL {total}")):
            draw.text((generator.randint(20, 60), 30 + 45 * line), text, fill="black", font=font)
        image.save(folder / "images" / f"{index}.png")
        part = [{"type": "image", "path": f"images/{index}.png"}, {"type": "text", "text": "What is the total?"}]
        turns = [("user", part), ("assistant", total), ("user", "As JSON?")]
        turns += [("assistant", json.dumps({"table": table, "total": total}))]
        messages = [
            {"role": role, "content": text if isinstance(text, list) else [{"type": "text", "text": text}]}
            for role, text in turns
        ]
        rows.append({"id": f"receipt-{index}", "type": "receipt", "messages": messages})
    split = num_receipts * 5 // 6
    for name, part in (("train", rows[:split]), ("test", rows[split:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


if __name__ == "__main__":
    make_receipts(Path(sys.argv[1]))
