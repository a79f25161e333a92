# SPDX-License-Identifier: Apache-2.0
"""
A page to chat with LLaVA-HR about images, and to see what it sees of them:

    MODEL=llava-hr-7b-sft-1024-hf python app.py     # or --model, then http://127.0.0.1:7860
"""

import argparse
import html
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from engine import HERE, Engine, Look


try:
    import gradio as gr
    from gradio.components.chatbot import ChatbotDataMessages
    from starlette.datastructures import Headers
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ImportError as error:
    sys.exit(f'error: the page needs gradio ({error}): pip install ".[space]" in the checkout')


TINY_MODEL = "tiny-llava-hr"
# Beside this file in a Space that `examples.publish` prepared, otherwise in the checkout
DEFAULT_MODEL = next((config.parent for config in HERE.glob("*/config.json")), HERE.parent / TINY_MODEL)
EXAMPLES = [
    [{"text": "What does the green sign say?", "files": [str(HERE / "street.jpg")]}],
    [{"text": "What does the orange tag say?", "files": [str(HERE / "shelf.jpg")]}],
]
MAX_FILE_SIZE = "10mb"
MAX_WAITING = 32  # questions; further ones are refused
KEEP_UPLOADS = 3600  # seconds
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
OUT_OF_MEMORY = "Out of memory. Choose a smaller high-resolution side, or start a new conversation with fewer images."

HEAD = """<h1>LLaVA-HR</h1>
<p class='about'>Sees an image twice: the whole at low resolution, and the fine print at high resolution.</p>
<p><b>{model}</b></p>"""
TINY_MODEL_HINT = """<p>This model reads numbers and names shapes and colors in drawn scenes like the examples.
It cannot describe photographs.</p>"""
COST = "Tokens are what an image costs the language model: sides with as many tokens cost it the same."
COST_UNPAD = f"{COST} Images that are not square have fewer."
HINTS = """<p class='hint'>Orange: tokens that change most without the high-resolution pathway.</p>
<p class='hint'>Gate: the factor, -1 to 1, of the high-resolution view in an adapter.</p>"""
EMPTY_ANSWER = "(The answer is empty: the model ended it before the first word.)"


def show_plain_text(chatbot: gr.Chatbot) -> gr.Chatbot:
    """
    Makes a chatbot escape the texts of users and models; by default it renders HTML, even without Markdown. (For a
    subclass gradio would write a file beside this one.)
    """
    preprocess, postprocess = chatbot.preprocess, chatbot.postprocess

    def unescape(payload: ChatbotDataMessages | None) -> list[dict]:
        turns = preprocess(payload)
        for part in (part for turn in turns for part in turn["content"] if part["type"] == "text"):
            part["text"] = html.unescape(part["text"])
        return turns

    def escape(value: list | None) -> ChatbotDataMessages:
        data = postprocess(value)
        for part in (part for turn in data.root for part in turn.content if part.type == "text"):
            part.text = html.escape(part.text, quote=False)
        return data

    chatbot.preprocess, chatbot.postprocess = unescape, escape
    return chatbot


