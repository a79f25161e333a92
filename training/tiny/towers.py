# SPDX-License-Identifier: Apache-2.0
"""
Makes the two towers of a tiny LLaVA-HR from nothing, on FinePrint images that are drawn on the way:

    python -m training.tiny.towers --output .cache/towers --tokenizer .cache/language-model

Both towers learn from captions as CLIP does (open_clip's `ClipLoss`). A ConvNeXt does not learn to read from that
alone, so beside it the high-resolution tower learns to tell what lies at each of its positions (kind, colour, the
characters of a text), first on parts of 64 pixels, which are cheap.

`towers.json` says which share of unseen texts the high-resolution tower reads; with `--blind` it sees, in training and
test, the same images reduced to the low-resolution view and enlarged again.
"""

import io
import json
import multiprocessing
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, HfArgumentParser, PreTrainedTokenizerFast, set_seed
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_llava_hr.utils import run_command
from training.tiny.fineprint import (
    COLOR_NAMES,
    IGNORED,
    OBJECTS,
    TEXT_LENGTH,
    FinePrintConfig,
    Scene,
    Shape,
    Sign,
    count_cores,
    draw_sample,
    get_caption,
    get_rng,
    get_targets,
    reduce_and_enlarge,
)
from training.tiny.optimization import fit


# timm's name; widths and depths are ours. The conversion reads them from the weights.
ARCHITECTURE = "convnext_tiny"
CUT = 64  # side in pixels of the image crops that reading starts with


@dataclass
class PretrainTowersArguments:
    """Options of the command; the help describes each field."""

    output: str = field(metadata={"help": "folder for the results"})
    tokenizer: str = field(metadata={"help": "folder with the tokenizer of the captions"})
    size: int = field(default=256, metadata={"help": "side of the second part's images in pixels"})
    max_signs: int = field(default=4, metadata={"help": "largest number of texts in the second part's images"})
    alphabet: str = field(default="digits", metadata={"help": "digits or alphanumeric"})
    low_res_ratio: float = field(default=0.21875, metadata={"help": "low-resolution by high-resolution side"})
    depths: list[int] = field(default_factory=lambda: [1, 2, 6, 1], metadata={"help": "high-resolution tower"})
    dims: list[int] = field(default_factory=lambda: [32, 64, 128, 256], metadata={"help": "high-resolution tower"})
    vision_width: int = field(default=128, metadata={"help": "channels of the low-resolution tower"})
    vision_layers: int = field(default=8, metadata={"help": "layers of the low-resolution tower, a multiple of 4"})
    patch_size: int = field(default=7, metadata={"help": "patches of the low-resolution tower, in pixels"})
    num_images: int = field(default=12000, metadata={"help": "different images of each part; half as many pages"})
    num_test: int = field(default=1000, metadata={"help": "test images of the first part; a quarter in the second"})
    reading_steps: int = field(default=1400, metadata={"help": "steps of the first part"})
    joint_steps: int = field(default=120, metadata={"help": "steps of the second part"})
    reading_batch_size: int = field(default=64, metadata={"help": "images a step in the first part"})
    joint_batch_size: int = field(default=32, metadata={"help": "images a step in the second part"})
    learning_rate: float = field(default=2e-3, metadata={"help": "highest learning rate"})
    blind: bool = field(default=False, metadata={"help": "the high-resolution tower sees the enlarged low-res view"})
    device: str = field(default="cpu", metadata={"help": "where to train"})
    workers: int = field(default_factory=count_cores, metadata={"help": "processes that draw; all cores by default"})
    seed: int = field(default=0, metadata={"help": "of weights and images"})


def crop(pixels: np.ndarray, scene: Scene, side: int, rng: np.random.Generator) -> tuple[np.ndarray, Scene]:
    """
    Cuts a square of `side` pixels out of `(3, S, S)`, with the first text somewhere in it: at any place within the
    tower's positions of 32 pixels. Small images alone have their text near the middle, and a reader that knew only
    those would read nothing else. Returns `(3, side, side)` and what it shows: objects whose centre is inside.
    """
    x, y = scene.signs[0].center
    limit = scene.width - side
    left = int(np.clip(x - rng.uniform(18, side - 18), 0, limit))
    top = int(np.clip(y - rng.uniform(8, side - 8), 0, limit))

    def move(center: tuple[float, float]) -> tuple[float, float]:
        return center[0] - left, center[1] - top

    def is_inside(thing: Sign | Shape) -> bool:
        return all(0 <= coordinate < side for coordinate in move(thing.center))

    signs = [
        sign._replace(center=move(sign.center), centers=[move(center) for center in sign.centers])
        for sign in filter(is_inside, scene.signs)
    ]
    shapes = [shape._replace(center=move(shape.center)) for shape in filter(is_inside, scene.shapes)]
    return pixels[:, top : top + side, left : left + side], Scene(scene.name, side, side, signs, shapes)


