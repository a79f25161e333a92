# SPDX-License-Identifier: Apache-2.0
"""Every way to generate that transformers has, against greedy decoding by hand: one full forward a token."""

import pytest
import torch
from tiny_configs import IMAGE_TOKEN_ID, make_inputs, make_model, take_sample
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_llava_hr.generation_llava_hr import CACHE_NAME


NEW_TOKENS = 6


def generate(model, inputs, **kwargs):
    """New tokens alone."""
    output = model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs})
    return output[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def greedy_by_hand(model, sample):
    ids = sample["input_ids"]
    pixels = {"pixel_values": sample.get("pixel_values")}
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(input_ids=ids, **pixels, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, sample["input_ids"].shape[1] :]


BATCH = (1, 3, 0, 2)  # images in each sample


@pytest.fixture
def model():
    model = make_model()
    model.generation_config.suppress_tokens = [IMAGE_TOKEN_ID]
    return model


@pytest.fixture
def batch():
    return make_inputs(*BATCH)


@pytest.mark.parametrize("images", [BATCH, (0, 0)])
def test_greedy_in_a_padded_batch_equals_single_runs(model, images):
    batch = make_inputs(*images)
    tokens = generate(model, batch)
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    for index in range(len(images)):
        assert tokens[index].tolist() == greedy_by_hand(model, take_sample(batch, images, index))[0].tolist()


@pytest.mark.parametrize(
    ("images", "kwargs"),
    [
        (BATCH, {"cache_implementation": "dynamic"}),
        (BATCH, {"cache_implementation": "static"}),
        (BATCH, {"use_cache": False}),
        ((2,), {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_caches_and_lookups_give_the_same_tokens(model, images, kwargs):
    inputs = make_inputs(*images)
    assert torch.equal(generate(model, inputs, **kwargs), generate(model, inputs))


def test_one_static_cache_decodes_all_prompts_in_one_graph(model):
    """As transformers compiles decoding on a GPU; here by its switch for all devices, and without inductor."""
    model.generation_config.compile_config = CompileConfig(backend="aot_eager", mode=None)
    model.generation_config.compile_config._compile_all_devices = True
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    torch._dynamo.reset()
    counters.clear()
    for images in (1, 3, 0):
        inputs = make_inputs(images)
        cache.reset()
        assert torch.equal(generate(model, inputs, **{CACHE_NAME: cache}), generate(model, inputs))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beams_keep_each_sample_with_its_images(model, batch, num_beams):
    tokens = generate(model, batch, num_beams=num_beams)
    for index in range(len(BATCH)):
        # Independent: the images are put into the embeddings by hand, so that there is nothing to repeat wrongly
        single = take_sample(batch, BATCH, index)
        embeds = model.get_input_embeddings()(single["input_ids"]).detach()
        if "pixel_values" in single:
            embeds[single["input_ids"] == IMAGE_TOKEN_ID] = encode(model, single).pooler_output.flatten(0, 1)
        expected = model.generate(
            inputs_embeds=embeds, num_beams=num_beams, max_new_tokens=NEW_TOKENS, do_sample=False
        )
        assert tokens[index].tolist() == expected[0].tolist()


def test_sampling_several_answers_an_image(model):
    inputs = make_inputs(2, 1)
    torch.manual_seed(0)
    tokens = generate(model, inputs, do_sample=True, num_return_sequences=3, top_k=20)
    assert tokens.shape == (6, NEW_TOKENS)
    # a temperature near zero samples the best token: every copy of a sample must see that sample's images
    cold = generate(model, inputs, do_sample=True, num_return_sequences=3, temperature=1e-4)
    for index in range(2):
        expected = greedy_by_hand(model, take_sample(inputs, (2, 1), index))[0].tolist()
        assert cold[3 * index : 3 * index + 3].tolist() == [expected] * 3


def test_assisted_decoding(model):
    inputs = make_inputs(1)
    assistant = make_model()
    with torch.no_grad():
        assistant.lm_head.weight.add_(0.05 * torch.randn_like(assistant.lm_head.weight))
    assert torch.equal(generate(model, inputs, assistant_model=assistant), generate(model, inputs))


def test_streaming(model):
    class Letters:
        def decode(self, ids, **kwargs):
            return " ".join(str(int(token)) for token in ids) + " "

    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    inputs = make_inputs(1)
    expected = generate(model, inputs, streamer=streamer)
    assert "".join(streamer).split() == [str(token) for token in expected[0].tolist()]


def test_embeddings_in_place_of_ids(model):
    inputs = make_inputs(1)
    expected = generate(model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    tokens = model.generate(inputs_embeds=embeds, **others, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(tokens, expected)


def encode(model, inputs):
    with torch.no_grad():
        return model.get_image_features(inputs["pixel_values"])


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 2}, {"use_cache": False}, {"do_sample": True, "temperature": 1e-4}]
)
@pytest.mark.parametrize("form", [None, list, tuple])
def test_an_encoded_image_serves_many_questions(model, form, kwargs):
    """
    The features are computed once, reused by several calls, and no call changes them. A list or tuple has one tensor
    for each image, as transformers' Llava returns them.
    """
    inputs = make_inputs(2)
    encoded = encode(model, inputs)
    features = encoded.pooler_output.clone()
    if form is not None:
        encoded = BaseModelOutputWithPooling(pooler_output=form(features))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for _ in range(2):
        tokens = generate(model, text, mm_encoder_outputs={"image": encoded}, **kwargs)
        assert torch.equal(tokens, generate(model, inputs, **kwargs))
        assert torch.equal(torch.stack(tuple(encoded.pooler_output)), features)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_what_does_not_fit_is_named_before_generation(model, num_beams):
    inputs = make_inputs(1)
    two = {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match="tokens: 16, features: 32"):
        generate(model, {**inputs, **two}, num_beams=num_beams)
    without = {**inputs, "input_ids": inputs["input_ids"].clamp(max=99)}
    with pytest.raises(ValueError, match="tokens: 0, features: 16"):
        generate(model, without, num_beams=num_beams)


def test_the_towers_run_once_per_generation(model):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(model, make_inputs(1, 2), num_beams=2)
    assert len(calls) == 1


@pytest.mark.parametrize("given", ["text", "pixels", "encoded"])
@pytest.mark.parametrize("new_images", [0, 1])
def test_conversation_over_turns_with_a_kept_cache(model, given, new_images):
    """The second turn adds to the first turn's cache; without new images nothing is encoded again."""
    inputs, more = make_inputs(2), make_inputs(new_images, seed=1)
    first = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, more["input_ids"]], dim=1)
    pixel_values = torch.cat([inputs["pixel_values"], *([more["pixel_values"]] if new_images else [])])
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixel_values}
    expected = greedy_by_hand(model, whole)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    if given == "text":  # or the new turn's images alone
        whole["pixel_values"] = more.get("pixel_values")
    elif given == "encoded":
        whole["mm_encoder_outputs"] = {"image": encode(model, whole)}
        del whole["pixel_values"]
        calls.clear()
    cache = {CACHE_NAME: first[CACHE_NAME]}
    second = model.generate(**whole, max_new_tokens=NEW_TOKENS, do_sample=False, **cache)
    assert second[:, ids.shape[1] :].tolist() == expected.tolist()
    assert sum(calls) == {"text": new_images, "pixels": 3 * new_images, "encoded": 0}[given]
    if given == "encoded":  # the caller's features stay as they were
        assert len(whole["mm_encoder_outputs"]["image"].pooler_output) == 2 + new_images


def test_a_cache_may_end_inside_an_image(model):
    inputs = make_inputs(1)
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
    cache = first[CACHE_NAME]
    cache.crop(10 - cache.get_seq_length())
    assert torch.equal(generate(model, inputs, **{CACHE_NAME: cache}), generate(model, inputs))


@pytest.mark.parametrize("form", ["ids", "embeddings"])
def test_answers_end_where_the_context_does(model, form):
    inputs = make_inputs(0)
    length = inputs["input_ids"].shape[1]
    model.config.text_config.max_position_embeddings = length + 1
    prompt = inputs if form == "ids" else {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    tokens = model.generate(**prompt, max_new_tokens=9, min_new_tokens=1, do_sample=False)
    assert tokens.shape[1] == (length + 1 if form == "ids" else 1)
    model.config.text_config.max_position_embeddings = length
    with pytest.raises(ValueError, match=f"{length} tokens, but with an answer at most {length}"):
        model.generate(**prompt, max_new_tokens=9)
