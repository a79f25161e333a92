# SPDX-License-Identifier: Apache-2.0
"""Optimization of models that learn from nothing within minutes."""

from collections.abc import Callable

import torch
from torch import nn
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup


def get_optimizers(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """
    Muon for the weights of linear layers, AdamW for embeddings, heads, convolutions, norms and biases. Muon replaces
    the momentum of a matrix by the nearest orthogonal matrix, which helps small models in short trainings.

    Args:
        model (`nn.Module`): The model; frozen parameters are left out.
        lr (`float`): Learning rate of both: Muon's updates are scaled to be as large as AdamW's ("Muon is Scalable for
            LLM Training", arXiv 2502.16982, equation 4).
        weight_decay (`float`, *optional*, defaults to 0): Of matrices.
    """
    matrices = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and min(module.weight.shape) > 1
        and "head" not in name
    ]
    known = {id(weight) for weight in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        optimizers.append(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers


def fit(
    name: str,
    model: nn.Module,
    steps: int,
    lr: float,
    weight_decay: float,
    warmup: float,
    get_loss: Callable[[int], torch.Tensor],
) -> None:
    """
    Trains a model in bfloat16 (autocast), with warm-up and a cosine schedule.

    Args:
        name (`str`): For the progress bar.
        model (`nn.Module`): The model, on its device.
        steps (`int`): Number of steps.
        lr, weight_decay (`float`): See [`get_optimizers`].
        warmup (`float`): Share of the steps in which the learning rate rises.
        get_loss (`Callable`): From the number of a step to its loss.
    """
    optimizers = get_optimizers(model, lr, weight_decay)
    schedulers = [get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps) for optimizer in optimizers]
    bar, device = tqdm(range(steps), desc=name, unit="step"), next(model.parameters()).device
    for step in bar:
        with torch.autocast(device.type, torch.bfloat16):
            loss = get_loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedulers):
            part.step()
        model.zero_grad()
        if step % 25 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
