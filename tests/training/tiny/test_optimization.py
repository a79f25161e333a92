# SPDX-License-Identifier: Apache-2.0
import torch
from torch import nn

from training.tiny.optimization import get_optimizers


def make_model() -> nn.Module:
    return nn.ModuleDict(
        {"embedding": nn.Embedding(5, 8), "body": nn.Linear(8, 8), "lm_head": nn.Linear(8, 5, bias=False)}
    )


def test_matrices_get_muon_and_the_rest_adamw():
    model = make_model()
    muon, adamw = get_optimizers(model, lr=0.1, weight_decay=0.2)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    (matrices,), (others,) = muon.param_groups, adamw.param_groups
    assert [id(p) for p in matrices["params"]] == [id(model["body"].weight)]
    rest = {id(p) for p in (model["embedding"].weight, model["body"].bias, model["lm_head"].weight)}
    assert {id(p) for p in others["params"]} == rest
    assert (matrices["lr"], matrices["weight_decay"]) == (0.1, 0.2)
    assert (others["lr"], others["weight_decay"]) == (0.1, 0)


def test_frozen_parameters_are_left_out():
    model = make_model()
    model["body"].requires_grad_(False)
    (adamw,) = get_optimizers(model, lr=0.1)
    assert isinstance(adamw, torch.optim.AdamW)
