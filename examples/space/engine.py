# SPDX-License-Identifier: Apache-2.0
"""
The page's model: loads LLaVA-HR, encodes each image once, streams answers, and finds where the high-resolution pathway
contributed.
"""

import importlib.util
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BaseImageProcessor,
    BitsAndBytesConfig,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling


# Encoded images that are kept: 8 MB each for a 7B model at 1024 pixels
MAX_ENCODED = 16
# The choices of the high-resolution side, by the side that the model was trained with: 384 to 1536 for 1024 pixels
SIDES = (3 / 8, 1 / 2, 3 / 4, 1, 3 / 2)
# For activations, the cache of a long chat, and CUDA itself
HEADROOM = 1.25
HEAT_COLOR = (255, 122, 0)
# Upper bound for any tokenizer; the longest tokens in use are runs of spaces
MAX_CHARACTERS_PER_TOKEN = 128

# Where the package is not installed, the code that was published with the weights runs, if the variable allows it
HAS_PACKAGE = importlib.util.find_spec("modeling_llava_hr") is not None
TRUST_REMOTE_CODE = not HAS_PACKAGE and os.environ.get("TRUST_REMOTE_CODE") == "1"
if HAS_PACKAGE:
    import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)


@dataclass(frozen=True)
class Look:
    """
    An encoded image.

    Args:
        features (`torch.Tensor` of shape `(1, tokens, D)`): Input of the language model.
        low_res, high_res (`PIL.Image.Image`): The two views, both at the high-resolution side.
        heat_map (`PIL.Image.Image`): The image in grey, coloured where the high-resolution pathway contributed.
        low_res_side (`int`): Side of the low-resolution view in pixels.
        gates (`tuple[tuple[int, float], ...]`): Index of the ViT layer after an MR-Adapter, and its gate (mean
            over the channels).
    """

    features: torch.Tensor
    low_res: Image.Image
    high_res: Image.Image
    heat_map: Image.Image
    low_res_side: int
    gates: tuple[tuple[int, float], ...]

    @property
    def num_tokens(self) -> int:
        """Visual tokens."""
        return self.features.shape[1]


def get_quantization(num_parameters: int, memory: int) -> BitsAndBytesConfig | None:
    """
    4-bit loading, if the weights in bfloat16 do not fit.

    Args:
        num_parameters (`int`): Of the model.
        memory (`int`): Of the GPU, in bytes.
    """
    if 2 * num_parameters * HEADROOM <= memory:
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def load_model(name: str) -> torch.nn.Module:
    """
    A model for the machine at hand: float32 on a CPU, bfloat16 on a GPU, 4-bit on a small one.

    Args:
        name (`str`): Folder or Hub id.
    """
    if not torch.cuda.is_available():
        options = {"dtype": torch.float32, "trust_remote_code": TRUST_REMOTE_CODE}
        return AutoModelForImageTextToText.from_pretrained(name, **options)
    config = AutoConfig.from_pretrained(name, trust_remote_code=TRUST_REMOTE_CODE)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, trust_remote_code=TRUST_REMOTE_CODE)
    quantization = get_quantization(empty.num_parameters(), torch.cuda.mem_get_info()[1])
    options = {"dtype": torch.bfloat16, "device_map": "auto", "quantization_config": quantization}
    return AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=TRUST_REMOTE_CODE, **options)


