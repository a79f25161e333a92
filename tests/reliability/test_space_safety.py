# SPDX-License-Identifier: Apache-2.0
"""
The Space among people who do not know each other: nobody reads the server's files or another's conversation, nothing
that users or models write is taken for HTML, and there is an end to what one can send.
"""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from converted_checkpoints import TINY_MODEL
from image_views import encode
from loopback_server import PATIENCE
from PIL import Image
from space_page import (
    MAX_NEW_TOKENS,
    SPACE,
    ask,
    get_answer,
    get_trained_side,
    import_engine,
    open_page,
    reply,
    run_browser,
    run_page,
    send,
    squeeze,
    wait_for_answer,
)

from training.tiny.fineprint import FinePrintConfig, draw_sample, get_questions


# The page with a model that says after its answer what it was asked: so users' texts are tried as answers, too
ECHO = """
import app

class Echo(app.Engine):
    def answer(self, messages, *args):
        for text, look, seconds in super().answer(messages, *args):
            yield text and text + " " + messages[-1]["content"][-1]["text"], look, seconds

app.Engine = Echo
app.main()
"""
HOSTILE = [
    "<script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1' class=harm>",
    "<svg onload='window.harmed = 1' class=harm></svg>",
    "<iframe srcdoc='<script>parent.harmed = 1</script>' class=harm></iframe>",
    "<a href='javascript:window.harmed = 1' class=harm>click</a>",
    "![picture](http://127.0.0.1:9/leak.png)",
    "[link](http://127.0.0.1:9/leak)",
    "<style class=harm>body { background: url(http://127.0.0.1:9/leak) }</style>",
    "</div></body><b class=harm>bold</b>",
    "&lt;b&gt; &amp;amp; $x^2$ `code`",
]
HARM = """document.querySelectorAll('.harm, #chat script, #chat iframe, #chat a:not([download]), #answers a').length
    + (window.harmed ?? 0)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("space")


@pytest.fixture(scope="module")
def served(folder):
    with run_page(TINY_MODEL, folder, "-c", ECHO) as served:
        yield served


@pytest.fixture(scope="module")
def address(served) -> str:
    return served[0]


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def engine():
    return import_engine().Engine(str(TINY_MODEL), MAX_NEW_TOKENS)


@pytest.fixture(scope="module")
def browser():
    with run_browser() as browser:
        yield browser


def upload(client: httpx.Client, name: str, file: bytes) -> httpx.Response:
    return client.post("/gradio_api/upload", files={"files": (name, file)})


def draw_secret() -> bytes:
    return encode(Image.effect_noise((64, 64), 100).convert("RGB"))


def test_only_this_machine_is_listened_to(served):
    _, process = served
    hosts = {connection.laddr.ip for connection in process.net_connections() if connection.status == "LISTEN"}
    assert hosts == {"127.0.0.1"}


@pytest.mark.parametrize("origin", ["http://example.com", "http://127.0.0.1:1", "null"])
def test_pages_of_other_sites_are_refused(client, address, folder, origin):
    """A browser sends such a request of a page of another site without asking; the page's own are answered."""
    for sender, status in ((origin, 403), (address, 200)):
        before = list((folder / "uploads").rglob("*.*"))
        headers = {"origin": sender}
        answers = [
            client.post("/gradio_api/upload", files={"files": ("own.png", draw_secret())}, headers=headers),
            client.get("/config", headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [status, status]
        stored = set((folder / "uploads").rglob("*.*")) - set(before)
        assert len(stored) == (status == 200)
    join = {"fn_index": 0, "data": [], "session_hash": "abc"}
    assert client.post("/gradio_api/queue/join", json=join, headers={"origin": origin}).status_code == 403


def test_a_proxy_on_the_same_machine_says_what_its_name_is(client):
    headers = {"origin": "https://ask.example.com", "x-forwarded-host": "ask.example.com"}
    assert client.get("/config", headers=headers).status_code == 200
    assert client.get("/config", headers={"host": "ask.example.com", **headers}).status_code == 200
    assert client.get("/config", headers={"host": "ask.example.com"}).status_code == 200


def test_code_of_a_repository_runs_only_if_whoever_set_up_the_page_says_so(tmp_path):
    for file in SPACE.glob("*.py"):
        shutil.copy(file, tmp_path)
    hidden = "import importlib.util; importlib.util.find_spec = lambda *a, f=importlib.util.find_spec: "
    hidden += "None if a[0] == 'modeling_llava_hr' else f(*a); import app; app.main()"
    command = [sys.executable, "-c", hidden, "--model", "a-repository-that-might-be-a-folder-here"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "set the variable TRUST_REMOTE_CODE to 1" in ended.stderr


def get_status(client: httpx.Client, path: str) -> int:
    """Sends a path as it is; httpx takes `..` out of it."""
    with contextlib.closing(http.client.HTTPConnection(client.base_url.host, client.base_url.port)) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


@pytest.mark.parametrize("form", ["/gradio_api/file={}", "/gradio_api/file/{}", "/file={}", "/file/{}", "/static/{}"])
def test_no_file_of_the_server_is_readable(client, folder, form):
    (folder / "secret.png").write_bytes(draw_secret())
    path = upload(client, "own.png", draw_secret()).json()[0]
    paths = [
        "/etc/passwd",
        "/proc/self/environ",
        SPACE / "app.py",
        "app.py",
        "engine.py",
        "../../setup.cfg",
        TINY_MODEL / "config.json",
        folder / "secret.png",
        folder / "log",
        Path(path).parent,
        f"{path}/../../../secret.png",
        f"{folder}/uploads/../secret.png",
        f"{folder}/uploads/..%2fsecret.png",
        f"{folder}/uploads/%2e%2e/secret.png",
        f"{folder}/uploads/..\\secret.png",
        "..%2f..%2f..%2f..%2f..%2fetc/passwd",
        f"file://{folder}/secret.png",
        f"{path}%00.png",
    ]
    answers = {str(path): get_status(client, form.format(path)) for path in paths}
    assert {path: status for path, status in answers.items() if status not in (403, 404)} == {}
    if form == "/gradio_api/file={}":
        assert get_status(client, form.format(path)) == 200  # so the form is right


def forge(path: str) -> dict:
    return {"path": path, "url": path, "orig_name": "a.png", "size": 9, "mime_type": "image/png"} | {
        "meta": {"_type": "gradio.FileData"}
    }


def get_askable(client: httpx.Client, kind: str) -> dict[int, list[str]]:
    """What the page can ask for: number -> types of the inputs, of which one is `kind`."""
    config = client.get("/config").json()
    types = {component["id"]: component["type"] for component in config["components"]}
    inputs = {entry["id"]: [types[number] for number in entry["inputs"]] for entry in config["dependencies"]}
    return {number: types for number, types in inputs.items() if kind in types}


def join(client: httpx.Client, number: int, data: list, session: str) -> int:
    """Status of a request to be answered."""
    body = {"data": data, "fn_index": number, "session_hash": session, "trigger_id": None}
    return client.post("/gradio_api/queue/join", json=body).status_code


def succeeds(client: httpx.Client, number: int, data: list, session: str) -> bool:
    if join(client, number, data, session) != 200:
        return False
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in stream.iter_lines():
            event = json.loads(line.removeprefix("data:") or "{}")
            if event.get("msg") == "process_completed":
                return event["success"]
    raise AssertionError("the answer has no end")


def test_no_file_or_address_is_accepted_as_an_image(client, folder):
    """By way of everything that the page can ask for."""
    (folder / "secret.png").write_bytes(draw_secret())
    own = upload(client, "own.png", draw_secret()).json()[0]
    askable = get_askable(client, "multimodaltextbox") | get_askable(client, "chatbot")

    def offer(path: str) -> list[bool]:
        values = {
            "multimodaltextbox": {"text": "What is shown?", "files": [forge(path)]},
            "chatbot": [
                {"role": "user", "content": [{"type": "file", "file": forge(path)}]},
                {"role": "user", "content": [{"type": "text", "text": "What is shown?"}]},
            ],
            "radio": 256,
            "state": [],
        }
        return [
            succeeds(client, number, [values.get(kind) for kind in kinds], f"{abs(hash(path))}-{number}")
            for number, kinds in askable.items()
        ]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        before = {path for path in (folder / "uploads").rglob("*") if path.is_file()}
        for path in (
            str(folder / "secret.png"),
            f"{Path(own).parent}/../../secret.png",
            str(SPACE / "shelf.jpg"),
            "/etc/passwd",
            f"http://127.0.0.1:{listener.getsockname()[1]}/a.png",
        ):
            assert not any(offer(path)), path
        with pytest.raises(BlockingIOError):  # nobody came
            listener.accept()
    assert {path for path in (folder / "uploads").rglob("*") if path.is_file()} == before
    assert any(offer(own))  # so the form is right


def test_uploads_have_an_end_and_are_not_run(client):
    assert upload(client, "large.png", bytes(11 * 2**20)).status_code == 413
    harmful = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    for name in ("a.html", "a.svg", "a.png", "../../../a.html", "<b>.html"):
        (path,) = upload(client, name, harmful).json()
        answer = client.get(f"/gradio_api/file={path}")
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind == "image/png" or answer.headers["content-disposition"].startswith("attachment"), answer.headers
        assert ".." not in path and "<" not in path


def test_counts_and_contents_of_others_are_not_shown(client):
    for path in ("/monitoring", "/monitoring/summary", "/gradio_api/runs", "/gradio_api/run-history/records"):
        assert client.get(path).status_code in (403, 404), path


def test_nothing_that_is_written_is_html(browser, address, engine):
    with open_page(browser, address) as page:
        text, image = "\n".join(HOSTILE), str(SPACE / "shelf.jpg")
        said = get_answer(engine, [ask(text, image)], get_trained_side(engine))
        send(page, text, image)
        wait_for_answer(page, 0, f"{said} {text}")
        assert squeeze(page.locator("#chat .user.message").last.inner_text()) == squeeze(text)
        page.click("#compare")
        page.wait_for_selector("#answers .answers:not([aria-busy])")
        assert page.locator("#answers p").count() == len(engine.sides)
        for answer in page.locator("#answers p").all():
            assert squeeze(answer.inner_text()).endswith(squeeze(text))
        assert page.evaluate(HARM) == 0


def test_name_of_a_file_is_not_html(browser, address):
    with open_page(browser, address) as page:
        name = "it's <img src=x onerror='window.harmed = 1' class=harm> & co.png"
        send(page, "What is this?", {"name": name, "mimeType": "image/png", "buffer": b"not an image"})
        page.wait_for_selector("text=& co.png is not an image that can be read")
        assert page.evaluate(HARM) == 0
        assert "Traceback" not in page.inner_text("body")
        assert page.locator("#chat .user.message").count() == 0


@pytest.mark.parametrize(
    ("num_users", "num_turns"),
    [pytest.param(3, 2, id="short"), pytest.param(12, 8, id="long", marks=pytest.mark.slow)],
)
def test_visitors_do_not_get_each_others_answers(browser, address, engine, num_users, num_turns, tmp_path, capsys):
    images, chats, views = [], [[] for _ in range(num_users)], []
    for index in range(num_users):
        file, scene = draw_sample(FinePrintConfig(size=256, min_signs=2), "test", index)
        (tmp_path / f"{index}.jpg").write_bytes(file)
        images.append(str(tmp_path / f"{index}.jpg"))
        questions = [question for _, question, _ in get_questions(scene)]
        for turn in range(num_turns):
            question = questions[turn % len(questions)]
            chats[index].append(ask(question, *images[-1:] if turn == 0 else ()))
            said = get_answer(engine, chats[index], get_trained_side(engine))
            chats[index].append(reply(f"{said} {question}"))
    answers = [tuple(message["content"][0]["text"] for message in chat[1::2]) for chat in chats]
    assert len(set(answers)) > num_users / 2  # otherwise a mix-up could go unnoticed
    with contextlib.ExitStack() as visits:
        pages = [visits.enter_context(open_page(browser, address)) for _ in range(num_users)]
        for turn in range(num_turns):
            for page, chat, image in zip(pages, chats, images, strict=True):
                send(page, chat[2 * turn]["content"][-1]["text"], None if turn else image)
            for page, chat in zip(pages, chats, strict=True):
                wait_for_answer(page, turn, chat[2 * turn + 1]["content"][0]["text"])
        for page in pages:
            page.wait_for_selector("#high-res img")
            views.append(page.locator("#high-res img").get_attribute("src"))
            assert page.locator("#chat .bot.message").count() == num_turns
        assert len(set(views)) == num_users
    with capsys.disabled():
        print(f"\n{num_users} browsers: {num_users * num_turns} questions answered, 0 mixed up")


def test_queue_has_an_end(client, browser, address):
    askable = get_askable(client, "multimodaltextbox")
    number, kinds = next((number, kinds) for number, kinds in askable.items() if "radio" in kinds)
    values = {"multimodaltextbox": {"text": "What is shown?", "files": []}, "radio": 256, "chatbot": [], "state": []}
    data = [values.get(kind) for kind in kinds]
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda index: join(client, number, data, f"queue{index}"), range(100)))
    assert set(statuses) == {200, 503} and statuses.count(503) > 1
    with open_page(browser, address) as page:  # the page goes on
        page.wait_for_selector("#ask textarea")
