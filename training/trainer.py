# SPDX-License-Identifier: Apache-2.0
"""What this project adds to TRL's trainer: batches of one kind, complete checkpoints, answers at each evaluation."""

import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers.integrations import TensorBoardCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.models import unwrap_model_for_generation
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_llava_hr.utils import follow_umask, is_write_failure

from .data import get_lengths


@dataclass
class LlavaHrDataCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator, which adds a masked dummy image after the text to batches without images. So every batch uses every
    parameter, as in the released code: where parameters are sharded, all processes must run the same modules, and a
    parameter must have a gradient in all processes or in none. In samples with `num_answers` only the last answers
    remain in the labels.

    Args:
        pixel_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype of `pixel_values`. A tower that
            computes in bfloat16 rounds them anyway, and bfloat16 takes half the shared memory between processes.
    """

    pixel_dtype: torch.dtype = torch.float32

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Samples -> `input_ids`, `attention_mask`, `labels`, `pixel_values`."""
        batch = super().torch_call(examples)
        for labels, example in zip(batch["labels"], examples, strict=True):
            if "num_answers" in example:
                keep_last_answers(labels, example["num_answers"])
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self.pixel_dtype)
            return batch
        image_processor = self.processor.image_processor
        stride, patch_size = image_processor.high_res_stride, image_processor.patch_size
        batch["pixel_values"] = torch.zeros(1, 3, stride, stride, dtype=self.pixel_dtype)
        batch["low_res_pixel_values"] = torch.zeros(1, 3, patch_size, patch_size)  # one token
        width = self.pad_to_multiple_of or 1
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        for name, value in fill.items():
            batch[name] = nn.functional.pad(batch[name], (0, width), value=value)
        batch["input_ids"][0, -width] = self.processor.image_token_id
        return batch


def keep_last_answers(labels: torch.Tensor, num_answers: int) -> None:
    """Masks (-100) all but the last `num_answers` unmasked spans of `labels` `(sequence_length,)`."""
    is_learned = labels != -100
    starts = is_learned & ~is_learned.roll(1)
    starts[0] = is_learned[0]
    answer = starts.cumsum(0)  # at each position, the answers that have begun
    labels[answer <= answer[-1] - num_answers] = -100


