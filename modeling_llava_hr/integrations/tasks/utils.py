# SPDX-License-Identifier: Apache-2.0
"""What the tasks of this folder call; lmms-eval imports it."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image


def flatten_questions(dataset: "Dataset") -> "Dataset":
    """
    Gives each question of an image a row of its own.

    Args:
        dataset (`Dataset`): Has `image`, `questions` and `answers`, of the latter as many as of the former.

    Returns:
        `Dataset`: Has `image`, `question` and `answer`, the latter without spaces around.
    """
    from datasets import Features, Image, Value

    def flatten(rows: dict[str, list]) -> dict[str, list]:
        flat = [
            (image, question, answer.strip())
            for image, questions, answers in zip(rows["image"], rows["questions"], rows["answers"], strict=True)
            for question, answer in zip(questions, answers, strict=True)
        ]
        return {name: [row[index] for row in flat] for index, name in enumerate(features)}

    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    # images are passed on as files, not decoded and encoded again
    dataset = dataset.cast_column("image", Image(decode=False))
    return dataset.map(
        flatten, batched=True, batch_size=100, remove_columns=dataset.column_names, features=features, desc="questions"
    )


def get_middle_frame(doc: dict) -> list["Image.Image"]:
    """The image of a question about an image, or the middle one of a video's frames."""
    images = doc["image"]
    return [images[len(images) // 2].convert("RGB")]
