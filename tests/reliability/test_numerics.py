# SPDX-License-Identifier: Apache-2.0
"""
Numerics: half precision near float32 at every resolution, finite numbers from constant images, the same answer alone
and in a batch, and runs that repeat bit for bit. `-s` prints the figures. (tests/conversion compares with the released
code.)
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chats import chat, tokenize
from converted_checkpoints import ROOT, TINY_MODEL
from PIL import Image
from tiny_configs import take_sample
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, BatchFeature, set_seed


IMAGES = [str(ROOT / "examples" / "pictures" / f"{name}.jpg") for name in ("street", "shelf", "table")]

# The paper's high resolutions (table 1), each with its low-resolution side
SIDES = [(336, 384), (336, 768), (448, 1024), (672, 1536)]
HALF = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Norm of the difference from float32, relative to the norm. Rounding to 8 or 11 bits of mantissa has an error of up to
# 2^-9 or 2^-12; some 250 of them follow each other and add up like a random walk: times sixteen.
BOUNDS = {torch.bfloat16: 16 * 2**-9, torch.float16: 16 * 2**-12}
# The same for float32's sums in another order (24 bits of mantissa, logits of size one)
FLOAT32_BOUND = 1e-5


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval().to(device)
    return model, AutoProcessor.from_pretrained(folder)


def ask(
    processor, *samples: list[Image.Image | str], question: str = "What does the sign say?", **sizes
) -> BatchFeature:
    """A batch of one chat per sample, each with its images and a question longer than the one before."""
    chats = [chat(" ".join([question, *["And why?"] * index]), *images) for index, images in enumerate(samples)]
    return tokenize(processor, chats, processor_kwargs={"padding": True, **sizes})


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected."""
    return ((actual.float() - expected).norm() / expected.norm()).item()


@torch.no_grad()
def compute(model, inputs: BatchFeature) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Image features, if there are images, and logits."""
    outputs = model(**BatchFeature(dict(inputs)).to(model.device, model.dtype))  # `to` works in place
    return outputs.image_outputs and outputs.image_outputs.pooler_output, outputs.logits


# --- half precision ---


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sides", SIDES, ids=lambda sides: f"{sides[1]}px")
def test_half_precision_stays_near_float32_at_every_resolution(converted_stage2, sides, device):
    """The layout of the published checkpoints, whose weights are bfloat16: what differs is the arithmetic alone."""
    model, processor = load(converted_stage2, device=device)
    inputs = ask(processor, IMAGES[:1], size=sides[1], low_res_size=sides[0])
    assert inputs["pixel_values"].shape[-1] == sides[1]
    # TF32 is a half precision too; for matrix products torch has it off by default
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = compute(model, inputs)
    for dtype in HALF:
        actual = compute(load(converted_stage2, dtype, device)[0], inputs)
        errors = [difference(*pair) for pair in zip(actual, expected, strict=True)]
        print(f"{dtype} at {sides[1]} px: features {errors[0]:.1e}, logits {errors[1]:.1e}, bound {BOUNDS[dtype]:.1e}")
        assert 0 < max(errors) < BOUNDS[dtype]  # zero would be float32 again


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_reads_the_same(dtype):
    """A trained model's answers, whose margins are larger than a rounding."""
    answers = []
    for precision in (torch.float32, dtype):
        model, processor = load(TINY_MODEL, precision)
        inputs = ask(processor, IMAGES[:1], question="What does the green sign say?").to(precision)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers[0] == answers[1]
    assert answers[0][0].strip()