@dataclass(eq=False)
class ModalityLengthGroupedSampler(Sampler[int]):
    """
    Orders samples so that in a batch all have images or none has, and texts have similar lengths. Some samples of each
    kind are repeated to fill its last batch.
    """

    lengths: list[int]
    has_image: list[bool]
    batch_size: int  # samples of one forward pass of all processes
    group_size: int  # samples of an optimizer step, a multiple of `batch_size`; of one kind if there are enough
    seed: int
    get_epoch: Callable[[], int]  # the epoch determines the order, also in a resumed run

    def __post_init__(self) -> None:
        self.kinds = [[i for i, has in enumerate(self.has_image) if has is kind] for kind in (True, False)]

    def __len__(self) -> int:
        return sum(-len(kind) // self.batch_size * -self.batch_size for kind in self.kinds)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.get_epoch())
        groups, rest = list[list[int]](), list[int]()
        for kind in filter(None, self.kinds):
            lengths = [self.lengths[index] for index in kind]
            order = get_length_grouped_indices(lengths, self.group_size, generator=generator)
            order = [kind[index] for index in order]
            while len(order) % self.batch_size:
                order += order[: -len(order) % self.batch_size]
            end = len(order) - len(order) % self.group_size
            groups += [order[start : start + self.group_size] for start in range(0, end, self.group_size)]
            rest += order[end:]
        for number in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[number]
        yield from rest


class LlavaHrTrainer(SFTTrainer):
    """TRL's [`SFTTrainer`] with batches of one kind, complete checkpoints, and answers logged at each evaluation."""

    num_logged_answers = 4
    max_answer_tokens = 64
    # by regular expression for parameter names; the others have `learning_rate`
    learning_rates: dict[str, float] = {}

    def keep_trained_in_float32(self) -> None:
        """If a part is trained, bfloat16 must not lose its updates. Fully trained or sharded models have one dtype."""
        parameters = list(self.model.parameters())
        if all(p.requires_grad for p in parameters) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Splits the groups of transformers' optimizer by `learning_rates`."""
        optimizer = super().create_optimizer(model)
        if not self.learning_rates:
            return optimizer
        names = {parameter: name for name, parameter in (model or self.model).named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            rest = group["params"]
            for pattern, rate in [*self.learning_rates.items(), ("", group["lr"])]:
                found = [p for p in rest if re.search(pattern, names[p])]
                rest = [p for p in rest if not re.search(pattern, names[p])]
                groups += [{**group, "params": found, "lr": rate}] if found else []
        optimizer.param_groups = groups
        return optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.world_size
        return ModalityLengthGroupedSampler(
            *get_lengths(dataset),
            batch_size=batch_size,
            group_size=batch_size * self.args.gradient_accumulation_steps,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            get_epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if isinstance(eval_dataset, Dataset) and self.args.world_size == 1:
            return SequentialSampler(eval_dataset)
        return None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:  # a finished run would make one more step
            super()._run_epoch(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # the tokenizer would save how the last batch was padded, which differs after an interruption
        self.processing_class.tokenizer.backend_tokenizer.no_padding()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        with complete_or_absent(folder):
            super()._save_checkpoint(model, trial)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self._log_answers()
        return metrics

    @torch.no_grad()
    def _log_answers(self) -> None:
        """Logs the answers to the first questions of the evaluation data to the console and to TensorBoard."""
        if not isinstance(self.eval_dataset, Dataset):
            return
        texts = []
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            for sample in itertools.islice(self.eval_dataset, self.num_logged_answers):
                *messages, answer = prepare_multimodal_messages(sample["messages"], sample["images"])
                inputs = self.processing_class.apply_chat_template(messages, **options).to(self.args.device)
                with self.compute_loss_context_manager():
                    output = model.generate(**inputs, max_new_tokens=self.max_answer_tokens, do_sample=False)
                new_ids = output[0, inputs["input_ids"].shape[1] :]
                new_text = self.processing_class.decode(new_ids, skip_special_tokens=True).strip()
                question = " ".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
                texts.append(f"{question!r}: {new_text!r} (expected {answer['content'][0]['text']!r})")
        self.accelerator.print(*texts, sep="\n")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text("answers", "\n\n".join(texts), self.state.global_step)

    def save_result(self) -> None:
        """Saves model and processor in `output_dir` itself. Files there are replaced once all new ones are written."""
        folder = Path(self.args.output_dir, "incomplete")
        if self.is_fsdp_enabled:  # checkpoints are saved in parts
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with complete_or_absent(folder):
            self.save_model(str(folder), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # configurations last: a folder without them is not a model
            for file in sorted(folder.iterdir(), key=lambda file: file.name.endswith("config.json")):
                file.replace(folder.parent / file.name)
            folder.rmdir()


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[None]:
    """
    Removes a folder if writing it fails, with an `OSError` that names it if the disk is the reason. Its files follow
    the umask.
    """
    try:
        yield
        follow_umask(folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not is_write_failure(error, folder):
            raise
        raise OSError(
            f"{folder} could not be written: {error}. Earlier checkpoints are as they were. Make room and start the "
            "same command again: it resumes from the newest complete checkpoint."
        ) from error


def find_last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The newest complete checkpoint of a run, if there is one. A checkpoint is complete if `trainer_state.json`, which
    is written late, can be read, and every `rng_state*.pth` is a valid zip.
    """
    for folder in list_checkpoints(output_dir):
        random_states = list(folder.glob("rng_state*.pth"))
        if has_state(folder) and random_states and all(map(zipfile.is_zipfile, random_states)):
            return str(folder)
    return None


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint folders of a run, newest first, without copies such as `checkpoint-500-best`."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def has_state(checkpoint: Path) -> bool:
    """Whether the trainer's state is complete in a checkpoint."""
    try:
        return "global_step" in json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False


def has_model_only(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved with `save_only_model`: complete, but without the state of the optimizer."""
    patterns = ("optimizer*", "scheduler.pt", "rng_state*", "global_step*")
    return has_state(checkpoint) and not any(any(checkpoint.glob(pattern)) for pattern in patterns)