class OwnPages:
    """
    ASGI middleware: on this machine, refuses requests that other sites' pages make in the user's browser. (A Space is
    public, and behind a proxy with another name.)
    """

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        headers = Headers(scope=scope) if scope["type"] == "http" else {}
        host, origin = headers.get("host", ""), headers.get("origin")
        is_local = urlsplit(f"//{host}").hostname in LOOPBACK_HOSTS
        is_own = origin is None or urlsplit(origin).netloc in (host, headers.get("x-forwarded-host"))
        if is_local and not is_own:
            await PlainTextResponse("This page answers only its own requests.", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def draw_facts(look: Look, seconds: float | None, encoded: str) -> str:
    """The three figures above the views, as HTML; without any text of a user or model."""
    first = "–" if seconds is None else f"{seconds:.2f} s"
    return (
        f"<div class='facts'><div><b>{look.num_tokens}</b><span>visual tokens</span></div>"
        f"<div><b>{first}</b><span>to the first token</span></div>"
        f"<div><b>{encoded}</b><span>image</span></div></div>"
    )


def draw_gates(look: Look) -> str:
    """The gates as bars from the middle, which is 0, as HTML."""
    bars = "".join(
        f"<p><span>before ViT layer {layer}</span><b>{gate:+.2f}</b></p>"
        f"<div><i style='left: {50 + 50 * min(gate, 0):.1f}%; width: {50 * abs(gate):.1f}%'></i></div>"
        for layer, gate in look.gates
    )
    return f"<div class='gates'><h3>Gates of the MR-Adapters</h3>{bars}</div>"


def draw_answer(side: int, look: Look, text: str, seconds: float) -> str:
    """One of the compared answers, as HTML."""
    return (
        f"<div><b>{side} px</b><span>{look.num_tokens} tokens, {seconds:.2f} s</span><p>{html.escape(text)}</p></div>"
    )


@contextmanager
def errors_shown() -> Iterator[None]:
    """Errors as messages in the page, which renders them as HTML (unlike a validator's)."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        raise gr.Error(OUT_OF_MEMORY) from error


def to_messages(history: list[dict], message: dict | None = None) -> list[dict]:
    """The page's conversation in the chat template's form."""
    messages = [
        {
            "role": turn["role"],
            "content": [
                {"type": "image", "path": part["file"]["path"]}
                if part["type"] == "file"
                else {"type": "text", "text": "" if part["text"] == EMPTY_ANSWER else part["text"]}
                for part in turn["content"]
            ],
        }
        for turn in history
    ]
    if message is not None:
        images = [{"type": "image", "path": path} for path in message["files"]]
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": message["text"]}]})
    return messages


def make_page(engine: Engine) -> gr.Blocks:
    """The page in front of an engine."""
    image_processor = engine.processor.image_processor
    trained_side = image_processor.size["height"]

    def show(look: Look, seconds: float | None, encoded: str) -> tuple:
        views = (
            gr.update(value=look.low_res, label=f"Low-resolution view, {look.low_res_side} px"),
            gr.update(value=look.high_res, label=f"High-resolution view, {look.high_res.width} px"),
        )
        return draw_facts(look, seconds, encoded), *views, look.heat_map, draw_gates(look)

    def check(message: dict) -> dict:
        try:
            for path in message["files"]:
                engine.read(path)
        except ValueError as error:
            return gr.validate(False, str(error))
        return gr.validate(bool(message["text"].strip()), "Write a question about the image.")

    def answer(message: dict, history: list[dict], side: int, request: gr.Request) -> Iterator[tuple]:
        misses, encoded, text, look = engine.look.cache_info().misses, None, "", None
        with errors_shown():
            for text, look, seconds in engine.answer(to_messages(history, message), side, request.session_hash):
                if look is None:
                    yield text, *[gr.skip()] * len(panel)
                elif encoded is None:
                    encoded = "new" if engine.look.cache_info().misses > misses else "reused"
                    yield text, *show(look, None, encoded)
                else:
                    yield text, draw_facts(look, seconds, encoded), *[gr.skip()] * (len(panel) - 1)
        # views again, as a page that was still being built may have missed the first
        yield text or EMPTY_ANSWER, *(show(look, seconds, encoded) if look else [gr.skip()] * len(panel))

    def look_again(history: list[dict], side: int, request: gr.Request) -> tuple:
        images = [part for turn in to_messages(history) for part in turn["content"] if part["type"] == "image"]
        if not images:
            return look_at_example(side)
        with errors_shown():
            return show(engine.look(engine.read(images[-1]["path"]), side, request.session_hash), None, "new")

    def look_at_example(side: int = trained_side) -> tuple:
        return show(engine.look(engine.read(str(HERE / "street.jpg")), side), None, "example")

    def compare(history: list[dict]) -> Iterator[str]:
        messages = to_messages(history)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(part["type"] == "image" for message in messages for part in message["content"]):
            raise gr.Error("Ask a question about an image first.", print_exception=False)
        done = ""
        with errors_shown():
            for side in engine.sides:
                start, text, look, seconds = time.perf_counter(), "", None, 0.0
                for text, look, _ in engine.answer(messages, side):
                    seconds = time.perf_counter() - start
                    card = draw_answer(side, look, text, seconds)
                    yield f"<div class='facts answers' aria-busy='true'>{done}{card}</div>"
                done += draw_answer(side, look, text or EMPTY_ANSWER, seconds)
        yield f"<div class='facts answers'>{done}</div>"

    with gr.Blocks(
        title="LLaVA-HR", fill_width=True, analytics_enabled=False, delete_cache=(KEEP_UPLOADS,) * 2
    ) as page:
        head = HEAD.format(model=html.escape(engine.describe()))
        gr.HTML(head + TINY_MODEL_HINT * (Path(engine.name).name == TINY_MODEL), elem_id="head")
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                chat_column = gr.Column()
                most = "at most " if image_processor.unpad else ""
                side = gr.Radio(
                    [(f"{side} px, {most}{engine.get_num_tokens(side)} tokens", side) for side in engine.sides],
                    value=trained_side,
                    label="High-resolution side",
                    info=COST_UNPAD if image_processor.unpad else COST,
                    elem_id="side",
                )
                compare_button = gr.Button("Compare resolutions: the last question at all sides", elem_id="compare")
                answers = gr.HTML(elem_id="answers")
            with gr.Column(scale=4, min_width=340):
                facts = gr.HTML(elem_id="facts")
                options = {"interactive": False, "buttons": ["fullscreen"], "format": "png"}
                with gr.Row(elem_classes="pair"):
                    low_res = gr.Image(label="Low-resolution view", elem_id="low-res", **options)
                    high_res = gr.Image(label="High-resolution view", elem_id="high-res", **options)
                with gr.Row(elem_classes="pair"):
                    heat_map = gr.Image(label="High-resolution contribution", elem_id="heat-map", **options)
                    gates = gr.HTML(elem_id="gates")
                gr.HTML(HINTS)
        panel = [facts, low_res, high_res, heat_map, gates]
        with chat_column:
            chat = gr.ChatInterface(
                answer,
                multimodal=True,
                chatbot=show_plain_text(
                    gr.Chatbot(
                        elem_id="chat",
                        height="min(40vh, 560px)",
                        show_label=False,
                        render_markdown=False,
                        buttons=["copy"],
                        placeholder="Add an image and ask, or try an example.",
                    )
                ),
                textbox=gr.MultimodalTextbox(
                    elem_id="ask",
                    placeholder="Ask about the image",
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"],
                    max_plain_text_length=4000,
                    show_label=False,
                ),
                additional_inputs=[side],
                additional_outputs=panel,
                examples=EXAMPLES,
                cache_examples=False,
                validator=check,
                concurrency_limit=1,
                flagging_mode="never",
                api_visibility="private",
            )
        options = {"concurrency_limit": 1, "api_visibility": "private"}
        side.change(look_again, [chat.chatbot, side], panel, **options)
        compare_button.click(compare, chat.chatbot, answers, scroll_to_output=True, **options)
        # not queued, so that nobody waits for others; it computes nothing that a visitor chooses
        page.load(look_at_example, None, panel, queue=False, show_progress="hidden", api_visibility="private")
    return page.queue(max_size=MAX_WAITING)


def main() -> None:
    parser = argparse.ArgumentParser(description="A page to chat with LLaVA-HR about images.")
    parser.add_argument("--model", default=os.environ.get("MODEL", DEFAULT_MODEL), help="folder or Hub id")
    parser.add_argument("--port", type=int, default=None, help="7860 if free, or the next")
    # None: this machine only, except in a Space, which sets GRADIO_SERVER_NAME
    parser.add_argument("--host", default=None, help="127.0.0.1, this machine only; 0.0.0.0 for all")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    arguments = parser.parse_args()
    try:
        engine = Engine(str(arguments.model), arguments.max_new_tokens)
    except (OSError, ValueError) as error:
        sys.exit(f"error: `--model` (or the variable MODEL) must name a folder or Hub id of a LLaVA-HR: {error}")
    make_page(engine).launch(
        server_name=arguments.host,
        server_port=arguments.port,
        max_file_size=MAX_FILE_SIZE,
        # neither statistics nor contents of other visitors' questions
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(OwnPages)]},
        css_paths=HERE / "page.css",
        # no fonts from elsewhere: a visitor's browser contacts this server only
        theme=gr.themes.Soft(
            primary_hue="orange", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ).set(
            # a contrast of at least 4.5:1
            body_text_color_subdued="*neutral_600",
            block_info_text_color="*neutral_600",
            input_placeholder_color="*neutral_600",
            input_placeholder_color_dark="*neutral_300",
            checkbox_label_background_fill_selected="*primary_700",
            checkbox_label_background_fill_selected_dark="*primary_700",
            block_label_text_color="*primary_700",
            button_secondary_background_fill_hover_dark="*neutral_600",
        ),
    )


if __name__ == "__main__":
    main()
