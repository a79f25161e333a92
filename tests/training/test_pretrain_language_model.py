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
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.fineprint import get_caption
from training.pretrain_language_model import PretrainLanguageModelArguments, get_scenes, get_texts, pretrain


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("language-model")
    arguments = PretrainLanguageModelArguments(output=str(output), num_scenes=60, steps=20, batch_size=4, size=128)
    return output, arguments, pretrain(arguments)


def test_loss_falls(trained):
    _, _, losses = trained
    assert losses["last_loss"] < 0.7 * losses["first_loss"]


def test_every_digit_is_a_token_and_known_words_are_one(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    assert tokenizer.tokenize("4.71") == ["4", ".", "7", "1"]
    assert len(tokenizer.tokenize("What does the sign say")) == 5


def test_any_text_survives_the_tokenizer(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    for text in ("What does the red sign say?", "Où est le tücher? 日本\n\t{}", " 4711  "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_chat_contains_the_description_and_all_answers(trained):
    output, arguments, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(output)
    scene = next(scene for scene in get_scenes(arguments) if len(scene.signs) > 1)
    caption, chat = get_texts(tokenizer, scene, torch.Generator())
    assert caption == f"<s>{get_caption(scene, with_texts=True)}\n"
    assert chat.count("</s>") == chat.count("ASSISTANT: ") >= 3
    assert all(f"ASSISTANT: {sign.text}</s>" in chat for sign in scene.signs)


def test_saved_model_has_a_row_for_every_token(trained):
    tokenizer, model = AutoTokenizer.from_pretrained(trained[0]), AutoModelForCausalLM.from_pretrained(trained[0])
    assert model.config.vocab_size >= len(tokenizer)
    assert model.generate(**tokenizer("<s>street", return_tensors="pt"), max_new_tokens=3).shape[1] > 2