@contextmanager
def high_res_silenced(vision_tower: torch.nn.Module) -> Iterator[None]:
    """Zeroes the high-resolution pathway, both in the adapters and in the fusion."""
    ways = [vision_tower.fusion.high_res_proj, *(adapter.high_res_mapping for adapter in vision_tower.mr_adapters)]
    hooks = [way.register_forward_hook(lambda module, args, output: torch.zeros_like(output)) for way in ways]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def get_high_res_contribution(
    model: torch.nn.Module, pixel_values: torch.Tensor, low_res_pixel_values: torch.Tensor
) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
    """
    Encodes images, and finds where the high-resolution pathway contributed. No other thread may use the model's vision
    tower meanwhile.

    Args:
        model ([`LlavaHrForConditionalGeneration`]): The model.
        pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`): Images as the high-resolution pathway sees them.
        low_res_pixel_values (`torch.Tensor` of shape `(images, 3, L, L)`): Low-resolution views.

    Returns:
        What `get_image_features` returns, and the heat `(images, g, g)`: the length by which each fused feature
        (equation 2 of the paper) moves if the high-resolution pathway is zeroed.
    """
    encoded = model.get_image_features(pixel_values, low_res_pixel_values, return_dict=True)
    vision_tower = model.model.vision_tower
    stride = vision_tower.high_res_tower.stride  # the smallest view will do, as it is zeroed
    with high_res_silenced(vision_tower):
        silent = vision_tower(pixel_values[:, :, :stride, :stride], low_res_pixel_values, return_dict=True)
    heat = (encoded.last_hidden_state - silent.last_hidden_state).float().norm(dim=-1)  # (images, g * g)
    grid = low_res_pixel_values.shape[-1] // model.config.vision_config.patch_size
    return encoded, heat.unflatten(1, (grid, grid))


def get_sides(image_processor: BaseImageProcessor) -> dict[int, int]:
    """
    The high-resolution sides to choose from, each with its low-resolution side, in pixels. The latter, and so the
    number of visual tokens, stays the one of training where the two grids fit.

    Args:
        image_processor ([`LlavaHrImageProcessor`] or [`LlavaHrImageProcessorPil`]): The model's.
    """
    patch_size, stride = image_processor.patch_size, image_processor.high_res_stride
    low_res_side = image_processor.get_low_res_size()
    grid = low_res_side // patch_size
    sides = {}
    for side in (int(image_processor.size["height"] * share) for share in SIDES):
        high_res_grid, rest = divmod(side, stride)
        if high_res_grid and not rest:
            fits = high_res_grid <= grid or high_res_grid % grid == 0
            sides[side] = low_res_side if fits else high_res_grid * patch_size
    return sides