def draw_one(config: FinePrintConfig, split: str, page: bool, side: int | None, index: int) -> dict:
    """An image, `pixels` `(3, S, S)` of uint8, with its `caption` and targets, all as NumPy arrays."""
    image, scene = draw_sample(config, split, index, page)
    pixels = np.array(Image.open(io.BytesIO(image))).transpose(2, 0, 1)
    if side is not None:
        pixels, scene = crop(pixels, scene, side, get_rng(config.seed, f"{split}-crops", index))
    targets = {name: target.numpy() for name, target in get_targets(scene, config.characters).items()}
    return {"pixels": pixels, "caption": get_caption(scene, with_texts=False), **targets}


def draw_images(
    config: FinePrintConfig, split: str, number: int, workers: int, page: bool = False, side: int | None = None
) -> dict:
    """
    Draws images and keeps them in memory.

    Args:
        config, split, number: What they look like, whose texts they show, how many they are.
        workers (`int`): Processes that draw; 0 for this one.
        page (`bool`, *optional*, defaults to `False`): Whether they are full of texts instead of scenes.
        side (`int`, *optional*): Side of the cut in pixels, if only a part of each is wanted, see [`crop`].

    Returns:
        `dict`: `pixels` `(number, 3, S, S)` of uint8, the targets of [`get_targets`], and the list `captions`.
    """
    with ExitStack() as stack:
        do: Callable[..., Iterable[dict]] = map
        if workers:
            # spawned, not forked: the parent has threads
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            do = partial(pool.imap, chunksize=64)
        stream = do(partial(draw_one, config, split, page, side), range(number))
        title = "pages" if page else f"images of {config.size}"
        drawn = list(tqdm(stream, total=number, desc=title, unit="image"))
    names = [name for name in drawn[0] if name != "caption"]
    images = {name: torch.from_numpy(np.stack([one[name] for one in drawn])) for name in names}
    return {**images, "captions": [one["caption"] for one in drawn]}


def take(images: dict, indices: torch.Tensor, device: str) -> dict:
    """Selects drawn images and normalises their pixels."""
    batch = {name: values[indices].to(device) for name, values in images.items() if name != "captions"}
    pixels = normalize(batch.pop("pixels"))
    return {"pixels": pixels, "captions": [images["captions"][index] for index in indices.tolist()], **batch}


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """`(images, 3, S, S)` of 8-bit values -> the same in float32, normalised as CLIP's images are."""
    mean, std = (pixels.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels.float() / 255 - mean) / std


def get_low_res_view(pixels: torch.Tensor, ratio: float) -> torch.Tensor:
    """The view of the low-resolution pathway, as the image processor makes it: `(images, 3, r * S, r * S)`."""
    side = round(pixels.shape[-1] * ratio)
    return F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=True)


class Reader(nn.Module):
    """
    High-resolution tower with the heads of the reading objective.

    Args:
        depths, dims (`list[int]`): Blocks and channels of the four stages.
        num_characters (`int`): Size of the texts' alphabet.
    """

    def __init__(self, depths: list[int], dims: list[int], num_characters: int):
        super().__init__()
        self.num_characters = num_characters
        # Layer scale starts at 1: with timm's 1e-6 the tower does not learn to read in such short training
        self.tower = timm.create_model(
            ARCHITECTURE, pretrained=False, num_classes=0, depths=depths, dims=dims, ls_init_value=1.0
        )
        self.tower.head = nn.Identity()
        self.norm, self.word_norm, self.stroke_norm = (nn.LayerNorm(dims[stage]) for stage in (3, 2, 1))
        sizes = (len(OBJECTS), len(COLOR_NAMES), TEXT_LENGTH * num_characters)
        self.heads = nn.ModuleList(nn.Linear(dims[-1], size) for size in sizes)
        self.word_head = nn.Linear(dims[2], TEXT_LENGTH * num_characters)
        self.stroke_head = nn.Linear(dims[1], 2 * (1 + num_characters))

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """`(images, 3, S, S)` -> `features` `(images, S / 32, S / 32, C)` and, by their names, scores for targets."""
        _, strokes, words, features = self.tower.forward_intermediates(pixels, intermediates_only=True)
        features = features.permute(0, 2, 3, 1)
        normed = self.norm(features)
        objects, colors, texts = (head(normed) for head in self.heads)
        words = self.word_head(self.word_norm(words.permute(0, 2, 3, 1)))
        strokes = self.stroke_head(self.stroke_norm(strokes.permute(0, 2, 3, 1)))
        return {
            "features": features,
            "objects": objects,
            "colors": colors,
            "texts": texts.unflatten(-1, (TEXT_LENGTH, self.num_characters)),
            "words": words.unflatten(-1, (TEXT_LENGTH, self.num_characters)),
            "strokes": strokes.unflatten(-1, (2, -1)).flatten(2, 3),  # two columns for each position
        }


