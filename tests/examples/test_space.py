# SPDX-License-Identifier: Apache-2.0
"""The Space: what answers, without the page; and the page, in a real browser that talks with a real server."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from converted_checkpoints import TINY_MODEL, change_json
from PIL import Image
from safetensors.torch import load_file
from space_page import (
    FIND_FLAWS,
    MAX_NEW_TOKENS,
    SPACE,
    ask,
    get_answer,
    get_trained_side,
    import_engine,
    open_page,
    reply,
    require_gradio,
    run_browser,
    run_page,
    send,
    wait_for_answer,
)
from transformers import pipeline

from examples.publish import PublishArguments, publish
from modeling_llava_hr import LlavaHrImageProcessorPil
from modeling_llava_hr.utils import get_4bit_config


DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
STREET, SHELF = str(SPACE / "street.jpg"), str(SPACE / "shelf.jpg")
QUESTION = "What does the green sign say?"
EMPTY_ANSWER = "(The answer is empty: the model ended it before the first word.)"
ANSWER = "7778"  # training.tiny.fineprint's draw_sample(FinePrintConfig(size=256, min_signs=2), "test", 18)


space = import_engine()


@pytest.fixture(scope="module")
def engine():
    return space.Engine(str(TINY_MODEL), MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def side(engine) -> int:
    """The smallest one, which takes least time."""
    return min(engine.sides)


@pytest.fixture
def unpad_model(tmp_path) -> Path:
    """The tiny model, saved so that images cost no tokens for their padding."""
    folder = shutil.copytree(TINY_MODEL, tmp_path / "unpad")
    change_json(folder / "processor_config.json", "image_processor", "unpad", value=True)
    return folder


def ask_pipeline(model: Path, *paths: str, **sizes: int) -> str:
    """The pipeline's answer to `QUESTION`."""
    pipe = pipeline("image-text-to-text", model=str(model), dtype=torch.float32)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "return_full_text": False}
    (output,) = pipe([ask(QUESTION, *paths)], processor_kwargs=sizes, **options)
    return output["generated_text"].strip()


def count_calls(module: torch.nn.Module):
    """A context manager whose value counts in `call_count` how often a module runs."""
    return patch.object(module, "forward", wraps=module.forward)


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


