# SPDX-License-Identifier: Apache-2.0
"""
A page to chat with LLaVA-HR about images, and to see what it sees of them:

    MODEL=llava-hr-7b-sft-1024-hf python app.py     # or --model, then http://127.0.0.1:7860
"""

import argparse
import html
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import torch
from engine import HAS_PACKAGE, TRUST_REMOTE_CODE, Engine, Look


try:
    import gradio as gr
    from gradio.components.chatbot import ChatbotDataMessages
    from starlette.datastructures import Headers
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ImportError as error:
    sys.exit(f'error: the page needs gradio ({error}): pip install ".[space]" in the checkout')


HERE = Path(__file__).parent
# Part of the checkout; a Space names a model of the Hub in its variable MODEL
TINY_MODEL = HERE.parent / "tiny-llava-hr"
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
<p>Sees an image twice: the whole at low resolution, and the fine print at high resolution. The sharper view costs the
language model no tokens.</p>"""
EMPTY = "<p class='hint'>Ask about an image, and see here what the model sees of it.</p>"
HEAT_HINT = """<p class='hint'>Orange: where the visual tokens would change most without the high-resolution
pathway.</p>"""
GATES_HINT = "<p class='hint'>The weight of the high-resolution view in each MR-Adapter, from -1 to 1.</p>"

CSS = """
.gradio-container { width: 100%; max-width: 1240px !important; margin: 0 auto; }
footer, #chat [aria-label="Share"] { display: none !important; }
#head h1 { font-size: 1.6rem; font-weight: 700; margin: 0; }
#head p { color: var(--body-text-color-subdued); margin: 0; }
.hint { color: var(--body-text-color-subdued); font-size: .8rem; line-height: 1.35; margin: 0; max-width: 60ch; }
#side [data-testid="block-info"] { background: none; padding: 0; color: var(--body-text-color); }
#side label { padding: .25rem .7rem; }
#side .wrap { gap: .4rem; }
#chat .user img { max-height: 180px; width: auto; }
#chat .example { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); padding: .75rem; }
#chat .example:hover { border-color: var(--primary-400); }
.facts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .5rem; }
.facts div { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--radius-lg); padding: .5rem .75rem; }
.facts b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.facts span, .gates span { color: var(--body-text-color-subdued); font-size: .8rem; }
.pair { flex-wrap: nowrap !important; gap: .75rem; }
.pair > * { min-width: 0 !important; }
.pair .column { gap: .4rem; }
.pair [data-testid="block-label"] { position: static; background: none; border: 0; box-shadow: none;
  color: var(--body-text-color); font-weight: 600; font-size: .85rem; padding: .5rem .6rem; }
.pair [data-testid="block-label"] span { display: none; }
.pair .image-container, .pair .image-container > button, .pair .image-frame { width: 100%; height: auto; }
.pair img { aspect-ratio: 1; width: 100% !important; height: auto !important; object-fit: contain !important;
  image-rendering: pixelated; }
.gates h3 { font-size: .85rem; font-weight: 600; margin: .5rem 0; }
.gates p { display: flex; justify-content: space-between; align-items: baseline; margin: 0; }
.gates b { font-size: .8rem; font-variant-numeric: tabular-nums; }
.gates div { position: relative; height: .5rem; border-radius: .25rem; margin: .15rem 0 .6rem;
  background: linear-gradient(90deg, transparent 49.6%, var(--body-text-color-subdued) 0 50.4%, transparent 0),
  var(--border-color-primary); }