def get_reading_loss(scores: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Cross entropies of [`get_targets`]'s targets, summed. Characters on the finer map count as much as whole texts, and
    the many positions there that have none a quarter of it.
    """

    def cross_entropy(name: str, target: torch.Tensor) -> torch.Tensor:
        score = scores[name].float().flatten(0, -2)
        number = (target != IGNORED).sum().clamp(min=1)
        return F.cross_entropy(score, target.flatten(), ignore_index=IGNORED, reduction="sum") / number

    strokes = targets["strokes"]
    return (
        cross_entropy("objects", targets["objects"])
        + cross_entropy("colors", targets["colors"])
        + cross_entropy("texts", targets["texts"])
        + cross_entropy("words", targets["words"])
        + cross_entropy("strokes", strokes.masked_fill(strokes == 0, IGNORED))
        + 0.25 * cross_entropy("strokes", strokes.masked_fill(strokes != 0, IGNORED))
    )


def count_texts_read(scores: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Number of texts that are read exactly, and number of texts."""
    is_text = targets["texts"][..., 0] != IGNORED
    is_right = (scores["texts"].argmax(-1) == targets["texts"]).all(-1)
    return int((is_right & is_text).sum()), int(is_text.sum())


class Towers(nn.Module):
    """Reader, CLIP model and the high-resolution tower's projection into CLIP's space."""

    def __init__(self, reader: Reader, clip: CLIPModel):
        super().__init__()
        self.reader, self.clip = reader, clip
        channels, dim = reader.norm.normalized_shape[0], clip.config.projection_dim
        self.projection = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, dim))
        self.loss = ClipLoss()

    def forward(
        self, high_res: torch.Tensor, low_res: torch.Tensor, text: dict[str, torch.Tensor], targets: dict
    ) -> torch.Tensor:
        """Views `(images, 3, S, S)` and `(images, 3, L, L)`, captions and targets -> the loss."""
        scores = self.reader(high_res)
        texts = F.normalize(self.clip.get_text_features(**text).pooler_output.float(), dim=-1)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        vit = self.clip.get_image_features(pixel_values=low_res, interpolate_pos_encoding=True).pooler_output
        cnn = self.projection(scores["features"].mean(dim=(1, 2)))
        contrastive = sum(self.loss(F.normalize(image.float(), dim=-1), texts, scale) for image in (vit, cnn))
        return get_reading_loss(scores, targets) + contrastive


