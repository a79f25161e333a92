# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_llava_hr import LlavaHrImageProcessorPil, LlavaHrProcessor
from modeling_llava_hr.processing_llava_hr import IMAGE_TOKEN, get_chat_template
from training.tiny import fineprint
from training.tiny.fineprint import IGNORED, FinePrintConfig, Painter, get_questions, get_rng, get_targets
from training.tiny.language_model import (
    SceneEmbedding,
    encode,
    get_messages,
    make_scene,
)


CHARACTERS = FinePrintConfig().characters


@pytest.fixture(scope="module")
def scenes():
    """Scenes of 4 x 4 places with up to four texts."""
    painter = Painter(FinePrintConfig(), "train", get_rng(0, "train", 0))
    rng = np.random.default_rng(0)
    return [make_scene(painter, 4, 4, rng) for _ in range(200)]


@pytest.fixture
def tokenizer(language_model):
    return AutoTokenizer.from_pretrained(language_model[0])


def test_loss_falls(language_model):
    _, losses = language_model
    assert losses["last_loss"] < 0.6 * losses["first_loss"]


def test_every_digit_is_a_token_and_known_words_are_one(tokenizer):
    assert tokenizer.tokenize("4.71") == ["4", ".", "7", "1"]
    assert len(tokenizer.tokenize("What does the sign say")) == 5


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("What does the red sign say?", "Où est le tücher? 日本\n\t{}", " 4711  "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_chat_is_what_the_processor_makes_of_it(tokenizer, scenes):
    """Token ids and labels equal those of a training sample with a image of as many tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    messages = get_messages(scenes[0], np.random.default_rng(1))
    ids, labels = encode(tokenizer, messages, get_chat_template(tokenizer), 16)

    image_processor = LlavaHrImageProcessorPil(size=128, low_res_size=28, patch_size=7)
    processor = LlavaHrProcessor(image_processor, tokenizer)
    text = [{"type": "text", "text": messages[0]["content"].removeprefix(f"{IMAGE_TOKEN}\n")}]
    first = {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (128, 128))}, *text]}
    expected = processor.apply_chat_template([[first, *messages[1:]]], tokenize=True, return_dict=True)
    assert ids == list(expected["input_ids"][0])
    answers = tokenizer.decode([label for label in labels if label != IGNORED])
    assert answers == "".join(f" {message['content']}</s>" for message in messages[1::2])


def test_scenes_show_training_texts_each_in_its_place(scenes):
    for scene in scenes:
        assert 1 <= len(scene.signs) <= 4 and len(scene.shapes) <= 2
        assert {fineprint.get_split(sign.text) for sign in scene.signs} == {"train"}
        assert {sign.object for sign in scene.signs} == {fineprint.SCENES[scene.name][0]}
        things = [*scene.signs, *scene.shapes]
        assert len({thing.center for thing in things}) == len({thing.color for thing in things}) == len(things)
    assert {len(scene.signs) for scene in scenes} == {1, 2, 3, 4}


def test_chats_ask_one_question_or_all(scenes):
    rng, alone = np.random.default_rng(0), 0
    for scene in scenes:
        texts = [message["content"].removeprefix(f"{IMAGE_TOKEN}\n") for message in get_messages(scene, rng)]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        expected = {(question, answer) for _, question, answer in get_questions(scene)}
        assert set(pairs) <= expected and len(pairs) in (1, len(expected))
        alone += len(pairs) == 1
    assert 60 < alone < 140


def test_scene_embedding_tells_what_lies_where(scenes):
    """What changes in a scene changes the embedding of its place, and of no other."""
    scene = next(scene for scene in scenes if len(scene.signs) == 1)
    eye = SceneEmbedding(len(CHARACTERS), 32)
    sign = scene.signs[0]
    changed = scene._replace(signs=[sign._replace(text=sign.text[:-1] + str((int(sign.text[-1]) + 1) % 10))])
    before, after = (
        eye({name: target[None] for name, target in get_targets(one, CHARACTERS).items()}) for one in (scene, changed)
    )
    column, row = (int(coordinate) // 32 for coordinate in sign.center)
    assert before.shape == (16, 32)
    assert (before != after).any(dim=1).nonzero().tolist() == [[4 * row + column]]


def test_saved_model_has_a_row_for_every_token(language_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(language_model[0])
    assert model.config.vocab_size >= len(tokenizer)
    assert model.generate(**tokenizer("<s>street", return_tensors="pt"), max_new_tokens=3).shape[1] > 2
