# SPDX-License-Identifier: Apache-2.0
"""
Bad images: whatever is given as one, each entry point gives a result or a ValueError that names the input; in time,
without a crash, and without keeping memory. The short form runs with every `make test`, the long one with `-m slow`.
"""

import contextlib
import ctypes
import faulthandler
import gc
import io
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import PIL
import psutil
import pytest
import torch
from converted_checkpoints import TINY_MODEL
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from image_views import SMALL
from odd_images import Odd, draw, make_files, odd_files, odd_inputs
from PIL import EpsImagePlugin, Image
from space_page import import_engine
from transformers import AutoProcessor, pipeline

from modeling_llava_hr import LlavaHrImageProcessor, LlavaHrImageProcessorPil
from training.check_data import CheckOptions, check_data


GOOD = draw()

MAX_SECONDS = 30  # for one image, on a busy machine; the slowest usually needs a fraction of a second
# MB in the second half of the inputs. In the long form, a leak of 2 kB per image exceeds it; in the short one, modules
# loaded at their first use may come late.
MAX_GROWTH = {"short": 32, "long": 10}
M_ARENA_MAX = -8  # of glibc's malloc.h
# Messages about the second of two images, or about a list in its place
NAMES_SECOND = r"`images\[1\]|Image [1-9]\d* of `images`|`images` (is nested|mixes)"
RUN_SIZE = 500  # inputs that Hypothesis draws in one run
# So that bombs are cheap: Pillow warns of images with more pixels than this, and refuses twice as many
MAX_PIXELS = 10**6


