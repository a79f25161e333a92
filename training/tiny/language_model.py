# SPDX-License-Identifier: Apache-2.0
"""
Makes a tiny Llama and its tokenizer from nothing, on FinePrint's texts:

    python -m training.tiny.language_model --output .cache/language-model

A large language model can look up what it is asked for before it sees its first image. This one learns it on
captions and chats about scenes that are told, not drawn: where the tokens of an image will be, it gets for each place
the sum of one embedding each for the kind of object there, its colour and the characters of its text. No image is
involved, and these embeddings are thrown away: that the towers' features say the same is learned in stages 1 and 2.
"""

import copy
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from modeling_llava_hr.processing_llava_hr import (
    IMAGE_TOKEN,
    PLAIN_CHAT_TEMPLATE,
    VICUNA_V1_CHAT_TEMPLATE,
    get_chat_template,
)
from modeling_llava_hr.utils import run_command
from training.tiny.fineprint import (
    COLOR_NAMES,
    IGNORED,
    OBJECTS,
    SCENES,
    SHAPES,
    STRIDE,
    TEXT_LENGTH,
    FinePrintConfig,
    Painter,
    Scene,
    Shape,
    Sign,
    get_caption,
    get_questions,
    get_rng,
    get_targets,
)
from training.tiny.optimization import fit


# Standard deviation of all weights. With 0.02 the loss stays flat in such short training.
INITIALIZER_RANGE = 0.07


@dataclass
class PretrainLanguageModelArguments:
    """Options of the command; the help describes each field."""

    output: str = field(metadata={"help": "folder for model and tokenizer"})
    size: int = field(default=256, metadata={"help": "side of the largest images: 64 pixels times a power of 2"})
    max_signs: int = field(default=4, metadata={"help": "largest number of texts in an image"})
    alphabet: str = field(default="digits", metadata={"help": "digits or alphanumeric"})
    vocab_size: int = field(default=960, metadata={"help": "largest size of the vocabulary"})
    width: int = field(default=128, metadata={"help": "channels"})
    layers: int = field(default=4, metadata={"help": "number of layers"})
    # Four narrow heads did not learn to select the right text within the steps that were tried
    heads: int = field(default=2, metadata={"help": "number of attention heads"})
    steps: int = field(default=600, metadata={"help": "number of steps"})
    batch_size: int = field(default=64, metadata={"help": "texts a step"})
    learning_rate: float = field(default=4e-3, metadata={"help": "highest learning rate"})
    device: str = field(default="cpu", metadata={"help": "where to train"})
    seed: int = field(default=0, metadata={"help": "of weights and texts"})


def make_scene(painter: Painter, grid: int, max_signs: int, rng: np.random.Generator) -> Scene:
    """
    A scene of `32 * grid` pixels that nobody drew: up to `max_signs` texts and some shapes, each in one of `grid` x
    `grid` places. `painter` makes up the texts, those of training images.
    """
    name = str(rng.choice(list(SCENES)))
    carrier, painter.form = SCENES[name]
    places = [(STRIDE * (x + 0.5), STRIDE * (y + 0.5)) for x in range(grid) for y in range(grid)]
    free = iter([places[index] for index in rng.permutation(len(places))])
    colors, shapes = (iter(rng.permutation(COLOR_NAMES).tolist()), iter(rng.permutation(SHAPES).tolist()))
    num_shapes = int(rng.integers(0, min(2, grid - 1) + 1))
    num_signs = int(rng.integers(1, min(max_signs, grid**2 - 1) + 1))
    signs = []
    for _ in range(num_signs):
        place = next(free)
        signs.append(Sign(painter.get_text(), next(colors), carrier, place, [place] * TEXT_LENGTH))
    return Scene(
        name,
        STRIDE * grid,
        STRIDE * grid,
        signs,
        [Shape(next(shapes), next(colors), next(free)) for _ in range(num_shapes)],
    )


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer of at most `vocab_size` tokens: frequent words of `texts` are one token, each digit is
    one. It has Llama's special tokens and pads on the left with `<unk>`, as Vicuna's does.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def get_messages(scene: Scene, rng: np.random.Generator) -> list[dict]:
    """
    A chat about a scene: one question, or all of them in random order. From the latter alone little is learned about
    what is asked for, since a text that was told needs no telling again.
    """
    questions = get_questions(scene)
    messages: list[dict] = []
    for number in rng.permutation(len(questions))[: 1 if rng.random() < 0.5 else None]:
        _, question, answer = questions[number]
        messages.append({"role": "user", "content": question if messages else f"{IMAGE_TOKEN}\n{question}"})
        messages.append({"role": "assistant", "content": answer})
    return messages


