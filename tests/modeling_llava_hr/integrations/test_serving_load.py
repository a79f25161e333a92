# SPDX-License-Identifier: Apache-2.0
"""
The server under load: many clients at once, each with an image and a question of its own. Every request is answered
or refused, nobody gets another's answer, and memory stays as it is. The short form runs with every `make test`, the
long one with `-m slow`.
"""

import asyncio
import contextlib
import itertools
import os
import socket
import time
from typing import NamedTuple

import openai
import pytest
from converted_checkpoints import ROOT, TINY_MODEL
from loopback_server import make_messages, run_server, to_data_url

from modeling_llava_hr.integrations import serve_requests
from training.tiny.fineprint import FinePrintConfig, draw_sample, get_questions


NAME = os.path.relpath(TINY_MODEL, ROOT)
PATIENCE = 3600  # seconds, as the last of many waits for all others
MAX_GROWTH = 64  # MB: 2,000 requests that each left 33 kB behind, a tenth of an image's views, would exceed it


class User(NamedTuple):
    """What somebody asks, and what FinePrint says is right."""

    image: str
    question: str
    right: str


def make_users(number: int) -> list[User]:
    config = FinePrintConfig(size=256, min_signs=2)
    users = []
    for index in itertools.count():
        image, scene = draw_sample(config, "test", index)
        questions = [(question, answer) for _, question, answer in get_questions(scene) if answer.isdigit()]
        if questions:
            users.append(User(to_data_url(image, "image/jpeg"), *questions[0]))
        if len(users) == number:
            return users


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with run_server(TINY_MODEL, tmp_path_factory.mktemp("server")) as address_and_process:
        yield address_and_process


async def ask(client: openai.AsyncOpenAI, user: User, stream: bool = False) -> str:
    messages = make_messages(user.question, user.image)
    options = {"temperature": 0, "max_tokens": 8, "stream": stream}
    answer = await client.chat.completions.create(model=NAME, messages=messages, **options)
    if not stream:
        return answer.choices[0].message.content
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


async def try_once(client: openai.AsyncOpenAI, user: User, stream: bool) -> str | None:
    """The answer, or `None` if the server says that it has too much to do."""
    try:
        return await ask(client.with_options(max_retries=0), user, stream)
    except openai.InternalServerError as error:
        assert error.status_code == 503
        return None


@pytest.mark.parametrize(
    ("num_users", "num_requests"),
    [pytest.param(40, 100, id="short"), pytest.param(200, 2000, id="long", marks=pytest.mark.slow)],
)
def test_nobody_is_lost_or_mixed_up_and_memory_is_flat(num_users, num_requests, server, capsys):
    users = make_users(num_users)
    address, process = server

    async def load() -> None:
        # whoever is refused comes again when the server says
        async with openai.AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", timeout=PATIENCE, max_retries=1000
        ) as client:
            alone = [await ask(client, user) for user in users]
            num_right = sum(answer.strip() == user.right for answer, user in zip(alone, users, strict=True))
            # otherwise a mix-up could go unnoticed
            assert len(set(alone)) > 0.8 * num_users and num_right > 0.5 * num_users

            streams = [bool(index % 2) for index in range(num_users)]
            at_once = await asyncio.gather(*map(try_once, [client] * num_users, users, streams))
            answered = [(answer, own) for answer, own in zip(at_once, alone, strict=True) if answer is not None]
            mixed_up = sum(answer.strip() != own.strip() for answer, own in answered)
            report = f"{num_users} concurrent: {len(answered)} answered, {num_users - len(answered)} refused"
            assert mixed_up == 0 and len(answered) >= min(num_users, serve_requests.MAX_REQUESTS), report

            before, start = process.memory_info().rss, time.monotonic()
            requests = iter(range(num_requests))

            async def keep_asking() -> int:
                wrong = 0
                for index in requests:
                    index %= num_users
                    answer = await ask(client, users[index], stream=streams[index])
                    wrong += answer.strip() != alone[index].strip()
                return wrong

            wrong = sum(await asyncio.gather(*(keep_asking() for _ in range(num_users))))
            growth = (process.memory_info().rss - before) / 2**20
            rate = num_requests / (time.monotonic() - start)
            with capsys.disabled():
                print(
                    f"\n{report}, {mixed_up} mixed up; {num_requests:,} requests of {num_users} clients: "
                    f"all answered, {wrong} mixed up, {growth:+.0f} MB, {rate:.1f} a second"
                )
            assert wrong == 0 and growth < MAX_GROWTH

    asyncio.run(load())


def test_requests_that_do_not_come_to_an_end_take_places_only_while_they_last(server):
    (user,) = make_users(1)
    address, _ = server
    host, port = address.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"

    async def come_last() -> None:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=PATIENCE) as client:
            with contextlib.ExitStack() as unfinished:
                for _ in range(serve_requests.MAX_REQUESTS):
                    connection = unfinished.enter_context(socket.create_connection((host, int(port))))
                    connection.sendall(head)
                until = time.monotonic() + serve_requests.MAX_SECONDS
                while await try_once(client, user, stream=False) is not None:  # until the last has arrived
                    assert time.monotonic() < until
                assert (await client.models.list()).data  # which takes no place
            assert await ask(client.with_options(max_retries=10), user)

    asyncio.run(come_last())
