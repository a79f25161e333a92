# SPDX-License-Identifier: Apache-2.0
"""
Optimizers for models that learn from nothing.

Muon (torch.optim.Muon) replaces the momentum of a weight matrix by the nearest orthogonal matrix, which helps small
models that are trained for a short time.
"""

import torch
from torch import nn


def get_optimizers(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """
    Muon for the weights of linear layers, AdamW for embeddings, heads, convolutions, norms and biases.

    Args:
        model (`nn.Module`): The model; frozen parameters are left out.
        lr (`float`): Learning rate of both: Muon's updates are scaled to be as large as AdamW's ("Muon is Scalable for
            LLM Training", arXiv 2502.16982, equation 4).
        weight_decay (`float`, *optional*, defaults to 0): Of matrices.

    Returns:
        `list[torch.optim.Optimizer]`: One or two; those without parameters are left out.
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
