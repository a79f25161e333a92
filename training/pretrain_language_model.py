# Copyright 2026 The LLaVA-HR for transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Makes a tiny Llama and its tokenizer from nothing, on FinePrint's texts:

    python -m training.pretrain_language_model --output .cache/language-model

It reads descriptions of scenes, and chats in which the description stands where later the picture will be, so that it
learns the words, the form of a chat, and to look an answer up in what precedes the question.
"""

import json
import sys
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from modeling_llava_hr.processing_llava_hr import VICUNA_V1_CHAT_TEMPLATE
from training.fineprint import FinePrintConfig, Painter, Scene, get_caption, get_questions, get_rng
from training.optimizers import get_optimizers


# Of all weights. 0.02 stays flat within such short training.
INITIALIZER_RANGE = 0.07


@dataclass
class PretrainLanguageModelArguments:
    """
    What is trained, how long, and where to.

    Args:
        output (`str`): Folder for model and tokenizer.
        size (`int`): Side of the pictures that are described, in pixels.
        max_signs (`int`): Largest number of texts in a picture.
        alphabet (`str`): See [`~training.fineprint.FinePrintConfig`].
        num_scenes (`int`): Number of described pictures.
        vocab_size (`int`): Largest size of the vocabulary.
        width, layers, heads (`int`): Of the Llama.
        steps (`int`): Number of steps; 0 for a tokenizer and a Llama that has learned nothing.
        batch_size (`int`): Texts a step.
        learning_rate (`float`): Highest learning rate (warm-up, cosine).
        device (`str`): Where to train.
        seed (`int`): Of weights and texts.
    """

    output: str = field(default="", metadata={"help": "folder for model and tokenizer"})
    size: int = field(default=192, metadata={"help": "side of the pictures that are described, in pixels"})
    max_signs: int = field(default=4, metadata={"help": "largest number of texts in a picture"})
    alphabet: str = field(default="digits", metadata={"help": "digits or alphanumeric"})
    num_scenes: int = field(default=4000, metadata={"help": "number of described pictures"})
    vocab_size: int = field(default=960, metadata={"help": "largest size of the vocabulary"})
    width: int = field(default=128, metadata={"help": "channels"})
    layers: int = field(default=4, metadata={"help": "number of layers"})
    heads: int = field(default=4, metadata={"help": "number of attention heads"})
    steps: int = field(default=300, metadata={"help": "number of steps"})
    batch_size: int = field(default=32, metadata={"help": "texts a step"})
    learning_rate: float = field(default=2e-3, metadata={"help": "highest learning rate"})
    device: str = field(default="cpu", metadata={"help": "where to train"})
    seed: int = field(default=0, metadata={"help": "of weights and texts"})


def get_scenes(arguments: PretrainLanguageModelArguments) -> list[Scene]:
    """What FinePrint's training pictures show, without blur, noise and file."""
    config = FinePrintConfig(
        size=arguments.size, max_signs=arguments.max_signs, alphabet=arguments.alphabet, seed=arguments.seed + 2
    )
    numbers = tqdm(range(arguments.num_scenes), desc="scenes", unit="scene")
    return [Painter(config, "train", get_rng(config.seed, "train", number)).paint()[1] for number in numbers]


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer: frequent words are one token, each digit is one.

    Args:
        texts (`list[str]`): What its words are taken from.
        vocab_size (`int`): Largest number of tokens.

    Returns:
        `PreTrainedTokenizerFast`: With Llama's special tokens; pads on the left with `<unk>`, as Vicuna's does.
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


def get_texts(tokenizer: PreTrainedTokenizerFast, scene: Scene, order: torch.Generator) -> tuple[str, str]:
    """
    The two texts of a scene, in the forms of stage 1 ("plain") and stage 2 ("vicuna_v1").

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Has the special tokens.
        scene ([`~training.fineprint.Scene`]): What is described.
        order (`torch.Generator`): Order of the questions.

    Returns:
        `tuple[str, str]`: Caption, and a chat about it.
    """
    caption = get_caption(scene, with_texts=True)
    questions = get_questions(scene)
    messages = []
    for number in torch.randperm(len(questions), generator=order).tolist():
        _, question, answer = questions[number]
        start = "" if messages else f"{caption}\n"
        messages.append({"role": "user", "content": start + question})
        messages.append({"role": "assistant", "content": answer})
    chat = tokenizer.apply_chat_template(messages, chat_template=VICUNA_V1_CHAT_TEMPLATE, tokenize=False)
    return f"{tokenizer.bos_token}{caption}\n", chat


def pretrain(arguments: PretrainLanguageModelArguments) -> dict[str, float]:
    """Trains model and tokenizer, saves both, and returns the mean losses of the first and last ten steps, if any."""
    set_seed(arguments.seed)
    scenes = get_scenes(arguments)
    order = torch.Generator().manual_seed(arguments.seed)
    words = [question for scene in scenes[:500] for _, *pair in get_questions(scene) for question in pair]
    words += [get_caption(scene, with_texts=False) for scene in scenes[:500]]
    system = make_tokenizer([], 300).apply_chat_template(
        [{"role": "user", "content": ""}],
        chat_template=VICUNA_V1_CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    tokenizer = make_tokenizer([*words, *[system.removeprefix("<s>")] * 50], arguments.vocab_size)
    texts = [text for scene in scenes for text in get_texts(tokenizer, scene, order)]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=-(-len(tokenizer) // 64) * 64,
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
    ).to(arguments.device)
    losses = _train(arguments, model, tokenizer, texts) if arguments.steps else []
    model.cpu().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    return {
        name: sum(part) / len(part)
        for name, part in zip(("first_loss", "last_loss"), (losses[:10], losses[-10:]), strict=True)
        if part
    }


def _train(arguments, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[float]:
    optimizers = get_optimizers(model, arguments.learning_rate, weight_decay=0.01)
    warmup = arguments.steps // 10
    schedulers = [get_cosine_schedule_with_warmup(optimizer, warmup, arguments.steps) for optimizer in optimizers]
    losses = []
    bar = tqdm(range(arguments.steps), desc="language model", unit="step")
    for _ in bar:
        chosen = [texts[index] for index in torch.randint(len(texts), (arguments.batch_size,)).tolist()]
        inputs = tokenizer(chosen, padding=True, add_special_tokens=False, return_tensors="pt").to(arguments.device)
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        with torch.autocast(torch.device(arguments.device).type, torch.bfloat16):
            loss = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedulers):
            part.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def main() -> None:
    (arguments,) = HfArgumentParser(PretrainLanguageModelArguments).parse_args_into_dataclasses()
    if not arguments.output:
        sys.exit("error: --output must name the folder for model and tokenizer.")
    print(json.dumps(pretrain(arguments)))


if __name__ == "__main__":
    main()