def make_clip(arguments: PretrainTowersArguments, vocab_size: int, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP model with heads of 64 channels."""
    width = arguments.vision_width
    common = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    vision = {
        **common,
        "num_hidden_layers": arguments.vision_layers,
        "patch_size": arguments.patch_size,
        "image_size": round(arguments.size * arguments.low_res_ratio),
        # `fusion` of the assembled model inherits it; with 0.02 the loss stays flat in such short training
        "initializer_range": 0.07,
    }
    text = {
        **common,
        "num_hidden_layers": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=width))


def train(
    arguments: PretrainTowersArguments,
    name: str,
    model: nn.Module,
    learning_rate: float,
    steps: int,
    batch_size: int,
    choose: Callable[[int], dict],
    get_loss: Callable[[dict], torch.Tensor],
) -> None:
    """
    Trains a model on drawn images.

    Args:
        arguments ([`PretrainTowersArguments`]): Device.
        name, model, learning_rate, steps: See [`~training.tiny.optimization.fit`].
        batch_size (`int`): Images per step, if they have 64 x 64 pixels; larger ones are fewer, of the same area.
        choose (`Callable`): From the number of a step to the images it takes its batch from.
        get_loss (`Callable`): From a batch to its loss.
    """
    model.to(arguments.device).to(memory_format=torch.channels_last).train()

    def get_loss_of_step(step: int) -> torch.Tensor:
        images = choose(step)
        number = batch_size * CUT**2 // images["pixels"][0, 0].numel()
        return get_loss(take(images, torch.randint(len(images["pixels"]), (number,)), arguments.device))

    fit(name, model, steps, learning_rate, 0.02, 0.1, get_loss_of_step)


def show(arguments: PretrainTowersArguments, pixels: torch.Tensor, blind: bool) -> torch.Tensor:
    """Input of the high-resolution tower: the images, or only what the low-resolution view contains."""
    pixels = reduce_and_enlarge(pixels, arguments.low_res_ratio) if blind else pixels
    return pixels.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate_reader(arguments: PretrainTowersArguments, reader: Reader, images: dict, blind: bool) -> dict:
    """
    Counts the texts that a reader reads without a fault in images of [`draw_images`]; with `blind` it sees what the
    low-resolution view holds. Returns `texts_read`, the share, and `num_texts`.
    """
    reader.eval()
    read, total = 0, 0
    for indices in torch.arange(len(images["pixels"])).split(64):
        batch = take(images, indices, arguments.device)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
            counts = count_texts_read(reader(show(arguments, batch["pixels"], blind)), batch)
        read, total = read + counts[0], total + counts[1]
    return {"texts_read": round(read / total, 4), "num_texts": total}


def train_reader(arguments: PretrainTowersArguments, blind: bool) -> tuple[Reader, dict]:
    """
    Trains a reader: first on pages full of texts, which teach the characters, then on parts of scenes, 64 pixels wide
    with one text, and at last on whole scenes of 128 pixels with several as well; every eighth step is on pages all
    the time. It is tested on whole images. With `blind` it sees what the low-resolution view holds.

    Returns:
        `tuple`: The reader, and the share of unseen texts that it reads.
    """
    set_seed(arguments.seed)
    config = FinePrintConfig(size=2 * CUT, max_signs=4, alphabet=arguments.alphabet, seed=arguments.seed)
    one, number, workers = replace(config, max_signs=1), arguments.num_images, arguments.workers
    pages = draw_images(replace(config, size=CUT), "train", number // 2, workers, page=True)
    parts = draw_images(one, "train", number, workers, side=CUT)
    scenes = draw_images(config, "train", number // 2, workers)
    reader = Reader(arguments.depths, arguments.dims, len(config.characters))
    steps = arguments.reading_steps

    def choose(step: int) -> dict:
        if step < 0.3 * steps or step % 8 == 0:
            return pages
        return parts if step < 0.6 * steps or step % 4 == 1 else scenes

    def get_loss(batch: dict) -> torch.Tensor:
        return get_reading_loss(reader(show(arguments, batch["pixels"], blind)), batch)

    name = "reading, low-resolution view" if blind else "reading"
    train(arguments, name, reader, arguments.learning_rate, steps, arguments.reading_batch_size, choose, get_loss)
    test = draw_images(one, "test", arguments.num_test, workers)
    return reader, evaluate_reader(arguments, reader, test, blind)


def pretrain(arguments: PretrainTowersArguments) -> dict:
    """Trains both towers and writes `vision_tower/` (a CLIP model) and `high_res_tower/` (timm's names)."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)  # first, so that a broken one is reported at once
    reader, result = train_reader(arguments, arguments.blind)
    clip = make_clip(arguments, len(tokenizer), tokenizer)
    towers = Towers(reader, clip)
    config = FinePrintConfig(
        arguments.size, 1, arguments.max_signs, alphabet=arguments.alphabet, seed=arguments.seed + 1
    )
    number = min(arguments.num_images, arguments.joint_steps * arguments.joint_batch_size)
    images = draw_images(config, "train", number, arguments.workers)

    def get_loss(batch: dict) -> torch.Tensor:
        captions = [f"{tokenizer.bos_token}{caption}{tokenizer.eos_token}" for caption in batch["captions"]]
        text = tokenizer(captions, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
        text = {name: text[name].to(arguments.device) for name in ("input_ids", "attention_mask")}
        low_res = get_low_res_view(batch["pixels"], arguments.low_res_ratio)
        return towers(show(arguments, batch["pixels"], arguments.blind), low_res, text, batch)

    # at the first part's rate it would forget how to read
    rate, batch_size = 0.2 * arguments.learning_rate, arguments.joint_batch_size * (arguments.size // CUT) ** 2
    name, steps = "reading and captions", arguments.joint_steps
    train(arguments, name, towers, rate, steps, batch_size, lambda step: images, get_loss)
    test = draw_images(config, "test", arguments.num_test // 4, arguments.workers)
    result["in_scenes"] = evaluate_reader(arguments, reader, test, arguments.blind)
    output = Path(arguments.output)
    (output / "high_res_tower").mkdir(parents=True, exist_ok=True)
    towers.to("cpu", torch.bfloat16)
    state_dict = {name: tensor.contiguous() for name, tensor in reader.tower.state_dict().items()}
    save_file(state_dict, output / "high_res_tower" / "model.safetensors", metadata={"format": "pt"})
    (output / "high_res_tower" / "config.json").write_text(json.dumps({"architecture": ARCHITECTURE}) + "\n")
    clip.save_pretrained(output / "vision_tower")
    return result


def main() -> None:
    """Trains the towers; the figures are printed and written last."""
    (arguments,) = HfArgumentParser(PretrainTowersArguments).parse_args_into_dataclasses()
    result = json.dumps(pretrain(arguments), indent=2)
    (Path(arguments.output) / "towers.json").write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    run_command(main)