def test_folder_with_4_bit_weights_answers(engine, tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit loading needs the extra [quantization]")
    options = {"quantization_config": get_4bit_config(), "dtype": torch.bfloat16}
    type(engine.model).from_pretrained(engine.name, **options).save_pretrained(tmp_path)
    engine.processor.save_pretrained(tmp_path)
    quantized = space.Engine(str(tmp_path), MAX_NEW_TOKENS)
    assert ", 4 bit, " in quantized.describe()
    assert get_answer(quantized, [ask(QUESTION, STREET)], get_trained_side(quantized)) == ANSWER


def test_answer_is_the_pipelines_and_the_first_token_is_timed_and_tokens_are_counted(engine, side):
    start = time.perf_counter()
    parts, looks, seconds = zip(*engine.answer([ask(QUESTION, STREET)], side), strict=True)
    assert 0 < seconds[-1] <= time.perf_counter() - start
    assert parts[-1] == ask_pipeline(TINY_MODEL, STREET, size=side, low_res_size=engine.sides[side])
    assert all(parts[-1].startswith(part) for part in parts)
    assert parts[0] == ""
    look, config = looks[-1], engine.model.config
    grid = look.low_res_side // config.vision_config.patch_size
    assert look.num_tokens == engine.get_num_tokens(side) == grid**2
    assert look.low_res.size == look.high_res.size == look.heat_map.size == (side, side)
    assert [layer for layer, _ in look.gates] == config.mr_adapter_layers


def test_each_image_is_encoded_once_in_a_session(engine, side):
    engine.look.cache_clear()
    turns = [ask("What is shown?", SHELF)]
    with count_calls(engine.model.model.vision_tower.layers[0]) as vit:
        for text in ("And now?", "And then?"):
            turns += [reply(get_answer(engine, turns, side, "one")), ask(text)]
        assert vit.call_count == 2  # as usual and with the high-resolution pathway silenced
        get_answer(engine, [*turns[:-1], ask("And here?", STREET)], side, "one")
        assert vit.call_count == 4
        get_answer(engine, turns, sorted(engine.sides)[1], "one")
        assert vit.call_count == 6
        get_answer(engine, turns, side, "two")
        assert vit.call_count == 8
        for _ in range(2):  # times that are compared must not depend on what was asked before
            get_answer(engine, turns, side)
        assert vit.call_count == 12
    assert engine.look.cache_info().maxsize == space.MAX_ENCODED  # memory does not grow with the visitors


def test_unpad(unpad_model, tmp_path):
    unpadding = space.Engine(str(unpad_model), MAX_NEW_TOKENS)
    with Image.open(STREET) as street:
        street.crop((0, 78, 256, 178)).save(tmp_path / "wide.png")
        street.crop((78, 0, 111, 256)).save(tmp_path / "tall.png")
    wide, tall = str(tmp_path / "wide.png"), str(tmp_path / "tall.png")
    trained = get_trained_side(unpadding)
    # 100 of 256 pixels from 78 on: parts of rows 2 to 5 of 8 of 32 pixels each; 33 from 111 on: columns 3 and 4
    for paths, num_tokens in (([wide], 4 * 8), ([tall], 2 * 8), ([tall, STREET, wide], 4 * 8)):
        *_, (text, look, _) = unpadding.answer([ask(QUESTION, *paths)], trained)
        assert text == ask_pipeline(unpad_model, *paths)
        assert look.num_tokens == num_tokens
    longest = unpadding.model.config.context_length
    # a line has 8 tokens, so more than these do not fit for certain, and none of them is read
    with pytest.raises(ValueError, match=f"longer than the {longest} tokens"):
        get_answer(unpadding, [ask(QUESTION, *["not there"] * (longest // 8 + 1))], trained)


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
    config = engine.model.generation_config
    monkeypatch.setattr(config, "suppress_tokens", [config.eos_token_id])  # it would not end by itself
    with count_calls(engine.model.lm_head) as steps:
        answer = engine.answer([ask("What is shown?", SHELF)], side)
        next(answer)  # the image is encoded
        next(answer)  # the first token is there
        answer.close()
        done = steps.call_count
        time.sleep(0.5)
    assert 0 < done == steps.call_count < 200


def test_image_tag_of_a_user_is_text(engine, side):
    tag, text = (get_answer(engine, [ask(f"What is an {tag}?", SHELF)], side) for tag in ("<image>", "< image>"))
    assert tag == text


def test_conversation_that_is_too_long_is_refused(engine, side):
    longest = engine.model.config.context_length
    with pytest.raises(ValueError, match=f"longer than the {longest} tokens"):
        get_answer(engine, [ask("why? " * longest, SHELF)], side)


# In a browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with run_page(TINY_MODEL, tmp_path_factory.mktemp("space")) as (address, _):
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


COUNT_LINES = """element => {
    const range = new Range();
    range.selectNodeContents(element);
    return range.getClientRects().length;
}"""


def test_page_starts_with_an_example_and_says_what_answers(page, engine):
    page.wait_for_function("/example/.test(document.querySelector('#facts').innerText)")
    for view in ("low-res", "high-res", "heat-map"):
        page.wait_for_selector(f"#{view} img")
    size = sum(weight.numel() for weight in load_file(TINY_MODEL / "model.safetensors").values()) / 1e6
    assert f"tiny-llava-hr, {size:.1f} M parameters, float32, CPU" in page.inner_text("#head")
    assert "It cannot describe photographs" in page.inner_text("#head")
    page.set_viewport_size(DESKTOP)
    hints = page.locator(".hint")
    assert hints.all_inner_texts()[1] == "Gate: the factor, -1 to 1, of the high-resolution view in an adapter."
    # one line each, as is what the model can do
    for line in (*hints.all(), page.locator("#head p").last):
        assert line.evaluate(COUNT_LINES) == 1


def test_buttons_say_what_a_side_costs(page, engine):
    labels = [label.inner_text().strip() for label in page.locator("#side label").all()]
    costs = []
    for side, low_res_side in engine.sides.items():
        sizes = {"size": side, "low_res_size": low_res_side}
        ids = engine.processor(images=Image.open(STREET), text="<image>", **sizes)["input_ids"][0]
        costs.append(ids.count(engine.model.config.image_token_id))
    assert labels == [f"{side} px, {cost} tokens" for side, cost in zip(engine.sides, costs, strict=True)]
    assert len(set(costs)) > 1  # so a sentence that all sides cost the same would be wrong
    assert "sides with as many tokens cost it the same" in page.inner_text("#side")


def test_resolutions_are_compared(page, engine):
    page.click("#compare")
    page.wait_for_selector("text=Ask a question about an image first")
    send(page, QUESTION, STREET)
    wait_for_answer(page, 0, ANSWER)
    page.click("#compare")
    page.wait_for_selector("#answers .answers:not([aria-busy])")
    cards = page.locator("#answers .answers > div")
    for card, side in zip(cards.all(), engine.sides, strict=True):
        expected = get_answer(engine, [ask(QUESTION, STREET)], side)
        card.locator(f"p:text-is('{expected}')").wait_for()
        said = rf"{side} px\s+{engine.get_num_tokens(side)} tokens, \d+\.\d\d s\s+{re.escape(expected)}"
        assert re.fullmatch(said, card.inner_text().strip())
    tops = [card.bounding_box()["y"] for card in cards.all()]
    assert max(tops) - min(tops) < 1  # side by side


def test_encodings_are_not_shared_between_visitors(browser, address):
    for _ in range(2):
        with open_page(browser, address) as page:
            send(page, QUESTION, SHELF)
            page.wait_for_function("/new/.test(document.querySelector('#facts').innerText)")
            page.wait_for_selector("#chat .bot.message")


def test_empty_answer_and_unpad(browser, unpad_model, tmp_path):
    all_but_end = [token for token in range(512) if token != 2]
    change_json(unpad_model / "generation_config.json", "suppress_tokens", value=all_but_end)
    Image.new("RGB", (256, 64), "navy").save(tmp_path / "wide.png")
    with run_page(unpad_model, tmp_path) as (address, _), open_page(browser, address) as page:
        assert "unpad, 4.7 M parameters" in page.inner_text("#head")
        assert "photographs" not in page.inner_text("#head")  # another model may well
        assert page.locator("#side label").first.inner_text().strip() == "96 px, at most 64 tokens"
        assert "not square have fewer" in page.inner_text("#side")
        send(page, "What is shown?", str(tmp_path / "wide.png"))
        wait_for_answer(page, 0, EMPTY_ANSWER)
        assert page.inner_text("#facts b >> nth=0") == "16"  # 2 of 8 rows
        send(page, "And now?")
        wait_for_answer(page, 1, EMPTY_ANSWER)
        page.click("#compare")
        page.wait_for_selector("#answers .answers:not([aria-busy])")
        assert set(page.locator("#answers p").all_inner_texts()) == {EMPTY_ANSWER}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_contrast_and_targets(browser, address, viewport, scheme):
    """WCAG 2.2: a contrast of 4.5:1 (1.4.3, for icons as well), and targets of 40 pixels, more than 2.5.8 asks for."""
    with open_page(browser, address, viewport=viewport, color_scheme=scheme) as page:
        page.wait_for_selector("#high-res img")
        page.wait_for_selector("#chat .example")
        flaws = [page.evaluate(FIND_FLAWS)]
        page.set_input_files("#ask input[type=file]", STREET)
        page.wait_for_selector("#ask .thumbnail-item")
        flaws.append(page.evaluate(FIND_FLAWS))
        page.fill("#ask textarea", QUESTION)
        page.press("#ask textarea", "Enter")
        wait_for_answer(page, 0, ANSWER)
        page.click("#compare")
        page.wait_for_selector("#answers .answers:not([aria-busy])")
        page.wait_for_selector("#chat [aria-label=Retry]")
        flaws.append(page.evaluate(FIND_FLAWS))
        assert [found for found, _ in flaws] == [[], [], []]
        assert flaws[0][1]["texts"] > 20 and flaws[2][1]["targets"] > 15  # so it did look
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) > 384) == (scheme == "light")


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_images_in_full_screen_fit_the_window(browser, address, viewport):
    with open_page(browser, address, viewport=viewport) as page:
        send(page, QUESTION, STREET)
        wait_for_answer(page, 0, ANSWER)
        for image in ("#low-res", "#high-res", "#heat-map", "#chat .user.message:has(img)"):
            page.click(f"{image} [aria-label*=ullscreen]")
            page.wait_for_selector(f"{image} [aria-label='Exit fullscreen mode']")
            page.wait_for_timeout(500)  # gradio's animation
            box = page.locator(f"{image} img").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"], image
            assert box["y"] >= 0 and box["y"] + box["height"] <= viewport["height"], image
            assert min(box["width"], box["height"]) >= 256
            page.click(f"{image} [aria-label='Exit fullscreen mode']")
            page.wait_for_timeout(500)


def test_phone_shows_the_chat_first(browser, address):
    with open_page(browser, address, viewport=PHONE) as page:
        page.wait_for_selector("#high-res img")
        names = ("#head", "#chat", "#ask", "#side", "#compare", "#facts", "#low-res", "#gates")
        tops = [page.locator(name).bounding_box()["y"] for name in names]
        assert tops == sorted(tops)
        box = page.locator("#ask textarea").bounding_box()
        assert box["y"] + box["height"] <= 844
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390


# A stub of `spaces`, the package of ZeroGPU, without a GPU: as there, a decorated function runs in a forked process of
# its own, and whatever goes in or out is pickled
SPACES = """
import inspect, multiprocessing, os, pickle

def GPU(function):
    def work(results, arguments):
        print("GPU:", function.__name__, os.getpid(), flush=True)
        value = function(*pickle.loads(arguments))
        for part in value if inspect.isgeneratorfunction(function) else [value]:
            results.put(pickle.dumps([part]))
        results.put(pickle.dumps([]))

    def generate(*arguments):
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        context.Process(target=work, args=(results, pickle.dumps(arguments)), daemon=True).start()
        while part := pickle.loads(results.get()):
            yield part[0]

    return generate if inspect.isgeneratorfunction(function) else lambda *arguments: list(generate(*arguments))[0]
"""


@pytest.mark.parametrize("has_zero_gpu", [False, True], ids=["cpu", "zero-gpu"])
def test_prepared_folder_answers_by_itself(browser, tmp_path, has_zero_gpu):
    """As on the Hub: the folder alone, no package `modeling_llava_hr`, and no variable that allows foreign code."""
    publish(PublishArguments(model=str(TINY_MODEL), space=str(tmp_path / "space")))
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text("import sys; sys.modules['modeling_llava_hr'] = None")
    if has_zero_gpu:
        (tmp_path / "path" / "spaces.py").write_text(SPACES)
    environment = {"PYTHONPATH": str(tmp_path / "path"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    with run_page(None, tmp_path, space=tmp_path / "space", **environment) as (address, process):
        with open_page(browser, address) as page:
            page.wait_for_selector("#high-res img")
            assert "tiny-llava-hr, 4.7 M parameters" in page.inner_text("#head")
            send(page, QUESTION, STREET)
            wait_for_answer(page, 0, ANSWER)
            send(page, QUESTION)
            wait_for_answer(page, 1, ANSWER)
            page.wait_for_function("/reused/.test(document.querySelector('#facts').innerText)")
    assert list((tmp_path / "modules").rglob("modeling_llava_hr.py"))  # that code ran
    calls = re.findall(r"GPU: (\w+) (\d+)", (tmp_path / "log").read_text(errors="replace"))  # processes share it
    # the example and the image are encoded, and two answers generated, none of it in the page's own process
    assert [name for name, _ in calls] == ["_encode", "_encode", "_generate", "_generate"] * has_zero_gpu
    assert str(process.pid) not in {number for _, number in calls}


def test_folder_of_a_space_must_be_new(tmp_path):
    (tmp_path / "app.py").touch()
    with pytest.raises(ValueError, match=f"--space: {tmp_path} exists"):
        publish(PublishArguments(model=str(TINY_MODEL), space=str(tmp_path)))
    with pytest.raises(ValueError, match="--repo NAMESPACE/NAME to publish the model, or --space FOLDER"):
        publish(PublishArguments(model=str(TINY_MODEL)))
    assert list(tmp_path.iterdir()) == [tmp_path / "app.py"]


def test_model_that_is_not_there_is_one_sentence(tmp_path):
    require_gradio()
    command = [sys.executable, "app.py", "--model", str(tmp_path / "none")]
    result = subprocess.run(command, cwd=SPACE, capture_output=True, text=True)
    assert result.returncode == 1
    assert "error: `--model`" in result.stderr and "Traceback" not in result.stderr
