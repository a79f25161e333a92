# SPDX-License-Identifier: Apache-2.0
"""
The page's model: loads LLaVA-HR, encodes each image once, streams answers, and finds where the high-resolution pathway
contributed.
"""

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
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


# Number of encoded images that are cached: 8 MB of features each for a 7B model at 1024 pixels, and 10 MB of views
MAX_ENCODED = 16
# Choices of the high-resolution side, relative to the side of the training: 384 to 1536 for 1024 pixels
SIDES = (3 / 8, 1 / 2, 3 / 4, 1, 3 / 2)
# For activations, the cache of a long chat, and CUDA itself
HEADROOM = 1.25
HEAT_COLOR = (255, 122, 0)
# Upper bound for any tokenizer; the longest tokens in use are runs of spaces
MAX_CHARACTERS_PER_TOKEN = 128

HERE = Path(__file__).resolve().parent
# Where the package is not installed, the code that was published with the weights runs, if `Engine` may run it
HAS_PACKAGE = importlib.util.find_spec("modeling_llava_hr") is not None
TRUST_REMOTE_CODE = not HAS_PACKAGE
if HAS_PACKAGE:
    import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
# On ZeroGPU there is a GPU only while a function that this decorates runs, in a process of its own
HAS_ZERO_GPU = importlib.util.find_spec("spaces") is not None
run_on_gpu: Callable = importlib.import_module("spaces").GPU if HAS_ZERO_GPU else lambda function: function


