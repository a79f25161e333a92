# SPDX-License-Identifier: Apache-2.0
"""
FinePrint: images with questions that only a sharp view answers, and questions that any view answers.

    python -m training.tiny.fineprint --output .cache/fineprint --num_train 20000 --size 256

Each image shows one of five scenes (street signs, price tags, a receipt, a table, dial plates) with up to
`max_signs` texts of four characters, each beside or on something coloured, and large coloured shapes. The texts are
a few pixels high (fine questions); scene, shapes, colours and positions are large (coarse questions). Every text is
drawn at random, so a question tells nothing about its answer, and a hash of the text decides which split may show it.

Written in the LLaVA format (`id`, `image`, `conversations`):

    OUTPUT/images/*.jpg
    OUTPUT/captions.jsonl      training images with captions, for stage 1
    OUTPUT/train.jsonl         training images with all their questions in one conversation, for stage 2
    OUTPUT/validation.jsonl    one question a row, with its `kind`, `scene` and `num_signs`
    OUTPUT/test.jsonl          the same
"""

import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm
from transformers import HfArgumentParser

from modeling_llava_hr.utils import run_command, write_text


T = TypeVar("T")

SPLITS = ("train", "validation", "test")
COLORS = {
    "red": (206, 34, 38),
    "orange": (244, 134, 20),
    "yellow": (246, 216, 32),
    "green": (34, 146, 58),
    "blue": (28, 82, 202),
    "purple": (134, 48, 162),
    "white": (246, 246, 246),
    "black": (26, 26, 26),
}
SHAPES = ("circle", "square", "triangle", "star")
# The object with the text in each scene, and the text's format: d is a digit, c a digit or (alphanumeric) a letter
SCENES = {
    "street": ("sign", "cccc"),
    "shelf": ("tag", "d.dd"),
    "receipt": ("line", "d.dd"),
    "table": ("row", "cccc"),
    "panel": ("dial", "dd.d"),
}
# Aspect ratios with `natural_shapes`; the longer side is the image's size
NATURAL_SHAPES = {"street": (16, 9), "shelf": (4, 3), "table": (1, 1.41), "receipt": (1, 3)}
TEXT_LENGTH = 4
DIGITS = "0123456789"
# Letters that cannot be confused with digits or other letters at a few pixels
LETTERS = "ACEFHJKLMNPRTUVXY"
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    None,  # the one that comes with PIL
)
FONT_SIZES = (11, 12, 13)  # in pixels; digits are about 0.73 times as high
MAX_BLUR = 0.3  # largest standard deviation in pixels
MIN_NOISE = 3.0  # smallest standard deviation, of 255
MIN_QUALITY = 80  # of JPEG; the highest is 95
# Vertical distance of texts in pixels: nearly two positions of a CNN of stride 32
PITCH = 56
# Classes of [`get_targets`]
COLOR_NAMES = list(COLORS)
OBJECTS = ["nothing", *(carrier for carrier, _ in SCENES.values()), *SHAPES]
IGNORED = -100  # `cross_entropy` ignores it
STRIDE, WORD_STRIDE, STROKE_STRIDE = 32, 16, 8  # of the last three stages of a CNN, in pixels


@dataclass
class FinePrintConfig:
    """Options of the images; the help describes each field."""

    size: int = field(default=256, metadata={"help": "side of the square images in pixels"})
    min_signs: int = field(default=1, metadata={"help": "smallest number of texts in an image"})
    max_signs: int = field(default=4, metadata={"help": "largest number of texts, as far as there is room"})
    max_shapes: int = field(default=2, metadata={"help": "largest number of large shapes"})
    natural_shapes: bool = field(
        default=False, metadata={"help": "wide streets and shelves, tall receipts and tables"}
    )
    alphabet: str = field(default="digits", metadata={"help": "digits or alphanumeric"})
    max_noise: float = field(default=12.0, metadata={"help": "largest standard deviation of the noise, of 255"})
    seed: int = field(default=0, metadata={"help": "of all random choices"})

    def __post_init__(self) -> None:
        if self.size < 64:
            raise ValueError(f"`size` must be at least 64 pixels, but got {self.size}.")
        if not 0 <= self.min_signs <= self.max_signs <= 6:
            raise ValueError(
                f"`min_signs` and `max_signs` must ascend from 0 to 6 (each text has a colour of its own, and two are "
                f"for shapes), but got {self.min_signs} and {self.max_signs}."
            )
        if not 0 <= self.max_shapes <= 2:
            raise ValueError(f"`max_shapes` must be 0, 1 or 2, but got {self.max_shapes}.")
        if self.alphabet not in ("digits", "alphanumeric"):
            raise ValueError(f"`alphabet` must be 'digits' or 'alphanumeric', but got {self.alphabet!r}.")

    @property
    def characters(self) -> str:
        """All characters that texts are made of."""
        return DIGITS + "." + (LETTERS if self.alphabet == "alphanumeric" else "")