# --- constant images ---


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_constant_images_give_finite_numbers(converted_stage2, dtype, backend):
    colors = ["black", "white", (127, 127, 127), (122, 116, 104), (255, 0, 0)]  # the fourth is CLIP's mean
    shapes = [(64, 64), (1, 1), (300, 10)]
    images = [Image.new("RGB", shape, color) for color in colors for shape in shapes]
    for folder, sizes in ((TINY_MODEL, {}), (converted_stage2, {"size": 128, "low_res_size": 56})):
        model, processor = load(folder, dtype)
        if backend == "pil":
            processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        inputs = ask(processor, *([image] for image in images), **sizes).to(dtype)
        with torch.no_grad():
            outputs = model(**inputs)
        encoded = outputs.image_outputs
        numbers = [outputs.logits, encoded.pooler_output, encoded.high_res_features, *encoded.mr_adapter_gates]
        assert all(tensor.isfinite().all() for tensor in numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_images_give_finite_gradients(dtype):
    """Layer norms divide by the standard deviation, which is zero in a constant image."""
    model, processor = load(TINY_MODEL, dtype)
    model.train()
    inputs = ask(processor, *([Image.new("RGB", (50, 50), color)] for color in ("black", "white"))).to(dtype)
    loss = model(**inputs, labels=inputs["input_ids"].clone()).loss
    loss.backward()
    assert loss.isfinite()
    assert [name for name, value in model.named_parameters() if not value.grad.isfinite().all()] == []


# --- batches ---


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_chat_gets_the_same_answer_alone_and_in_a_batch(dtype):
    """One, two and no images, different sizes and questions; padded to the longest."""
    samples = [IMAGES[:1], IMAGES[1:], []]
    model, processor = load(TINY_MODEL, dtype)
    batch = ask(processor, *samples).to(dtype)
    assert batch["attention_mask"].min() == 0  # something is padded
    _, logits = compute(model, batch)
    answers = generate(model, batch)
    errors = []
    for index in range(len(samples)):
        kept = batch["attention_mask"][index].bool()
        single = BatchFeature(take_sample(batch, tuple(map(len, samples)), index))
        errors.append(difference(compute(model, single)[1][0], logits[index, kept].float()))
        assert torch.equal(generate(model, single)[0], answers[index])
    bound = BOUNDS.get(dtype, FLOAT32_BOUND)
    print(f"{dtype}: logits differ by {max(errors):.1e} of their norm in a batch, bound {bound:.1e}")
    assert max(errors) < bound


def generate(model, inputs: BatchFeature) -> torch.Tensor:
    """Eight greedy tokens of each chat, without a stop at the end of an answer."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    return model.generate(**inputs.to(model.dtype), **settings)[:, inputs["input_ids"].shape[1] :]


# --- determinism ---


@pytest.fixture
def deterministic(monkeypatch) -> Iterator[None]:
    """The switch, which `set_seed(..., deterministic=True)` and training's `--full_determinism true` set as well."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for on a GPU
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_run_gives_the_same_bits(dtype, device, deterministic):
    """No operation without a deterministic form (torch would raise); answers, samples and three steps of training."""
    runs = []
    for _ in range(2):
        set_seed(0)
        model, processor = load(TINY_MODEL, dtype)
        model.to(device)
        inputs = ask(processor, IMAGES[:1], IMAGES[1:]).to(device, dtype)
        results = [generate(model, inputs), compute(model, inputs)[1]]
        results.append(model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0))
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            loss = model(**inputs, labels=inputs["input_ids"].clone()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            results.append(loss.detach())
        runs.append([*results, *(parameter.detach() for parameter in model.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert runs[0][3] != runs[0][5]  # the steps changed something


@pytest.mark.gpu
def test_the_resized_position_grid_has_no_deterministic_gradient_on_cuda(deterministic):
    """At other sides than the ViT's own, torch refuses (docs/reliability.md), unless the positions are frozen."""
    model, processor = load(TINY_MODEL, device="cuda")
    model.train()
    inputs = ask(processor, IMAGES[:1], size=512, low_res_size=112).to("cuda")  # 16 x 16 patches instead of 8 x 8
    with pytest.raises(RuntimeError, match="upsample_bicubic2d_aa_backward_out_cuda does not have a deterministic"):
        model(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
    model.model.vision_tower.embeddings.position_embedding.requires_grad_(False)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"].clone()).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