@dataclass(frozen=True)
class Look:
    """
    An encoded image.

    Args:
        features (`torch.Tensor` of shape `(tokens, D)`): Input of the language model, on the CPU.
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
        return len(self.features)


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
    """A model for the machine at hand: as saved if quantized, else float32 on a CPU, bfloat16 or 4-bit on a GPU."""
    options = {"trust_remote_code": TRUST_REMOTE_CODE}
    config = AutoConfig.from_pretrained(name, **options)
    if "quantization_config" in config.to_dict():
        return AutoModelForImageTextToText.from_pretrained(name, device_map="auto", **options)
    if not torch.cuda.is_available():
        return AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32, **options)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, **options)
    quantization = get_quantization(empty.num_parameters(), torch.cuda.mem_get_info()[1])
    options |= {"dtype": torch.bfloat16, "device_map": "auto", "quantization_config": quantization}
    return AutoModelForImageTextToText.from_pretrained(name, **options)


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
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    low_res_pixel_values: torch.Tensor,
    image_sizes: torch.Tensor | None = None,
) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
    """
    Encodes images, and finds where the high-resolution pathway contributed. No other thread may use the model's vision
    tower meanwhile.

    Args:
        model ([`LlavaHrForConditionalGeneration`]): The model.
        pixel_values (`torch.Tensor` of shape `(images, 3, H, H)`): Images as the high-resolution pathway sees them.
        low_res_pixel_values (`torch.Tensor` of shape `(images, 3, L, L)`): Low-resolution views.
        image_sizes (`torch.Tensor` of shape `(images, 2)`, *optional*): Sizes of the images, with which padding is
            dropped.

    Returns:
        What `get_image_features` returns, and the heat `(images, g, g)`: the length by which each fused feature
        (equation 2 of the paper) moves if the high-resolution pathway is zeroed.
    """
    encoded = model.get_image_features(pixel_values, low_res_pixel_values, image_sizes, return_dict=True)
    vision_tower = model.model.vision_tower
    stride = vision_tower.high_res_tower.stride  # the smallest view suffices, as it is zeroed
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

    Raises:
        ValueError: If the model needs its own code, and neither is that beside this file nor does the variable
            `TRUST_REMOTE_CODE` allow it.
    """

    def __init__(self, name: str, max_new_tokens: int = 256):
        is_own = Path(name).is_dir() and Path(name).resolve().parent == HERE  # its code is as trusted as this file
        if TRUST_REMOTE_CODE and not is_own and os.environ.get("TRUST_REMOTE_CODE") != "1":
            raise ValueError(
                "the package modeling_llava_hr is not installed, so the model needs the code published with it. If "
                "you trust that code, set the variable TRUST_REMOTE_CODE to 1 (in a Space: Settings, Variables)."
            )
        self.name = name
        self.max_new_tokens = max_new_tokens
        self.model = load_model(name)
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=TRUST_REMOTE_CODE)
        self.sides = get_sides(self.processor.image_processor)
        self.look = lru_cache(maxsize=MAX_ENCODED)(self._look)
        self._lock = threading.Lock()  # one image at a time, as the hooks above affect the whole model
        self._encode, self._generate = run_on_gpu(self._encode), run_on_gpu(self._generate)

    def describe(self) -> str:
        """Model, size, precision and device, such as `"me/llava-hr-7b, 7.1 B parameters, bfloat16, NVIDIA L4"`."""
        millions, device = self.model.num_parameters() / 1e6, self.model.device
        size = f"{millions:.1f} M" if millions < 1000 else f"{millions / 1000:.1f} B"
        quantization = self.model.config.to_dict().get("quantization_config")
        precision = str(self.model.dtype).removeprefix("torch.")
        if quantization:
            precision = "4 bit" if quantization.get("load_in_4bit") else quantization["quant_method"]
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        name = Path(self.name).resolve().name if Path(self.name).is_dir() else self.name
        return f"{name}, {size} parameters, {precision}, {where}"

    def get_num_tokens(self, side: int, size: list[int] | None = None) -> int:
        """
        Visual tokens of an image.

        Args:
            side (`int`): High-resolution side in pixels.
            size (`list[int]`, *optional*): Height and width of the image in pixels, which matter with `unpad` alone; a
                square by default, which has the most tokens.
        """
        sizes = {"image_sizes": [size or (1, 1)]} if self.processor.image_processor.unpad else {}
        text = self.processor.replace_image_token(sizes, 0, size=side, low_res_size=self.sides[side])
        return text.count(self.processor.image_token)

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

    def _get_size(self, content: bytes) -> list[int]:
        """Height and width in pixels of a file's image, upright, where the number of tokens depends on them."""
        image_processor, side = self.processor.image_processor, min(self.sides)
        image = image_processor.fetch_images(content)
        return image_processor(image, size=side, low_res_size=self.sides[side])["image_sizes"][0].tolist()

    def _look(self, content: bytes, side: int, session: str | None = None) -> Look:
        """
        Encodes the image of a file's content at a high-resolution side in pixels. `look` caches the results, those of
        each session for itself: nobody can tell from the time which images others have sent.
        """
        image_processor = self.processor.image_processor
        image = image_processor.fetch_images(content)
        views = image_processor(image, size=side, low_res_size=self.sides[side], return_tensors="pt")
        features, heat, gates = self._encode(dict(views))
        sharp = self._to_image(views["pixel_values"], side)
        return Look(
            features=features,
            low_res=self._to_image(views["low_res_pixel_values"], side),
            high_res=sharp,
            heat_map=draw_heat_map(sharp, heat),
            low_res_side=self.sides[side],
            gates=tuple(zip(self.model.config.mr_adapter_layers, gates, strict=True)),
        )

    def _encode(self, views: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        """Features `(tokens, D)`, heat `(g, g)` and gates of one image, on the CPU."""
        views = {name: view.to(self.model.device) for name, view in views.items()}
        with self._lock:
            encoded, heat = get_high_res_contribution(self.model, **views)
        gates = [gate.float().mean().item() for gate in encoded.mr_adapter_gates]
        return encoded.pooler_output[0].cpu(), heat[0].cpu(), gates

    def _to_image(self, view: torch.Tensor, side: int) -> Image.Image:
        """A normalised view `(1, 3, L, L)` as an image of another side, without smoothing."""
        image_processor = self.processor.image_processor
        mean, std = view.new_tensor(image_processor.image_mean), view.new_tensor(image_processor.image_std)
        pixels = (view[0].permute(1, 2, 0) * std + mean).clamp(0, 1) * 255  # (L, L, 3)
        return Image.fromarray(pixels.round().byte().numpy()).resize((side, side), Image.Resampling.NEAREST)

    def answer(
        self, messages: list[dict], side: int, session: str | None = None
    ) -> Iterator[tuple[str, Look | None, float | None]]:
        """
        Answers a conversation, greedily.

        Args:
            messages (`list[dict]`): In the chat template's form; an image is `{"type": "image", "path": PATH}`.
            side (`int`): High-resolution side in pixels.
            session (`str`, *optional*): Whose cached encodings are used; without one, images are encoded again.

        Yields:
            The answer so far, the last image's [`Look`] (`None` without images), and the seconds to the first token
            (`None` before).

        Raises:
            ValueError: If an image cannot be used or the conversation is longer than the model's context.
        """
        start = time.perf_counter()
        parts = [part for message in messages for part in message["content"]]
        paths = [part["path"] for part in parts if part["type"] == "image"]
        num_characters = sum(len(part["text"]) for part in parts if part["type"] == "text")
        # before reading images and tokenizing, which take long for very many
        fewest = self.get_num_tokens(side, [1, 10**9])  # with `unpad`, an image of one line has the fewest
        self._check_length(len(paths) * fewest + num_characters // MAX_CHARACTERS_PER_TOKEN)
        unpad = self.processor.image_processor.unpad
        sizes = [self._get_size(self.read(path)) if unpad else None for path in paths]
        inputs = self._get_prompt(messages, side, [self.get_num_tokens(side, size) for size in sizes])
        look, last, features = self.look if session else self._look, None, []
        for path in paths:
            last = look(self.read(path), side, session)
            features.append(last.features)  # the only thing kept of earlier images
        yield "", last, None

        text, seconds = "", None
        for piece in self._generate(inputs, features):
            seconds = seconds or time.perf_counter() - start
            text += piece
            yield text.strip(), last, seconds

    def _generate(self, inputs: dict[str, torch.Tensor], features: list[torch.Tensor]) -> Iterator[str]:
        """The pieces of the answer to a prompt with images of these features, each `(tokens, D)`."""
        inputs = {name: values.to(self.model.device) for name, values in inputs.items()}
        if features:
            features = [image.to(self.model.device) for image in features]
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
            # also after an error, or the loop would wait forever
            generation.add_done_callback(lambda _: streamer.end())
            try:
                yield from streamer
            finally:
                stopped.set()  # the visitor may have left
            generation.result()

    def _check_length(self, num_tokens: int) -> None:
        longest = self.model.config.context_length
        if longest is not None and num_tokens > longest:
            raise ValueError(
                f"This conversation has become longer than the {longest} tokens of the model's context. Start a new "
                "one, with fewer images or a smaller high-resolution side."
            )

    def _get_prompt(self, messages: list[dict], side: int, num_tokens: list[int]) -> dict[str, torch.Tensor]:
        """Ids and mask for images of these numbers of tokens. Blank images of one pixel per token replace them."""
        image_processor = self.processor.image_processor
        grid = self.sides[side] // image_processor.patch_size
        blanks = iter([{"type": "image", "image": Image.new("RGB", (grid, n // grid))} for n in num_tokens])
        messages = [
            {**message, "content": [part if part["type"] == "text" else next(blanks) for part in message["content"]]}
            for message in messages
        ]
        inputs = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"size": image_processor.high_res_stride, "low_res_size": self.sides[side]},
        )
        self._check_length(inputs["input_ids"].shape[1] + self.max_new_tokens)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}


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
