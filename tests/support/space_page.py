# SPDX-License-Identifier: Apache-2.0
"""The Space as users have it: its page, served by a process of its own, in a real browser."""

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from converted_checkpoints import ROOT
from loopback_server import PATIENCE, run_process


SPACE = ROOT / "examples" / "space"
MAX_NEW_TOKENS = 12


def import_engine() -> ModuleType:
    """`examples/space` is a folder of its own in a Space, not a package."""
    spec = importlib.util.spec_from_file_location("space_engine", SPACE / "engine.py")
    sys.modules["space_engine"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(text: str, *paths: str) -> dict:
    images = [{"type": "image", "path": path} for path in paths]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def reply(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def get_answer(engine, messages: list[dict], side: int, session: str | None = None) -> str:
    return list(engine.answer(messages, side, session))[-1][0]


def get_trained_side(engine) -> int:
    return engine.processor.image_processor.size["height"]


def require_gradio() -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('the page needs gradio: pip install ".[space]" in the checkout')


@contextlib.contextmanager
def run_page(
    model: Path | None, folder: Path, *program: str, space: Path = SPACE, **environment: str
) -> Iterator[tuple[str, psutil.Popen]]:
    """
    Serves the page as `make space` does.

    Args:
        model (`Path`, *optional*): Folder of the model; the page's default one without.
        folder (`Path`): Where the log and, in `uploads`, what users send goes.
        program (`str`): What Python runs in `examples/space` instead of `app.py`.
        space (`Path`): Another folder than `examples/space`.
        environment (`str`): More variables.

    Yields:
        The page's address, and its process.
    """
    require_gradio()
    options = ["--max_new_tokens", MAX_NEW_TOKENS, *(["--model", model] if model else [])]
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "uploads")}
    environment |= {"PYTHONUNBUFFERED": "1"}  # its address is in the log at once
    command = [sys.executable, *(program or ["app.py"]), *options]
    with run_process(command, folder / "log", cwd=space, env={**os.environ, **environment}) as page:
        yield page


@contextlib.contextmanager
def run_browser() -> Iterator:
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("the page's tests need Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"], timeout=PATIENCE * 1000
        )
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(browser, address: str, **options) -> Iterator:
    """
    The page in a session of its own. Whatever it asks of another machine fails the test, as do errors of its scripts.
    Options are playwright's, such as `viewport`.
    """
    context = browser.new_context(reduced_motion="reduce", **options)
    context.set_default_timeout(PATIENCE * 1000)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if is_foreign(request.url, address) else None)
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_selector("#ask textarea")
    yield page
    context.close()
    assert problems == []


def is_foreign(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def send(page, text: str, image: str | dict | None = None) -> None:
    """Sends a question; an image is a path, or playwright's `{"name": ..., "mimeType": ..., "buffer": ...}`."""
    if image:
        page.set_input_files("#ask input[type=file]", image)
        page.wait_for_selector("#ask .thumbnail-item")
    page.fill("#ask textarea", text)
    page.press("#ask textarea", "Enter")


def squeeze(text: str) -> str:
    """As a page shows it: one space for any white space."""
    return " ".join(text.split())


def wait_for_answer(page, number: int, expected: str) -> None:
    """Waits until the answer of that number, from 0 on, is the expected one."""
    page.wait_for_function(
        """([number, expected]) => {
            const answers = document.querySelectorAll('#chat .bot.message');
            return answers.length > number && answers[number].innerText.replace(/\\s+/g, ' ').trim() === expected;
        }""",
        arg=[number, squeeze(expected)],
    )


# Colours under text are those of the elements around it, from the page's down; transparent ones let the next through
FIND_FLAWS = """() => {
    const rgba = color => {
        const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
        return [...[r, g, b].map(value => color.startsWith('color(') ? 255 * value : value), a];
    };
    const cover = (under, over) => over.slice(0, 3).map((value, i) => value * over[3] + under[i] * (1 - over[3]));
    const luminance = color => color.map(value => value / 255)
        .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    const background = element => {
        const layers = [];
        for (; element; element = element.parentElement) layers.push(rgba(getComputedStyle(element).backgroundColor));
        return layers.reduceRight(cover, [255, 255, 255]);
    };
    const isShown = element => element.checkVisibility({ opacityProperty: true, visibilityProperty: true })
        && Math.min(element.getBoundingClientRect().width, element.getBoundingClientRect().height) > 1;
    const name = element => `${element.tagName} ${element.closest('[id]')?.id} ${element.getAttribute('aria-label')} `
        + (element.innerText ?? '').slice(0, 30);
    const flaws = [], seen = { texts: 0, targets: 0 };
    for (const element of [...document.body.querySelectorAll('*')].filter(isShown)) {
        const isText = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
        const isEmpty = element.placeholder && !element.value;
        if (isText || isEmpty || element.tagName === 'svg') {
            const under = background(element);
            const color = getComputedStyle(element, isEmpty ? '::placeholder' : null).color;
            const [dark, light] = [luminance(under), luminance(cover(under, rgba(color)))].sort((a, b) => a - b);
            const contrast = (light + 0.05) / (dark + 0.05);
            seen.texts += 1;
            if (contrast < 4.5) flaws.push(`contrast ${contrast.toFixed(2)}: ${name(element)}`);
        }
        if (element.matches('button, a[href], textarea, label:has(input[type=radio])')) {
            const { width, height } = element.getBoundingClientRect();
            seen.targets += 1;
            if (Math.min(width, height) < 40) flaws.push(`${width} x ${height} px: ${name(element)}`);
        }
    }
    return [flaws, seen];
}"""
