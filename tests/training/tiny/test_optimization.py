# SPDX-License-Identifier: Apache-2.0
import torch
from torch import nn

from training.tiny.optimization import get_optimizers


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.body = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 5, bias=False)

    def forward(self, ids):
        return self.lm_head(self.body(self.embedding(ids)))


def test_matrices_get_muon_and_the_rest_adamw():
    model = Model()
    muon, adamw = get_optimizers(model, lr=0.1)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model.body.weight)]
    rest = {id(p) for p in (model.embedding.weight, model.body.bias, model.lm_head.weight)}
    assert {id(p) for p in adamw.param_groups[0]["params"]} == rest


def test_frozen_parameters_are_left_out():
    model = Model()
    model.body.requires_grad_(False)
    (adamw,) = get_optimizers(model, lr=0.1)
    assert isinstance(adamw, torch.optim.AdamW)


def test_both_learn():
    model, ids = Model(), torch.arange(5)
    optimizers = get_optimizers(model, lr=0.05)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(ids), ids)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