.gates i { position: absolute; top: 0; bottom: 0; border-radius: .25rem; background: var(--primary-500); }
@media (max-width: 640px) {
  #head p { display: none; }
  #chat { height: 42vh !important; }
  #chat .user img { max-height: 110px; }
}
"""


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
    return f"<div class='gates'><h3>Gates of the MR-Adapters</h3>{bars}{GATES_HINT}</div>"


def to_error(error: Exception) -> gr.Error:
    """A message in the page, which renders it as HTML (unlike a validator's)."""
    return gr.Error(html.escape(str(error)), print_exception=False)


def describe_tokens(engine: Engine) -> str:
    """Such as "64 visual tokens (96, 128 px), 144 visual tokens (384 px)"."""
    sides = {}
    for side in engine.sides:
        sides.setdefault(engine.get_num_tokens(side), []).append(str(side))
    return "; ".join(f"{tokens} visual tokens at {', '.join(group)} px" for tokens, group in sides.items())


def to_messages(history: list[dict], message: dict | None = None) -> list[dict]:
    """The page's conversation in the chat template's form."""
    messages = [
        {
            "role": turn["role"],
            "content": [
                {"type": "image", "path": part["file"]["path"]}
                if part["type"] == "file"
                else {"type": "text", "text": part["text"]}
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

    def show(look: Look, seconds: float | None, encoded: str) -> tuple:
        views = (
            gr.update(value=look.low_res, label=f"Low-resolution view, {look.low_res_side} px"),
            gr.update(value=look.high_res, label=f"High-resolution view, {look.high_res.width} px"),
        )
        return draw_facts(look, seconds, encoded), gr.update(visible=True), *views, look.heat_map, draw_gates(look)

    def check(message: dict) -> dict:
        try:
            for path in message["files"]:
                engine.read(path)
        except ValueError as error:
            return gr.validate(False, str(error))
        return gr.validate(bool(message["text"].strip()), "Write a question about the image.")

    def answer(message: dict, history: list[dict], side: int) -> Iterator[tuple]:
        misses, encoded, look = engine.look.cache_info().misses, None, None
        try:
            for text, look, seconds in engine.answer(to_messages(history, message), side):
                if look is None:
                    yield text, *[gr.skip()] * len(panel)
                elif encoded is None:
                    encoded = "new" if engine.look.cache_info().misses > misses else "reused"
                    yield text, *show(look, None, encoded)
                else:
                    yield text, draw_facts(look, seconds, encoded), *[gr.skip()] * (len(panel) - 1)
            if look is not None:  # again, as a page that was still being built may have missed the first
                yield text, *show(look, seconds, encoded)
        except ValueError as error:
            raise to_error(error) from error
        except torch.OutOfMemoryError as error:
            raise gr.Error(OUT_OF_MEMORY) from error

    def look_again(history: list[dict], side: int) -> tuple:
        images = [part for turn in to_messages(history) for part in turn["content"] if part["type"] == "image"]
        if not images:
            return tuple([gr.skip()] * len(panel))
        try:
            return show(engine.look(engine.read(images[-1]["path"]), side), None, "new")
        except ValueError as error:
            raise to_error(error) from error
        except torch.OutOfMemoryError as error:
            raise gr.Error(OUT_OF_MEMORY) from error

    with gr.Blocks(title="LLaVA-HR", analytics_enabled=False, delete_cache=(KEEP_UPLOADS, KEEP_UPLOADS)) as page:
        gr.HTML(HEAD, elem_id="head")
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                side = gr.Radio(
                    [(f"{side} px", side) for side in engine.sides],
                    value=engine.processor.image_processor.size["height"],
                    label="High-resolution side",
                    info=describe_tokens(engine),
                    elem_id="side",
                )
                chat_column = gr.Column()
            with gr.Column(scale=4, min_width=340):
                facts = gr.HTML(EMPTY, elem_id="facts")
                with gr.Column(visible=False) as seen:
                    with gr.Row(elem_classes="pair"):
                        options = {"interactive": False, "buttons": ["fullscreen"], "format": "png"}
                        low_res = gr.Image(label="Low-resolution view", elem_id="low-res", **options)
                        high_res = gr.Image(label="High-resolution view", elem_id="high-res", **options)
                    with gr.Row(elem_classes="pair"):
                        with gr.Column():
                            heat_map = gr.Image(label="High-resolution contribution", elem_id="heat-map", **options)
                            gr.HTML(HEAT_HINT)
                        gates = gr.HTML(elem_id="gates")
        panel = [facts, seen, low_res, high_res, heat_map, gates]
        with chat_column:
            chat = gr.ChatInterface(
                answer,
                multimodal=True,
                chatbot=show_plain_text(
                    gr.Chatbot(
                        elem_id="chat",
                        height="min(52vh, 560px)",
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
        side.change(look_again, [chat.chatbot, side], panel, concurrency_limit=1, api_visibility="private")
    return page.queue(max_size=MAX_WAITING)


def main() -> None:
    parser = argparse.ArgumentParser(description="A page to chat with LLaVA-HR about images.")
    parser.add_argument("--model", default=os.environ.get("MODEL", TINY_MODEL), help="folder or Hub id")
    parser.add_argument("--port", type=int, default=None, help="7860 if free, or the next")
    # None: this machine only, except in a Space, which sets GRADIO_SERVER_NAME
    parser.add_argument("--host", default=None, help="127.0.0.1, this machine only; 0.0.0.0 for all")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
    arguments = parser.parse_args()
    if not HAS_PACKAGE and not TRUST_REMOTE_CODE:
        sys.exit(
            "error: the package modeling_llava_hr is not installed, so the model needs the code published with "
            "it. If you trust that code, set the variable TRUST_REMOTE_CODE to 1 (in a Space: Settings, Variables)."
        )
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
        css=CSS,
        # no fonts from elsewhere: a visitor's browser contacts this server only
        theme=gr.themes.Soft(
            primary_hue="orange", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        ),
    )


if __name__ == "__main__":
    main()