def forms(short: int, long: int) -> pytest.MarkDecorator:
    """Numbers of inputs with every `make test`, and with `-m slow`."""
    values = [pytest.param(short, id="short"), pytest.param(long, id="long", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("num_examples", values)


class TooSlow(BaseException):
    """Not an `Exception`, which an image reader might take for a broken file."""


@contextlib.contextmanager
def time_limit(label: str) -> Iterator[None]:
    """Raises TooSlow in Python code after MAX_SECONDS, and ends the process where C code hangs for thrice as long."""

    def stop(*_):
        raise TooSlow(f"{label} took more than {MAX_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    faulthandler.dump_traceback_later(3 * MAX_SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def only_warnings_of_pillow() -> Iterator[None]:
    """Pillow may warn that a file is broken or nearly a bomb; any other warning fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    folder = os.path.dirname(PIL.__file__)
    others = [
        str(warning)
        for warning in caught
        if not warning.filename.startswith(folder) and warning.category is not Image.DecompressionBombWarning
    ]
    assert not others, others


class Tally:
    """
    Tries inputs, and counts results and errors.

    Args:
        what (`str`): Where the inputs go, for the report.
        names_input (`str`): A regular expression that every message must contain.
        num_examples (`int`): Number of inputs. Memory is first measured after half of them, when caches and the
            allocator's pools are full.
    """

    def __init__(self, what: str, names_input: str, num_examples: int):
        self.what, self.names_input, self.warm_up = what, names_input, -(-num_examples // 2)
        self.num_results = self.num_errors = 0
        self.slowest, self.memory = (0.0, "nothing"), None

    @property
    def num_inputs(self) -> int:
        return self.num_results + self.num_errors

    def __call__(self, odd: Odd, use: Callable, check: Callable | None = None) -> ValueError | None:
        """Uses an input and checks the result, or that the error names the input; returns the error."""
        start, error = time.perf_counter(), None
        try:
            with time_limit(odd.label), only_warnings_of_pillow():
                result = use(odd.thing)
        except ValueError as raised:
            error = raised
            assert re.search(self.names_input, str(error)), f"{odd}: the message names no input: {error}"
            assert len(str(error)) < 1000, f"{odd}: a message of {len(str(error))} characters"
            self.num_errors += 1
        else:
            if check is not None:
                with time_limit(odd.label), only_warnings_of_pillow():
                    check(odd, result)
            self.num_results += 1
        self.slowest = max(self.slowest, (time.perf_counter() - start, odd.label))
        if self.num_inputs == self.warm_up:
            self.memory = measure_memory()
        return error

    def report(self, capsys: pytest.CaptureFixture) -> None:
        """Prints the figures, and fails if memory grew or one of the two outcomes never came up."""
        growth = measure_memory() - self.memory
        with capsys.disabled():
            print(
                f"\n{self.num_inputs:,} images {self.what}: {self.num_results:,} results, {self.num_errors:,} clear "
                f"errors, slowest {self.slowest[0]:.2f} s ({self.slowest[1]}), memory {growth:+.0f} MB"
            )
        assert self.num_results and self.num_errors
        assert growth < MAX_GROWTH["long" if self.num_inputs >= 1000 else "short"]


def measure_memory() -> float:
    """Resident memory of this process in MB."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def fuzz(strategy: st.SearchStrategy[Odd], num_examples: int, try_one: Callable[[Odd], None]) -> None:
    """
    Tries inputs. The same number gives the same ones. Hypothesis keeps some kilobytes of each until a run ends: there
    are several runs, so that growth is not its own.
    """
    for start in range(0, num_examples, RUN_SIZE):

        @seed(start)
        @settings(
            max_examples=min(RUN_SIZE, num_examples - start),
            database=None,
            deadline=None,  # `time_limit` ends what hangs
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run(odd):
            try_one(odd)

        run()


@pytest.fixture(autouse=True)
def small_bombs(monkeypatch):
    make_files()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS)


@pytest.fixture(scope="module")
def processor():
    """The tiny model's, with views so small that only reading takes time."""
    processor = AutoProcessor.from_pretrained(TINY_MODEL)
    processor.image_processor = LlavaHrImageProcessor(size=64, low_res_size=56, patch_size=7)
    return processor


def check_views(odd: Odd, views: dict) -> None:
    """Shapes, and values that an image can have."""
    low, high = views["low_res_pixel_values"], views["pixel_values"]
    statistics = LlavaHrImageProcessor.image_mean, LlavaHrImageProcessor.image_std
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == (len(high), 3, 28, 28) and high.shape[1:] == (3, 64, 64), odd
    for view in (low, high):
        values = view * std + mean
        assert torch.isfinite(values).all(), odd
        assert -1e-4 < values.min() and values.max() < 1 + 1e-4, odd


# The backends differ by at most 2 of 255 levels; the low-resolution view interpolates and differs by no more
TOLERANCE = 2 / 255 / min(LlavaHrImageProcessor.image_std) + 1e-4


@forms(250, 10_000)
def test_image_processors(num_examples, tmp_path, capsys):
    """Both backends give the same views of an image or both refuse it; the image before it is unharmed."""
    backends = LlavaHrImageProcessor(**SMALL), LlavaHrImageProcessorPil(**SMALL)
    alone = [backend(GOOD, return_tensors="pt") for backend in backends]
    tally = Tally("through both image processors", NAMES_SECOND, num_examples)

    def use(thing):
        # read once: Pillow reads some damaged files differently each time
        images = backends[0].fetch_images([GOOD, thing])
        return [backend(images, return_tensors="pt") for backend in backends]

    def check(odd, results):
        for views, good in zip(results, alone, strict=True):
            check_views(odd, views)
            for name in ("pixel_values", "low_res_pixel_values"):
                torch.testing.assert_close(views[name][:1], good[name], atol=1e-5, rtol=0)
        for name in ("pixel_values", "low_res_pixel_values"):
            assert len(results[0][name]) == len(results[1][name]) > 1, odd
            assert (results[0][name] - results[1][name]).abs().max() <= TOLERANCE, odd

    def try_one(odd):
        if tally(odd, use, check) is not None:
            for backend in backends:  # `use` stopped at the first
                with pytest.raises(ValueError), only_warnings_of_pillow():
                    backend([GOOD, odd.thing], return_tensors="pt")

    for name, content in make_files().items():
        try_one(Odd(name, content))
    fuzz(odd_inputs(tmp_path), num_examples, try_one)
    tally.report(capsys)


@forms(40, 1000)
def test_pipeline(num_examples, processor, tmp_path, capsys):
    pipe = pipeline("image-text-to-text", model=str(TINY_MODEL), processor=processor)
    tally = Tally(
        "through the pipeline",
        r"`images\[0\]|Image \d+ of `images`|`images` (is nested|mixes)|Sample 0 has 1 <image>|Found 1 <image>",
        num_examples,
    )

    def use(thing):
        content = [{"type": "image", "image": thing}, {"type": "text", "text": "What?"}]
        return pipe([{"role": "user", "content": content}], max_new_tokens=1, return_full_text=False)

    def check(odd, outputs):
        assert [type(output["generated_text"]) for output in outputs] == [str], odd

    fuzz(odd_inputs(tmp_path), num_examples, lambda odd: tally(odd, use, check))
    tally.report(capsys)


@forms(250, 3000)
def test_data_check(num_examples, tmp_path, capsys, monkeypatch):
    """`training.check_data` names exactly the rows whose images cannot be read."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    if sys.platform == "linux":  # one heap for the check's threads: their own ones never shrink
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    files, batch = {}, 250
    for name, content in make_files().items():
        files[f"{len(files)}.png"] = Odd(name, content)
    fuzz(odd_files(), num_examples, lambda odd: files.setdefault(f"{len(files)}.png", odd))
    tally = Tally("through the data check", r"\.png'", len(files))
    image_processor = LlavaHrImageProcessorPil(**SMALL)
    num_broken = 0

    def use(content, name, is_broken):
        if is_broken:
            raise ValueError(f"image '{name}'")
        return image_processor(tmp_path / name, return_tensors="pt")

    for start in range(0, len(files), batch):
        part = dict(list(files.items())[start : start + batch])
        rows = []
        for name, odd in part.items():
            (tmp_path / name).write_bytes(odd.thing)
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "An image."}]
            rows.append({"id": name, "image": name, "conversations": turns})
        data = tmp_path / f"data-{start}.json"
        data.write_text(json.dumps(rows))
        with only_warnings_of_pillow():
            found = check_data(CheckOptions(str(data)))
        lines = capsys.readouterr()
        broken = re.findall(r"id '(\d+\.png)'\): image '[^']*/\1' is broken: ", lines.out + lines.err)
        assert len(broken) == found
        num_broken += found
        for name, odd in part.items():
            if name in broken:
                with pytest.raises(ValueError), only_warnings_of_pillow():
                    image_processor(tmp_path / name)
            tally(odd, partial(use, name=name, is_broken=name in broken), check_views)
    assert num_broken == tally.num_errors
    tally.report(capsys)


@forms(40, 1000)
def test_space(num_examples, tmp_path, capsys):
    """The page can show what it accepts; everything else is refused by name when it is sent."""
    engine = import_engine().Engine(str(TINY_MODEL), max_new_tokens=1)
    side = min(engine.sides)
    tally = Tally("through the Space", r"^upload\.png ", num_examples)
    path = tmp_path / "upload.png"

    def check(odd, content):
        look = engine.look(content, side)
        assert torch.isfinite(look.features).all(), odd
        assert look.high_res.size == look.low_res.size == look.heat_map.size == (side, side), odd
        assert np.isfinite([gate for _, gate in look.gates]).all(), odd

    def try_one(odd):
        path.write_bytes(odd.thing)
        tally(odd, lambda content: engine.read(str(path)), check)

    fuzz(odd_files(), num_examples, try_one)
    tally.report(capsys)


@pytest.mark.parametrize("content", ["EPS RGB", "PostScript that never ends"])
def test_postscript_is_not_run(monkeypatch, content):
    """Pillow hands it to Ghostscript where that is installed."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("it was run"))
    for image in (make_files()[content], Image.open(io.BytesIO(make_files()[content]))):
        with pytest.raises(ValueError, match="(`images.1.`|Image 1 of `images`).*PostScript"):
            LlavaHrImageProcessor(**SMALL)([GOOD, image])


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", str(tmp_path / "pipe.png")):
        with time_limit("a pipe"), pytest.raises(ValueError, match=r"`images\[1\]` cannot be read .*pipe\.png"):
            LlavaHrImageProcessor(**SMALL)([GOOD, path])


def test_a_hang_would_be_noticed(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MAX_SECONDS", 0.1)
    with pytest.raises(TooSlow, match="a sleeper took more than"):
        Tally("", "", 1)(Odd("a sleeper", 5), time.sleep)


def test_a_leak_would_be_noticed(capsys):
    kept, tally = [], Tally("that are kept", "kept", 4)

    def keep(number):
        kept.append(b"x" * 2**26)  # too large to come from what was freed before
        if number % 2:
            raise ValueError("kept")

    for number in range(5):
        tally(Odd(str(number), number), keep)
    with pytest.raises(AssertionError, match=f"< {MAX_GROWTH['short']}"):
        tally.report(capsys)
