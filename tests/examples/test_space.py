# SPDX-License-Identifier: Apache-2.0
"""The Space: what answers, without the page; and the page, in a real browser that talks with a real server."""

import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from space_page import (
    MAX_NEW_TOKENS,
    PATIENCE,
    SPACE,
    import_engine,
    open_page,
    require_gradio,
    run_browser,
    run_page,
    send,
    wait_for_answer,
)
from transformers import pipeline

from modeling_llava_hr import LlavaHrImageProcessorPil


STREET, SHELF = str(SPACE / "street.jpg"), str(SPACE / "shelf.jpg")
QUESTION = "What does the green sign say?"
ANSWER = "7778"  # training.tiny.fineprint's draw_sample(FinePrintConfig(size=256, min_signs=2), "test", 18)


space = import_engine()


@pytest.fixture(scope="module")
def engine(tiny_model):
    return space.Engine(str(tiny_model), MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def side(engine) -> int:
    """The smallest side: the random model sees at 1024 pixels, where it has nothing to gain from it."""
    return min(engine.sides)


def ask(text: str, path: str | None = None) -> dict:
    images = [{"type": "image", "path": path}] if path else []
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def get_answer(engine, messages: list[dict], side: int) -> str:
    return list(engine.answer(messages, side))[-1][0]


def get_trained_side(engine) -> int:
    return engine.processor.image_processor.size["height"]


class Counter:
    """Counts the calls of a module while it is entered."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.calls = module, 0

    def __enter__(self):
        self.hook = self.module.register_forward_hook(self.count)
        return self

    def count(self, module, args, output):
        self.calls += 1

    def __exit__(self, *exception):
        self.hook.remove()


@pytest.mark.parametrize(
    ("options", "sides"),
    [
        # the pairs of the released models: section 5.2 of the paper, and 1024 x 14 / 32 = 448, 1536 x 14 / 32 = 672
        ({}, {384: 448, 512: 448, 768: 448, 1024: 448, 1536: 672}),
        ({"size": 768, "low_res_size": 336}, {288: 336, 384: 336, 576: 336, 768: 336, 1152: 504}),
        ({"size": 256, "low_res_size": 56, "patch_size": 7}, {96: 56, 128: 56, 192: 56, 256: 56, 384: 84}),
    ],
)
def test_sides_to_choose_from_are_ones_that_the_image_processor_takes(options, sides):
    image_processor = LlavaHrImageProcessorPil(**options)
    assert space.get_sides(image_processor) == sides
    for high_res_side, low_res_side in sides.items():
        views = image_processor(
            Image.new("RGB", (8, 8)), size=high_res_side, low_res_size=low_res_side, return_tensors="pt"
        )
        assert views["pixel_values"].shape[-1] == high_res_side


def test_weights_are_4_bit_where_bfloat16_leaves_no_room():
    gigabyte = 2**30
    assert space.get_quantization(7_000_000_000, 24 * gigabyte) is None  # 13 GB
    assert space.get_quantization(7_000_000_000, 16 * gigabyte).load_in_4bit
    assert space.get_quantization(13_000_000_000, 24 * gigabyte).load_in_4bit


def test_answer_is_the_pipelines(engine, side, tiny_model):
    pipe = pipeline("image-text-to-text", model=str(tiny_model), dtype=torch.float32)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "return_full_text": False}
    sizes = {"size": side, "low_res_size": engine.sides[side]}
    expected = pipe([ask(QUESTION, STREET)], processor_kwargs=sizes, **options)
    parts = [text for text, _, _ in engine.answer([ask(QUESTION, STREET)], side)]
    assert parts[-1] == expected[0]["generated_text"].strip()
    assert all(parts[-1].startswith(part) for part in parts)
    assert parts[0] == ""


def test_trained_model_reads_the_example(engine):
    assert get_answer(engine, [ask(QUESTION, STREET)], get_trained_side(engine)) == ANSWER


def test_each_image_is_encoded_once(engine, side):
    engine.look.cache_clear()
    turns = [ask("What is shown?", SHELF)]
    with Counter(engine.model.model.vision_tower.layers[0]) as vit:
        for text in ("And now?", "And then?"):
            turns += [reply(get_answer(engine, turns, side)), ask(text)]
        assert vit.calls == 2  # as usual and with the high-resolution pathway silenced
        get_answer(engine, [*turns[:-1], ask("And here?", STREET)], side)
        assert vit.calls == 4
        get_answer(engine, turns, sorted(engine.sides)[1])
        assert vit.calls == 6


def test_first_token_is_timed_and_tokens_are_counted(engine, side):
    start = time.perf_counter()
    *_, (_, look, seconds) = engine.answer([ask(QUESTION, STREET)], side)
    assert 0 < seconds <= time.perf_counter() - start
    assert (
        look.num_tokens
        == engine.get_num_tokens(side)
        == (look.low_res_side // engine.model.config.vision_config.patch_size) ** 2
    )
    assert look.low_res.size == look.high_res.size == look.heat_map.size == (side, side)
    assert [layer for layer, _ in look.gates] == engine.model.config.mr_adapter_layers


def test_nothing_of_a_silenced_pathway_gets_through(engine):
    vision_tower = engine.model.model.vision_tower
    patch_size, stride = engine.processor.image_processor.patch_size, engine.processor.image_processor.high_res_stride
    low_res = torch.randn(1, 3, 4 * patch_size, 4 * patch_size)
    one, other = torch.randn(2, 1, 3, 4 * stride, 4 * stride)
    with torch.no_grad():
        with space.high_res_silenced(vision_tower):
            silent = vision_tower(one, low_res).last_hidden_state
            torch.testing.assert_close(vision_tower(other, low_res).last_hidden_state, silent, rtol=0, atol=0)
        heard = vision_tower(one, low_res).last_hidden_state
        assert not torch.equal(heard, silent)
        assert not torch.equal(vision_tower(other, low_res).last_hidden_state, heard)


def test_heat_map_colours_where_the_heat_is():
    heat = torch.zeros(4, 4)
    heat[0, 3] = 1  # top right
    image = space.draw_heat_map(Image.new("RGB", (64, 64), (100, 100, 100)), heat)
    red, _, blue = image.getpixel((56, 8))
    assert red > 200 and blue < 60
    assert image.getpixel((8, 56)) == (100, 100, 100)


def test_generation_ends_when_the_asker_leaves(engine, side, monkeypatch):
    monkeypatch.setattr(engine, "max_new_tokens", 200)
    with Counter(engine.model.lm_head) as steps:
        answer = engine.answer([ask("What is shown?", SHELF)], side)
        next(answer)  # the image is encoded
        next(answer)  # the first token is there
        answer.close()
        done = steps.calls
        time.sleep(0.5)
    assert 0 < done == steps.calls < 200


def test_image_tag_of_a_user_is_text(engine, side):
    assert get_answer(engine, [ask("What is an <image>?", SHELF)], side) == get_answer(
        engine, [ask("What is an < image>?", SHELF)], side
    )


def test_conversation_that_is_too_long_is_refused(engine, side):
    longest = engine.model.config.context_length
    with pytest.raises(ValueError, match=f"longer than the {longest} tokens"):
        get_answer(engine, [ask("why? " * longest, SHELF)], side)


def test_file_that_is_not_an_image_is_named(engine, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(ValueError, match="notes.png is not an image"):
        engine.read(str(tmp_path / "notes.png"))


# In a browser


@pytest.fixture(scope="module")
def address(tiny_model, tmp_path_factory):
    with run_page(tiny_model, tmp_path_factory.mktemp("space")) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with run_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    with open_page(browser, address) as page:
        yield page


def test_conversation_with_a_change_of_resolution(page, engine):
    trained = get_trained_side(engine)
    turns = [ask(QUESTION, STREET)]
    first = get_answer(engine, turns, trained)
    send(page, QUESTION, STREET)
    wait_for_answer(page, 0, first)
    assert first == ANSWER
    assert str(engine.get_num_tokens(trained)) in page.inner_text("#facts")
    assert f"{trained} px" in page.inner_text("#high-res")
    for view in ("low-res", "high-res", "heat-map"):
        assert page.locator(f"#{view} img").evaluate("image => image.naturalWidth") == trained
    assert page.locator("#gates i").count() == len(engine.model.config.mr_adapter_layers)

    smallest = min(engine.sides)
    page.click(f"#side label:has(input[value='{smallest}'])")
    page.wait_for_function(f"document.querySelector('#high-res').innerText.includes('{smallest} px')")
    turns += [reply(first), ask("What is shown?")]
    second = get_answer(engine, turns, smallest)
    send(page, "What is shown?")
    wait_for_answer(page, 1, second)
    page.wait_for_function("/reused/.test(document.querySelector('#facts').innerText)")


def test_wrong_file_gives_a_message_and_html_stays_text(page, engine, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    send(page, "What is this?", str(tmp_path / "notes.png"))
    page.wait_for_selector("text=notes.png is not an image that can be read")
    assert "Traceback" not in page.inner_text("body")
    assert page.locator("#chat .user.message").count() == 0
    page.reload(wait_until="domcontentloaded")
    page.wait_for_selector("#ask textarea")
    text = "<u id='injected'>Who</u> are **you**?"
    answer = get_answer(engine, [ask(text)], get_trained_side(engine))
    send(page, text)
    wait_for_answer(page, 0, answer)
    assert page.inner_text("#chat .user.message").strip() == text
    assert page.locator("#injected").count() == 0


def test_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    box = page.locator("#ask textarea").bounding_box()
    assert box["y"] + box["height"] <= 844
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_model_that_is_not_there_is_one_sentence(tmp_path):
    require_gradio()
    command = [sys.executable, "app.py", "--model", str(tmp_path / "none")]
    result = subprocess.run(command, cwd=SPACE, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 1
    assert "error: `--model`" in result.stderr and "Traceback" not in result.stderr
