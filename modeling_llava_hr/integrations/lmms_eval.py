# SPDX-License-Identifier: Apache-2.0
"""
LLaVA-HR in lmms-eval, which finds it through the entry point `lmms_eval.models`:

    lmms-eval --model llava_hr --model_args pretrained=llava-hr-7b-sft-1024-hf --tasks textvqa_val --batch_size 8

Imported by lmms-eval alone. Tasks that lmms-eval does not have are in the folder `tasks` beside this file.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
)

import modeling_llava_hr  # noqa: F401  (makes the model known to the Auto classes)
from modeling_llava_hr.utils import get_4bit_config


if find_spec("lmms_eval") is None:
    raise ImportError('Evaluation needs lmms-eval: pip install ".[evaluation]" in the checkout.')

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.models.registry_v2 import ModelManifest  # noqa: E402
from lmms_eval.protocol import ChatMessages  # noqa: E402
from lmms_eval.utils import Collator  # noqa: E402
from loguru import logger  # noqa: E402


# As in the evaluation of the released code, where a task does not say
MAX_NEW_TOKENS = 128
# What tasks say to other models: greedy or not is said by `do_sample` and `temperature`, images are always padded
OTHER_MODELS_OPTIONS = ("image_aspect_ratio",)

Messages = list[dict[str, Any]]


class Question(NamedTuple):
    """A request of lmms-eval whose images are read when its turn comes: `get_messages` reads them from a row."""

    context: str
    generation_kwargs: dict[str, Any]
    get_messages: Callable[[dict], Messages]
    task: str
    split: str
    doc_id: int


class LlavaHrEvaluation(lmms):
    r"""
    LLaVA-HR for tasks that give text and images apart ("simple"), with likelihoods of answers. These are the options
    of `--model_args`; `--device` and `--batch_size` of the command line are the arguments of that name.

    Args:
        pretrained (`str`):
            Folder or Hub id of a model with its processor.
        device (`str`, *optional*):
            Such as `"cuda:0"` or `"cpu"`; `"auto"` spreads the model over all devices. By default the accelerator of
            this process, if there is one.
        batch_size (`int`, *optional*, defaults to 1):
            Questions at a time.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Such as `"bfloat16"`; `"auto"` is the checkpoint's.
        size, low_res_size (`int`, *optional*):
            Sides of the image and of its low-resolution view in pixels, if not the processor's.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the language model's weights are quantized to 4 bits.
        attn_implementation (`str`, *optional*):
            Such as `"sdpa"` or `"flash_attention_2"`.
        revision (`str`, *optional*, defaults to `"main"`):
            Of a model on the Hub.

    Raises:
        ValueError: If `batch_size` is not a positive number.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        batch_size: int | str = 1,
        dtype: str = "auto",
        size: int | None = None,
        low_res_size: int | None = None,
        load_in_4bit: bool = False,
        attn_implementation: str | None = None,
        revision: str = "main",
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be a number of 1 or more, but got {batch_size!r}: --batch_size 8")
        self.batch_size = int(batch_size)
        self.sizes = {"size": size, "low_res_size": low_res_size}
        self.sizes = {name: value for name, value in self.sizes.items() if value is not None}
        self.accelerator = Accelerator()
        quantization = get_4bit_config() if load_in_4bit else None
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            revision=revision,
            dtype=dtype,
            device_map=device or self.accelerator.device,
            quantization_config=quantization,
            attn_implementation=attn_implementation,
        ).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        # lmms-eval counts requests of several processes there
        self.device = self.model.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """
        Negative log-likelihoods of answers, their end token excluded.

        lmms-eval calls this a likelihood, but takes the choice with the smallest value as the model's: its own models
        return losses.

        Args:
            requests (`list[Instance]`): Each with question, answer (or a function of the row), function of the row
                that gives the images, number of the row, task, split.

        Returns:
            `list[tuple[float, bool]]`: For each the sum of `-log p` over the answer's tokens, and whether greedy
            decoding gives these tokens.
        """
        results = []
        progress = tqdm(total=len(requests), desc="LLaVA-HR", unit="answer", disable=self.rank != 0)
        for first in range(0, len(requests), self.batch_size):
            chats = []
            for context, target, doc_to_visual, doc_id, task, split in (
                request.args for request in requests[first : first + self.batch_size]
            ):
                doc = self.task_dict[task][split][doc_id]
                text = target if isinstance(target, str) else str(target(doc))
                answer = {"role": "assistant", "content": [{"type": "text", "text": text.strip()}]}
                chats.append([*self._get_messages(context, doc_to_visual, doc), answer])
            results += self._get_losses(chats)
            progress.update(len(chats))
        progress.close()
        return results

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answers questions, longest first, with those of like options in a batch.

        Args:
            requests (`list[Instance]`): Each with question, generation options, function of the row that gives the
                images, number of the row, task, split. Of the options, all of `GenerationConfig` and `until` (the
                answer ends before these strings) take effect.

        Returns:
            `list[str]`: Answers in the order of the requests.
        """
        questions = Collator(
            [self._get_question(request.args) for request in requests],
            sort_fn=lambda question: -len(question.context),
            group_fn=lambda question: question.generation_kwargs,
            grouping=True,
        )
        answers = []
        progress = tqdm(total=len(requests), desc="LLaVA-HR", unit="answer", disable=self.rank != 0)
        for batch in questions.get_batched(n=self.batch_size):
            chats = [one.get_messages(self.task_dict[one.task][one.split][one.doc_id]) for one in batch]
            answers += self._generate(chats, batch[0].generation_kwargs)
            progress.update(len(batch))
        progress.close()
        return questions.get_original(answers)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """
        Answers questions whose task asks on until it is content. As lmms-eval defines it, each round is a prompt of
        its own, which the task writes with the answers so far at hand.

        Args:
            requests (`list[Instance]`): As in [`~LlavaHrEvaluation.generate_until`], with the task's function
                `doc_to_text` after that of the images.

        Returns:
            `list[list[str]]`: Answers of all rounds for each request.
        """
        return [
            self._answer_rounds(request.args)
            for request in tqdm(requests, desc="LLaVA-HR", unit="question", disable=self.rank != 0)
        ]

    def _answer_rounds(self, args: tuple) -> list[str]:
        context, generation_kwargs, doc_to_visual, doc_to_text, doc_id, task, split = args
        doc = self.task_dict[task][split][doc_id]
        chat, info, rounds = self._get_messages(context, doc_to_visual, doc), None, 0
        answers: list[str] = []
        while True:
            answers = [*answers, *self._generate([chat], generation_kwargs)]
            rounds += 1
            images, context, is_done, answers, info = doc_to_text(
                doc, previous_output=answers, round_idx=rounds, previous_round_info=info
            )
            if is_done:
                return list(answers)
            chat = self._get_messages(context, lambda _, images=images: images, doc)  # type: ignore[misc]

    def _get_question(self, args: tuple) -> Question:
        context, generation_kwargs, doc_to_visual, doc_id, task, split = args
        get_messages = partial(self._get_messages, context, doc_to_visual)
        return Question(context, generation_kwargs, get_messages, task, split, doc_id)

    def _get_messages(self, context: str, doc_to_visual: Callable[[dict], list | None], doc: dict) -> Messages:
        images = [{"type": "image", "image": image} for image in doc_to_visual(doc) or []]
        return self._check([{"role": "user", "content": [*images, {"type": "text", "text": context}]}])

    def _check(self, messages: Messages) -> Messages:
        """Refuses anything but images and text, and takes image tags out of it: images come first in a message."""
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text":
                    if self.processor.image_token in part["text"]:
                        part["text"] = part["text"].replace(self.processor.image_token, "").strip()
                elif part["type"] != "image" or not isinstance(part["image"], Image.Image):
                    raise ValueError(f"LLaVA-HR takes images (PIL) and text, but a task gives {part}.")
        return messages

    def _encode(self, chats: list[Messages], **kwargs: Any) -> BatchFeature:
        return self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", **self.sizes},
            **kwargs,
        ).to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def _generate(self, chats: list[Messages], generation_kwargs: dict[str, Any]) -> list[str]:
        options, ends = get_generation_options(generation_kwargs)
        inputs = self._encode(chats, add_generation_prompt=True)
        output = self.model.generate(**inputs, **options)
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for end in ends:
            answers = [answer.split(end)[0] for answer in answers]
        return [answer.strip() for answer in answers]

    @torch.inference_mode()
    def _get_losses(self, chats: list[Messages]) -> list[tuple[float, bool]]:
        inputs = self._encode(chats, return_assistant_tokens_mask=True)
        is_answer = inputs.pop("assistant_masks").bool()
        is_answer[:, -1] = False  # the end token
        length = int(is_answer.sum(1).max()) + 1
        # padded on the left: answers are the last tokens of all rows, and each logit is about the next token
        logits = self.model(**inputs, logits_to_keep=length + 1).logits[:, :-1].float()
        tokens, is_answer = inputs["input_ids"][:, -length:], is_answer[:, -length:]
        log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        losses = -(log_probs * is_answer).sum(1)
        is_greedy = ((logits.argmax(-1) == tokens) | ~is_answer).all(1)
        return list(zip(losses.tolist(), is_greedy.tolist(), strict=True))


class LlavaHrChatEvaluation(LlavaHrEvaluation):
    """
    LLaVA-HR for tasks that give messages ("chat"), lmms-eval's first choice. Likelihoods need `--force_simple`. For
    the arguments see [`LlavaHrEvaluation`].
    """

    is_simple = False

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise ValueError("lmms-eval asks for likelihoods in its simple form only: add `--force_simple`.")

    def _answer_rounds(self, args: tuple) -> list[str]:
        _, doc_to_messages, generation_kwargs, doc_id, task, split = args
        doc = self.task_dict[task][split][doc_id]
        messages, info, rounds = doc_to_messages(doc), None, 0
        answers: list[str] = []
        while True:
            answers = [*answers, *self._generate([self._convert(messages)], generation_kwargs)]
            rounds += 1
            messages, is_done, answers, info = doc_to_messages(
                doc, previous_output=answers, round_idx=rounds, previous_round_info=info
            )
            if is_done:
                return list(answers)

    def _get_question(self, args: tuple) -> Question:
        context, doc_to_messages, generation_kwargs, doc_id, task, split = args
        return Question(
            context, generation_kwargs, lambda doc: self._convert(doc_to_messages(doc)), task, split, doc_id
        )

    def _convert(self, messages: Messages) -> Messages:
        return self._check(ChatMessages(messages=messages).to_hf_messages())


def get_generation_options(generation_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    What a task says about generation, as `generate` takes it.

    Args:
        generation_kwargs (`dict[str, Any]`): Of a task. Without `do_sample`, a `temperature` above 0 means sampling.

    Returns:
        `tuple[dict[str, Any], list[str]]`: Options for `generate`, and the strings before which an answer ends.
    """
    options = {"max_new_tokens": MAX_NEW_TOKENS, **generation_kwargs}
    ends = options.pop("until", None) or []
    known = GenerationConfig().to_dict()
    if unknown := [name for name in options if name not in (*known, *OTHER_MODELS_OPTIONS)]:
        logger.warning(f"The task's generation options {unknown} are none of `GenerationConfig` and are left out.")
    options = {name: value for name, value in options.items() if name in known}
    options.setdefault("do_sample", (options.get("temperature") or 0) > 0)
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}
    return options, [ends] if isinstance(ends, str) else list(ends)


def get_manifest() -> ModelManifest:
    """What lmms-eval reads through the entry point: the model's name there and its classes."""
    return ModelManifest(
        model_id="llava_hr",
        simple_class_path=f"{__name__}.{LlavaHrEvaluation.__name__}",
        chat_class_path=f"{__name__}.{LlavaHrChatEvaluation.__name__}",
    )


__all__ = ["LlavaHrChatEvaluation", "LlavaHrEvaluation", "get_generation_options", "get_manifest"]