def encode(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict], template: str, num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """
    A chat about an image of `num_image_tokens` tokens as the model will get it: token ids, and labels, which are -100
    for everything but answers. `tokenizer` knows `<image>`; `template` is the chat template of a stage.
    """
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, is_answer = encoded["input_ids"], encoded["assistant_masks"]
    labels = [token if answer else IGNORED for token, answer in zip(ids, is_answer, strict=True)]
    image = ids.index(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    ids, labels = (v[:image] + [v[image]] * num_image_tokens + v[image + 1 :] for v in (ids, labels))
    return ids, labels


class SceneEmbedding(nn.Module):
    """
    Stands for towers and projector: tells the language model what is where.

    Args:
        num_characters (`int`): Size of the texts' alphabet.
        width (`int`): Channels of the language model.
    """

    def __init__(self, num_characters: int, width: int):
        super().__init__()
        self.objects = nn.Embedding(len(OBJECTS), width)
        self.colors = nn.Embedding(1 + len(COLOR_NAMES), width)
        self.texts = nn.ModuleList(nn.Embedding(1 + num_characters, width) for _ in range(TEXT_LENGTH))
        self.place = nn.Linear(2, width)
        with torch.no_grad():  # objects and colours must stand out from the many characters
            self.objects.weight.mul_(3)
            self.colors.weight.mul_(3)

    def forward(self, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        """Maps of `get_targets` of shape `(scenes, g, g)`, texts `(scenes, g, g, 4)` -> `(scenes * g * g, d)`."""
        grid = targets["objects"].shape[1]
        known = {name: target.clamp(min=-1) + 1 for name, target in targets.items()}  # 0: none
        line = torch.linspace(-1, 1, grid, device=targets["objects"].device)
        place = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)
        embedded = self.objects(targets["objects"]) + self.colors(known["colors"]) + self.place(place)
        for index, table in enumerate(self.texts):
            embedded = embedded + table(known["texts"][..., index])
        return embedded.flatten(0, 2)


def get_batch(
    tokenizer: PreTrainedTokenizerFast,
    painter: Painter,
    grid: int,
    max_signs: int,
    rng: np.random.Generator,
    count: int,
) -> dict:
    """
    Chats and captions (an eighth) about `count` new scenes of one size; see [`make_scene`].

    Returns:
        `dict`: `input_ids`, `attention_mask` and `labels` of shape `(count, tokens)`, and `targets`, the maps of
        [`get_targets`].
    """
    scenes = [make_scene(painter, grid, max_signs, rng) for _ in range(count)]
    targets = [get_targets(scene, painter.config.characters) for scene in scenes]
    maps = {name: torch.stack([target[name] for target in targets]) for name in ("objects", "colors", "texts")}
    texts = []
    for number, scene in enumerate(scenes):
        if number % 8 == 0:
            caption = get_caption(scene, with_texts=True)
            messages, template = [{"role": "user"}, {"role": "assistant", "content": caption}], PLAIN_CHAT_TEMPLATE
        else:
            messages, template = get_messages(scene, rng), VICUNA_V1_CHAT_TEMPLATE
        texts.append(encode(tokenizer, messages, get_chat_template(tokenizer, template), grid**2))
    length = max(len(ids) for ids, _ in texts)
    input_ids = torch.full((count, length), tokenizer.pad_token_id)
    labels = torch.full((count, length), IGNORED)
    for row, (ids, label) in enumerate(texts):
        input_ids[row, : len(ids)], labels[row, : len(ids)] = torch.tensor(ids), torch.tensor(label)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != tokenizer.pad_token_id).long(),
        "labels": labels,
        "targets": maps,
    }