class Sign(NamedTuple):
    """A text and its object: `center` of the text and the `centers` of its characters, `(x, y)` in pixels."""

    text: str
    color: str
    object: str
    center: tuple[float, float]
    centers: list[tuple[float, float]]


class Shape(NamedTuple):
    """A large shape and its `center`, `(x, y)` in pixels."""

    shape: str
    color: str
    center: tuple[float, float]


class Scene(NamedTuple):
    """The contents of an image of `width` x `height` pixels."""

    name: str
    width: int
    height: int
    signs: list[Sign]
    shapes: list[Shape]


def get_split(text: str) -> str:
    """The split that may show a text: 80 % of all texts are for training, 10 % for each of the others."""
    bucket = hashlib.sha256(text.encode()).digest()[0] * 10 // 256
    return {8: "validation", 9: "test"}.get(bucket, "train")


def count_cores() -> int:
    """Number of cores that this process may use, at most 16: more hardly speed up drawing or loading batches."""
    try:
        return min(len(os.sched_getaffinity(0)), 16)
    except AttributeError:  # not Linux
        return min(os.cpu_count() or 1, 16)


def get_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Random generator of one image, independent of other images and of the process."""
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8]))


@cache
def get_font(name: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """
    A font that some dependency ships, `size` in pixels: one of matplotlib's, or PIL's own if `name` is `None`. Raises
    `ImportError` if matplotlib is not installed.
    """
    if name is None:
        return ImageFont.load_default(size)
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:
        raise ImportError("FinePrint draws with matplotlib's fonts. Install it: pip install matplotlib")
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{name}.ttf", size)


class Painter:
    """Draws one image with texts of `split`."""

    def __init__(self, config: FinePrintConfig, split: str, rng: np.random.Generator):
        self.config, self.split, self.rng = config, split, rng
        self.width = self.height = config.size
        self.boxes: list[tuple[float, float, float, float]] = []  # occupied areas: left, top, right, bottom
        self.signs: list[Sign] = []
        self.shapes: list[Shape] = []
        self.colors = list(rng.permutation(list(COLORS)))

    def paint(self) -> tuple[Image.Image, Scene]:
        """Draws everything; returns the image, without blur and noise, and its contents."""
        name = self.choice(list(SCENES))
        if self.config.natural_shapes:
            shape = NATURAL_SHAPES.get(name, (1, 1))
            self.width, self.height = (round(length / max(shape) * self.config.size) for length in shape)
        self.image = Image.new("RGB", (self.width, self.height), self.muted(120, 225))
        self.draw = ImageDraw.Draw(self.image)
        self.carrier, self.form = SCENES[name]
        num_signs = int(self.rng.integers(self.config.min_signs, self.config.max_signs + 1))
        self.draw_background(name)
        if num_signs and name in ("receipt", "table"):
            self.draw_paper(name, num_signs)
        elif num_signs:
            self.draw_plates(num_signs)
        self.draw_shapes(int(self.rng.integers(0, self.config.max_shapes + 1)))
        return self.image, Scene(name, self.width, self.height, self.signs, self.shapes)

    def paint_page(self) -> tuple[Image.Image, Scene]:
        """Fills the image with texts on black, white or coloured ground, for reading practice."""
        self.image = Image.new("RGB", (self.width, self.height))
        self.draw = ImageDraw.Draw(self.image)
        self.carrier = "page"
        width = 32
        for left in range(0, self.width - width + 1, width):
            color = self.choice(self.colors)
            fill = self.muted(225, 248) if self.rng.random() < 0.6 else self.shade(color)
            self.draw.rectangle((left, 0, left + width, self.height), fill=fill)
            for top in np.arange(self.between(0, 6), self.height - 12, self.between(14, 17)):
                self.form = self.choice(list(SCENES.values()))[1]
                self.draw_text(left + width / 2, top + self.between(6, 8), fill, color)
        return self.image, Scene("page", self.width, self.height, self.signs, [])

    # Random choices

    def choice(self, items: Sequence[T]) -> T:
        return items[int(self.rng.integers(len(items)))]

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high)) if high > low else low

    def muted(self, low: int, high: int) -> tuple[int, ...]:
        """A tinted grey that is not one of `COLORS`."""
        grey = self.rng.integers(low, high + 1)
        return tuple(int(value) for value in np.clip(grey + self.rng.integers(-14, 15, 3), 0, 255))

    def shade(self, color: str) -> tuple[int, ...]:
        return tuple(int(value) for value in np.clip(np.array(COLORS[color]) + self.rng.integers(-14, 15, 3), 0, 255))

    def get_text(self) -> str:
        characters = self.config.characters.replace(".", "")
        while True:
            text = "".join({"d": self.choice(DIGITS), ".": ".", "c": self.choice(characters)}[c] for c in self.form)
            if get_split(text) == self.split:
                return text

    def place(self, width: float, height: float) -> tuple[float, float] | None:
        """Left and top of a free box of this size, or `None` if none was found."""
        if width > self.width - 4 or height > self.height - 4:
            return None
        for _ in range(40):
            left, top = self.between(2, self.width - 2 - width), self.between(2, self.height - 2 - height)
            box = (left, top, left + width, top + height)
            if all(
                box[0] > b[2] + 2 or box[2] < b[0] - 2 or box[1] > b[3] + 2 or box[3] < b[1] - 2 for b in self.boxes
            ):
                self.boxes.append(box)
                return left, top
        return None

    # Things

    def draw_background(self, name: str) -> None:
        horizon = self.between(0.4, 0.8) * self.height
        if name == "street":
            self.draw.rectangle((0, horizon, self.width, self.height), fill=self.muted(80, 150))
            for _ in range(self.width // 64):
                left, width = self.between(-20, self.width), self.between(20, 60)
                self.draw.rectangle((left, self.between(0, horizon), left + width, horizon), fill=self.muted(110, 200))
        elif name == "shelf":
            for y in np.arange(self.between(20, 60), self.height, 64):
                self.draw.rectangle((0, y, self.width, y + 5), fill=self.muted(70, 110))
        elif name == "panel":
            for x in np.arange(self.between(0, 48), self.width, 48):
                self.draw.line((x, 0, x, self.height), fill=self.muted(90, 120))
        for _ in range(self.config.size // 48):  # clutter
            x, y = self.between(0, self.width), self.between(0, self.height)
            end = (x + self.between(-40, 40), y + self.between(-40, 40))
            self.draw.line((x, y, *end), fill=self.muted(80, 220), width=int(self.rng.integers(1, 4)))

    def draw_text(self, x: float, y: float, background: tuple[int, ...], color: str) -> None:
        """Writes a new text centred at a point, in black or white, and records it with the colour of its object."""
        text = self.get_text()
        font = get_font(self.choice(FONTS), self.choice(FONT_SIZES))
        is_light = np.dot(background, (0.299, 0.587, 0.114)) > 128
        fill = self.muted(12, 48) if is_light else self.muted(215, 245)
        left = round(x - font.getlength(text) / 2)
        self.draw.text((left, y), text, font=font, fill=fill, anchor="lm")
        ends = [left + font.getlength(text[:count]) for count in range(len(text) + 1)]
        centers = [((a + b) / 2, y) for a, b in zip(ends, ends[1:], strict=False)]
        self.signs.append(Sign(text, color, self.carrier, ((ends[0] + ends[-1]) / 2, y), centers))

    def draw_plates(self, count: int) -> None:
        """Draws street signs, price tags or dial plates without overlap."""
        for _ in range(count):
            if self.carrier == "dial":
                width = height = self.between(48, 56)
            else:
                width, height = self.between(44, 48) + 10 * (self.carrier == "tag"), self.between(18, 28)
            # room between the texts of neighbours
            if (corner := self.place(width, max(height, PITCH - 6))) is None:
                return
            color = str(self.colors.pop())
            left, top = corner
            top += (max(height, PITCH - 6) - height) / 2
            box = (left, top, left + width, top + height)
            getattr(self, f"draw_{self.carrier}")(box, color)

    def draw_sign(self, box: tuple[float, float, float, float], color: str) -> None:
        left, top, right, bottom = box
        fill = self.shade(color)
        pole = (left + right) / 2
        self.draw.rectangle((pole - 1, bottom, pole + 1, bottom + 8), fill=self.muted(40, 80))
        self.draw.rounded_rectangle(box, radius=self.between(0, 5), fill=fill, outline=self.muted(30, 90))
        self.draw_text(pole, (top + bottom) / 2, fill, color)

    def draw_tag(self, box: tuple[float, float, float, float], color: str) -> None:
        left, top, right, bottom = box
        fill = self.muted(225, 248)
        self.draw.rectangle(box, fill=fill, outline=self.muted(30, 90))
        self.draw.rectangle((left, top, left + 11, bottom), fill=self.shade(color), outline=self.muted(30, 90))
        self.draw_text((left + 12 + right) / 2, (top + bottom) / 2, fill, color)

    def draw_dial(self, box: tuple[float, float, float, float], color: str) -> None:
        left, top, right, bottom = box
        x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
        fill = self.muted(225, 248) if self.rng.random() < 0.5 else self.muted(20, 50)
        self.draw.ellipse(box, fill=fill, outline=self.shade(color), width=5)
        angle = self.between(np.pi, 2 * np.pi)
        tip = (x + 0.6 * radius * np.cos(angle), y - 2 + 0.6 * radius * np.sin(angle))
        self.draw.line((x, y - 2, *tip), fill=self.muted(100, 160), width=2)
        self.draw_text(x, y + 0.36 * radius, fill, color)

    def draw_paper(self, name: str, count: int) -> None:
        """Draws a receipt or a table: texts below one another, each beside its colour."""
        pitch = self.between(PITCH, PITCH + 4)
        width = self.between(58, min(76, self.width - 4)) if self.width > 64 else 58
        count = min(count, int((self.height - 4) // pitch))
        height = count * pitch
        corner = self.place(width, height)
        if corner is None:
            return
        left, top = corner
        fill = self.muted(225, 248)
        self.draw.rectangle((left, top, left + width, top + height), fill=fill, outline=self.muted(60, 120))
        for row in range(count):
            y = top + (row + 0.5) * pitch
            color = str(self.colors.pop())
            if name == "table":
                self.draw.line((left, top + row * pitch, left + width, top + row * pitch), fill=self.muted(60, 120))
                header = (left, top + row * pitch, left + 18, top + (row + 1) * pitch)
                self.draw.rectangle(header, fill=self.shade(color), outline=self.muted(60, 120))
            else:
                dot = (left + 4, y - 7, left + 18, y + 7)
                self.draw.ellipse(dot, fill=self.shade(color), outline=self.muted(60, 120))
            self.draw_text(left + 19 + self.between(18, width - 38), y, fill, color)

    def draw_shapes(self, count: int) -> None:
        kinds = list(self.rng.permutation(SHAPES))
        for _ in range(count):
            side = self.between(26, 44) * max(1, self.config.size / 512)
            if (corner := self.place(side, side)) is None:
                return
            kind, color = str(kinds.pop()), str(self.colors.pop())
            left, top = corner
            x, y, radius = left + side / 2, top + side / 2, side / 2
            angles = {"triangle": 3, "star": 10}.get(kind, 0)
            turns = [2 * np.pi * corner / max(angles, 1) - np.pi / 2 for corner in range(angles)]
            points = [
                (x + r * np.cos(turn), y + r * np.sin(turn))
                for index, turn in enumerate(turns)
                for r in [radius * (0.42 if kind == "star" and index % 2 else 1)]
            ]
            style: dict[str, Any] = {"fill": self.shade(color), "outline": self.muted(60, 120)}
            if kind == "circle":
                self.draw.ellipse((left, top, left + side, top + side), **style)
            elif kind == "square":
                self.draw.rectangle((left + 2, top + 2, left + side - 2, top + side - 2), **style)
            else:
                self.draw.polygon(points, **style)
            self.shapes.append(Shape(kind, color, (x, y)))


def draw_sample(config: FinePrintConfig, split: str, index: int, page: bool = False) -> tuple[bytes, Scene]:
    """
    Draws image number `index` of a split; with `page` it is full of texts instead of a scene.

    Returns:
        `tuple`: The image as a JPEG file, and what it shows.
    """
    rng = get_rng(config.seed, split, index)
    painter = Painter(config, split, rng)
    image, scene = painter.paint_page() if page else painter.paint()
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, MAX_BLUR)))
    noise = rng.standard_normal((*image.size[::-1], 3), dtype=np.float32)
    noisy = np.asarray(image) + noise * rng.uniform(MIN_NOISE, config.max_noise)
    file = io.BytesIO()
    quality = int(rng.integers(MIN_QUALITY, 96))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue(), scene


def get_position(center: tuple[float, float], scene: Scene) -> str | None:
    """The quarter of the image that contains a point, such as "top left"; `None` near the middle lines."""
    x, y = center[0] / scene.width - 0.5, center[1] / scene.height - 0.5
    if min(abs(x), abs(y)) < 1 / 16:
        return None
    return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


def get_questions(scene: Scene) -> list[tuple[str, str, str]]:
    """All questions about a scene: kind (`"fine"` or `"coarse"`), question, answer."""
    questions = [("coarse", "What is shown?", scene.name)]
    for sign in scene.signs:
        questions.append(("fine", f"What does the {sign.color} {sign.object} say?", sign.text))
    for shape in scene.shapes:
        questions.append(("coarse", f"What shape is {shape.color}?", shape.shape))
        questions.append(("coarse", f"What color is the {shape.shape}?", shape.color))
        if (position := get_position(shape.center, scene)) is not None:
            questions.append(("coarse", f"Where is the {shape.shape}?", position))
    return questions


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def get_caption(scene: Scene, with_texts: bool) -> str:
    """
    Describes a scene, with the fine print or without: "street with a red sign 4711, a blue circle at the top left".
    """
    parts = []
    for sign in scene.signs:
        parts.append(f"{with_article(sign.color)} {sign.object}" + (f" {sign.text}" if with_texts else ""))
    for shape in scene.shapes:
        position = get_position(shape.center, scene)
        parts.append(f"{with_article(shape.color)} {shape.shape}" + (f" at the {position}" if position else ""))
    return f"{scene.name} with {', '.join(parts)}" if parts else scene.name


def get_rows(split: str, index: int, scene: Scene, rng: np.random.Generator) -> dict[str, list[dict]]:
    """
    The rows of an image, by the file that they belong to: for `"train"` (and `"captions"`) one row, otherwise one for
    each question.
    """
    name = f"{split}-{index:07d}"
    base = {"image": f"{name}.jpg", "scene": scene.name, "num_signs": len(scene.signs)}
    questions = get_questions(scene)
    questions = [questions[i] for i in rng.permutation(len(questions))]

    def talk(pairs: list[tuple[str, str]]) -> list[dict]:
        turns = [
            [{"from": "human", "value": question}, {"from": "gpt", "value": answer}] for question, answer in pairs
        ]
        turns[0][0]["value"] = f"<image>\n{turns[0][0]['value']}".strip()
        return [turn for pair in turns for turn in pair]

    if split == "train":
        return {
            "train": [
                {"id": name, **base, "conversations": talk([(asked, answer) for _, asked, answer in questions])}
            ],
            "captions": [{"id": name, **base, "conversations": talk([("", get_caption(scene, with_texts=True))])}],
        }
    rows = [
        {"id": f"{name}-{number}", **base, "kind": kind, "conversations": talk([(question, answer)])}
        for number, (kind, question, answer) in enumerate(questions)
    ]
    return {split: rows}


def get_targets(scene: Scene, characters: str) -> dict[str, torch.Tensor]:
    """
    What each position of the high-resolution tower's maps has to tell.

    Args:
        scene ([`~training.tiny.fineprint.Scene`]): What the image shows; its side is `S` pixels.
        characters (`str`): All characters that texts are made of.

    Returns:
        `dict[str, torch.Tensor]`, each int64, for the position that holds an object's centre, `IGNORED` or "nothing"
        elsewhere:

        - `objects`, `colors` of shape `(S / 32, S / 32)`,
        - `texts` of shape `(S / 32, S / 32, 4)`: indices into `characters`,
        - `words` of shape `(S / 16, S / 16, 4)`: the same on a finer map,
        - `strokes` of shape `(S / 8, S / 4)`: 1 + index of the character whose centre lies there, 0 for none.
    """
    grid = scene.width // STRIDE
    objects = torch.zeros(grid, grid, dtype=torch.long)
    colors = torch.full((grid, grid), IGNORED)
    texts = torch.full((grid, grid, TEXT_LENGTH), IGNORED)
    words = texts.new_full((scene.width // WORD_STRIDE, scene.width // WORD_STRIDE, TEXT_LENGTH), IGNORED)
    strokes = torch.zeros(scene.width // STROKE_STRIDE, 2 * scene.width // STROKE_STRIDE, dtype=torch.long)
    if scene.name == "page":  # longer than the coarse map can hold
        objects.fill_(IGNORED)
    else:
        things: list[Any] = [*scene.shapes, *scene.signs]
        for thing in things:  # texts last, so that they win where a shape has the same position
            column, row = (int(coordinate) // STRIDE for coordinate in thing.center)
            objects[row, column] = OBJECTS.index(thing.object if thing in scene.signs else thing.shape)
            colors[row, column] = COLOR_NAMES.index(thing.color)
    for sign in scene.signs:
        x, y = sign.center
        text = torch.tensor([characters.index(character) for character in sign.text])
        words[int(y) // WORD_STRIDE, int(x) // WORD_STRIDE] = text
        if scene.name != "page":
            texts[int(y) // STRIDE, int(x) // STRIDE] = text
        for character, (x, y) in zip(sign.text, sign.centers, strict=True):
            if 0 <= x < scene.width:
                strokes[int(y) // STROKE_STRIDE, 2 * int(x) // STROKE_STRIDE] = 1 + characters.index(character)
    return {"objects": objects, "colors": colors, "texts": texts, "words": words, "strokes": strokes}


def reduce_and_enlarge(pixels: torch.Tensor, ratio: float) -> torch.Tensor:
    """
    What the low-resolution view holds, at the size of the high-resolution one: images `(images, 3, S, S)` reduced to
    `ratio` of their side as the image processor does it, and enlarged bicubically.
    """
    side = round(pixels.shape[-1] * ratio)
    low_res = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=True)
    return F.interpolate(low_res, size=pixels.shape[-2:], mode="bicubic", align_corners=True)


def _reduce_and_enlarge_file(image: bytes, ratio: float) -> bytes:
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(image)))).permute(2, 0, 1)[None].float()
    pixels = reduce_and_enlarge(pixels, ratio)[0].round().clamp(0, 255).byte().permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def make_sample(
    config: FinePrintConfig, folder: Path, shown_ratio: float, item: tuple[str, int]
) -> dict[str, list[dict]]:
    """Draws an image, saves it under `folder` and returns its rows."""
    split, index = item
    image, scene = draw_sample(config, split, index)
    if shown_ratio < 1:
        image = _reduce_and_enlarge_file(image, shown_ratio)
    (folder / f"{split}-{index:07d}.jpg").write_bytes(image)
    return get_rows(split, index, scene, get_rng(config.seed, f"{split}-questions", index))


@dataclass
class FinePrintArguments(FinePrintConfig):
    """Options of the command; the help describes each field."""

    output: str = field(kw_only=True, metadata={"help": "folder to write to"})
    num_train: int = field(default=10000, metadata={"help": "number of training images"})
    num_validation: int = field(default=100, metadata={"help": "number of validation images"})
    num_test: int = field(default=500, metadata={"help": "number of test images"})
    shown_ratio: float = field(default=1.0, metadata={"help": "below 1: images hold a low-resolution view only"})
    workers: int = field(default_factory=count_cores, metadata={"help": "processes that draw; all cores by default"})


def generate(arguments: FinePrintArguments) -> None:
    """
    Writes FinePrint. The row files appear when everything is written.

    Raises:
        ValueError: If `output` holds a finished FinePrint.
    """
    output = Path(arguments.output)
    if (output / "test.jsonl").exists():
        raise ValueError(f"`output`: {output} already holds FinePrint. Name another folder or remove it.")
    folder = output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    config = FinePrintConfig(**{name: getattr(arguments, name) for name in FinePrintConfig.__dataclass_fields__})
    items = [(split, index) for split in SPLITS for index in range(getattr(arguments, f"num_{split}"))]
    rows: dict[str, list[dict]] = {name: [] for name in ("captions", *SPLITS)}
    # spawned, not forked: the parent may have threads
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        samples = pool.imap(partial(make_sample, config, folder, arguments.shown_ratio), items, chunksize=32)
        for sample in tqdm(samples, total=len(items), desc="FinePrint", unit="image"):
            for name, new in sample.items():
                rows[name].extend(new)
    for name, content in rows.items():
        write_text(output / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in content))


def main() -> None:
    """Draws FinePrint."""
    (arguments,) = HfArgumentParser(FinePrintArguments).parse_args_into_dataclasses()
    generate(arguments)


if __name__ == "__main__":
    run_command(main)
