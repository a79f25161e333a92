# SPDX-License-Identifier: Apache-2.0
"""Long documents and videos, with the tiny model and with the recorded checkpoint's shapes."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from examples.long_document import split


PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
SCENES = [Image.open(PICTURES / f"{name}.jpg").convert("RGB") for name in ("street", "receipt", "shelf")]
QUESTION = ("--question", "What does the green sign say?", "--max_new_tokens", "6")


@pytest.fixture
def run(tiny_model, monkeypatch, capsys):
    def run(name: str, *arguments, model=tiny_model) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--model", str(model)])
        capsys.readouterr()
        importlib.import_module(f"examples.{name}").main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def page(tmp_path) -> Path:
    """Three scenes below each other."""
    tall = Image.new("RGB", (256, 768))
    for index, scene in enumerate(SCENES):
        tall.paste(scene, (0, 256 * index))
    tall.save(tmp_path / "page.png")
    return tmp_path / "page.png"


sides = st.integers(1, 3000)


@settings(max_examples=200, deadline=None)
@given(width=sides, height=sides, overlap=st.floats(0, 0.5))
def test_squares_cover_the_image_and_overlap(width, height, overlap):
    boxes = split(Image.new("1", (width, height)), overlap)
    short, long = sorted((width, height))
    if len(boxes) == 1:
        assert boxes == [(0, 0, width, height)] and long <= 1.25 * short
        return
    assert all(right - left == bottom - top == short for left, top, right, bottom in boxes)
    starts = [max(left, top) for left, top, _, _ in boxes]
    assert starts[0] == 0 and starts[-1] == long - short
    assert all(
        second - first <= short - overlap * short + 1 for first, second in zip(starts, starts[1:], strict=False)
    )


def test_each_square_is_answered_as_by_itself(run, page, tmp_path):
    alone = [run("ask", "--image", PICTURES / f"{name}.jpg", *QUESTION)[0] for name in ("street", "receipt", "shelf")]
    Image.open(page).save(tmp_path / "lossless.png")
    lines = run("long_document", page, "--overlap", 0, "--batch_size", 2, *QUESTION)
    assert [line.partition(": ")[0] for line in lines] == [
        f"page.png, pixels 0-256 x {top}-{top + 256}" for top in (0, 256, 512)
    ]
    assert [line.partition(": ")[2] for line in lines] == alone and alone[0] == "1471"


def test_pages_of_a_pdf_are_named(run, tmp_path, converted):
    SCENES[0].save(
        tmp_path / "two.pdf", save_all=True, append_images=[Image.open(PICTURES / "table.jpg").resize((90, 256))]
    )
    lines = run("long_document", tmp_path / "two.pdf", *QUESTION, model=converted["stage2-1024"])
    names = [re.match(r"two.pdf, page (\d), pixels", line)[1] for line in lines]
    assert names[0] == "1" and names.count("2") == len(names) - 1 >= 3
    *names, answer = run("long_document", tmp_path / "two.pdf", "--together", *QUESTION)
    assert len(names) == len(lines) and answer


@pytest.mark.parametrize("unpad", [False, True])
def test_frames_of_a_video_cost_144_tokens_each(run, tmp_path, converted, unpad, monkeypatch):
    av = pytest.importorskip("av", reason="videos need PyAV: the extra [examples]")
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 256, 144
        for index in range(30):
            frame = SCENES[index // 10].crop((0, 56, 256, 200))
            film.mux(stream.encode(av.VideoFrame.from_image(frame)))
        film.mux(stream.encode())
    from modeling_llava_hr import LlavaHrModel

    counts = []
    mask = LlavaHrModel.get_placeholder_mask
    monkeypatch.setattr(
        LlavaHrModel, "get_placeholder_mask", lambda *args: counts.append(int(mask(*args).sum())) or mask(*args)
    )
    options = ["--num_frames", 3, *QUESTION, *(["--unpad"] if unpad else [])]
    (line,) = run("video", tmp_path / "film.mp4", *options, model=converted["stage2-1024"])
    assert re.match(r"frames at 0\.0, \d\.\d, 2\.\d s: ", line)
    assert counts[0] == 3 * (8 * 12 if unpad else 144)  # of 12 x 12 cells, 8 rows of a 16:9 frame show something