def pretrain(arguments: PretrainLanguageModelArguments) -> dict[str, float]:
    """
    Trains model and tokenizer and saves both.

    Returns:
        `dict[str, float]`: Mean losses of the first and last ten steps, and the share of characters of texts that are
        right in the latter, each given those before it.
    """
    set_seed(arguments.seed)
    config = FinePrintConfig(size=arguments.size, alphabet=arguments.alphabet, seed=arguments.seed + 2)
    painter = Painter(config, "train", get_rng(config.seed, "train", 0))
    rng = get_rng(config.seed, "train", 1)
    scenes = [make_scene(painter, arguments.size // STRIDE, arguments.max_signs, rng) for _ in range(500)]
    words = [question for scene in scenes for _, *pair in get_questions(scene) for question in pair]
    words += [get_caption(scene, with_texts=False) for scene in scenes]
    system = make_tokenizer([], 300).apply_chat_template(
        [{"role": "user", "content": ""}],
        chat_template=VICUNA_V1_CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    tokenizer = make_tokenizer([*words, *[system.removeprefix("<s>")] * 50], arguments.vocab_size)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-(len(tokenizer) + 1) // 64) * 64,
            hidden_size=arguments.width,
            intermediate_size=3 * arguments.width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.heads,
            max_position_embeddings=2048,
            initializer_range=INITIALIZER_RANGE,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    eye = SceneEmbedding(len(config.characters), arguments.width)
    records = _train(arguments, nn.ModuleDict({"model": model, "eye": eye}), tokenizer, painter, rng)
    model.to("cpu", torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    first, last = (part.nanmean(0).tolist() for part in (records[:10], records[-10:]))
    return {"first_loss": first[0], "last_loss": last[0], "last_characters": last[1]}


def _train(
    arguments: PretrainLanguageModelArguments,
    modules: nn.ModuleDict,
    tokenizer: PreTrainedTokenizerFast,
    painter: Painter,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Returns the loss and the share of right characters of each step, `(steps, 2)`."""
    model: Any = modules.to(arguments.device)["model"]
    tokenizer = copy.deepcopy(tokenizer)  # the saved one gets `<image>` when a model is assembled
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    characters = torch.tensor(
        tokenizer.convert_tokens_to_ids(list(painter.config.characters)), device=arguments.device
    )
    grids = [2 * 2**power for power in range((arguments.size // 64).bit_length())]
    records = []

    def get_loss(step: int) -> torch.Tensor:
        # half of the steps use the smallest grid, where the model learns to look things up
        later = 2 * step / arguments.steps - 1
        number = 0 if later < 0 else min(1 + int(later * (len(grids) - 1)), len(grids) - 1)
        # a grid above 8 x 8 doubles the sequence and more: half as many texts for each doubling
        count = max(1, min(arguments.batch_size, arguments.batch_size * 8 // grids[number]))
        batch = get_batch(tokenizer, painter, grids[number], arguments.max_signs, rng, count)
        targets = {name: target.to(arguments.device) for name, target in batch.pop("targets").items()}
        input_ids, mask, labels = (value.to(arguments.device) for value in batch.values())
        embeds = model.get_input_embeddings()(input_ids)
        is_image = (input_ids == image)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(is_image, modules["eye"](targets).to(embeds.dtype))
        output = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
        is_character = torch.isin(labels[:, 1:], characters)
        right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:])[is_character].float().mean()
        records.append(torch.stack([output.loss.detach().float(), right]))
        return output.loss

    fit("language model", modules, arguments.steps, arguments.learning_rate, 0.01, 0.05, get_loss)
    return torch.stack(records).cpu()


def main() -> None:
    """Trains the language model, and prints its figures."""
    (arguments,) = HfArgumentParser(PretrainLanguageModelArguments).parse_args_into_dataclasses()
    print(json.dumps(pretrain(arguments)))


if __name__ == "__main__":
    run_command(main)