class Engine:
    """
    A model that answers questions about images.

    Args:
        name (`str`): Folder or Hub id of a model with its processor.
        max_new_tokens (`int`, *optional*, defaults to 256): Longest answer.
    """

    def __init__(self, name: str, max_new_tokens: int = 256):
        self.max_new_tokens = max_new_tokens
        self.model = load_model(name)
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=TRUST_REMOTE_CODE)
        self.sides = get_sides(self.processor.image_processor)
        self.look = lru_cache(maxsize=MAX_ENCODED)(self._look)
        self._lock = threading.Lock()  # one image at a time, as the hooks above affect the whole model

    def get_num_tokens(self, side: int) -> int:
        """Visual tokens of an image at a high-resolution side in pixels."""
        return (self.sides[side] // self.processor.image_processor.patch_size) ** 2

    def read(self, path: str) -> bytes:
        """
        The content of an image file.

        Raises:
            ValueError: If it is not an image that the model can use, whatever its name says.
        """
        name, side = Path(path).name, min(self.sides)
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{name} has expired: images are kept for an hour. Send it again.") from error
        image_processor = self.processor.image_processor
        try:
            image = image_processor.fetch_images(content)
        except ValueError as error:
            raise ValueError(f"{name} is not an image that can be read. Send a PNG, JPEG or WebP file.") from error
        try:
            image_processor(image, size=side, low_res_size=self.sides[side])
        except ValueError as error:
            raise ValueError(f"{name} cannot be used. {error}") from error
        return content

    @torch.inference_mode()
    def _look(self, content: bytes, side: int) -> Look:
        """Encodes the image of a file's content at a high-resolution side in pixels; `look` caches the results."""
        image_processor = self.processor.image_processor
        low_res_side = self.sides[side]
        image = image_processor.fetch_images(content)
        views = image_processor(image, size=side, low_res_size=low_res_side, return_tensors="pt")
        high_res, low_res = (views[n].to(self.model.device) for n in ("pixel_values", "low_res_pixel_values"))
        with self._lock:
            encoded, heat = get_high_res_contribution(self.model, high_res, low_res)
        sharp = self._to_image(high_res, side)
        return Look(
            features=encoded.pooler_output,
            low_res=self._to_image(low_res, side),
            high_res=sharp,
            heat_map=draw_heat_map(sharp, heat[0].cpu()),
            low_res_side=low_res_side,
            gates=tuple(
                (layer, gate.float().mean().item())
                for layer, gate in zip(self.model.config.mr_adapter_layers, encoded.mr_adapter_gates, strict=True)
            ),
        )

    def _to_image(self, view: torch.Tensor, side: int) -> Image.Image:
        """A normalised view `(1, 3, L, L)` as an image of another side, without smoothing."""
        image_processor = self.processor.image_processor
        mean, std = view.new_tensor(image_processor.image_mean), view.new_tensor(image_processor.image_std)
        pixels = (view[0].permute(1, 2, 0) * std + mean).clamp(0, 1) * 255  # (L, L, 3)
        return Image.fromarray(pixels.round().byte().cpu().numpy()).resize((side, side), Image.Resampling.NEAREST)

    def answer(self, messages: list[dict], side: int) -> Iterator[tuple[str, Look | None, float | None]]:
        """
        Answers a conversation, greedily.

        Args:
            messages (`list[dict]`): In the chat template's form; an image is `{"type": "image", "path": PATH}`.
            side (`int`): High-resolution side in pixels.

        Yields:
            The answer so far, the last image's [`Look`] (`None` without images), and the seconds to the first token
            (`None` before).

        Raises:
            ValueError: If an image cannot be used or the conversation is longer than the model's context.
        """
        start = time.perf_counter()
        inputs = self._get_prompt(messages, side)  # first, as it bounds the number of images
        paths = [part["path"] for message in messages for part in message["content"] if part["type"] == "image"]
        looks = [self.look(self.read(path), side) for path in paths]
        last = looks[-1] if looks else None
        yield "", last, None

        if looks:
            features = torch.cat([look.features for look in looks])
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            generation = pool.submit(
                self.model.generate,
                **inputs,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([lambda ids, scores, **kwargs: stopped.is_set()]),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
            # also after an error, where the loop would wait forever
            generation.add_done_callback(lambda _: streamer.end())
            text, seconds = "", None
            try:
                for piece in streamer:
                    seconds = seconds or time.perf_counter() - start
                    text += piece
                    yield text.strip(), last, seconds
            finally:
                stopped.set()  # the visitor may have left
            generation.result()

    def _get_prompt(self, messages: list[dict], side: int) -> dict[str, torch.Tensor]:
        """Ids and mask. They depend on the low-resolution side alone, so blank images replace the real ones."""
        longest = self.model.config.context_length or math.inf
        too_long = ValueError(
            f"This conversation has become longer than the {longest} tokens of the model's context. Start a new one, "
            "with fewer images or a smaller high-resolution side."
        )
        parts = [part for message in messages for part in message["content"]]
        num_images = sum(part["type"] == "image" for part in parts)
        num_characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
        # before tokenizing, which takes long for very long texts
        if num_images * self.get_num_tokens(side) + num_characters // MAX_CHARACTERS_PER_TOKEN > longest:
            raise too_long
        blank = {"type": "image", "image": Image.new("RGB", (32, 32))}
        messages = [
            {**message, "content": [part if part["type"] == "text" else blank for part in message["content"]]}
            for message in messages
        ]
        image_processor = self.processor.image_processor
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"size": image_processor.high_res_stride, "low_res_size": self.sides[side]},
        )
        if inputs["input_ids"].shape[1] + self.max_new_tokens > longest:
            raise too_long
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


def draw_heat_map(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """
    Colours a square image by heat.

    Args:
        image (`PIL.Image.Image`): The image.
        heat (`torch.Tensor` of shape `(g, g)`): Any values; the smallest stays grey, the largest gets the full colour.
    """
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-6)
    mask = Image.fromarray((heat * 230).byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    return Image.composite(Image.new("RGB", image.size, HEAT_COLOR), image.convert("L").convert("RGB"), mask)
