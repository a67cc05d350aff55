"""Torch's optimizers without its compiler: to the bit what they are with it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from quant.lowbit.eager import SGD, Adam, AdamW


def trained(kind, model, **options):
    """A model after some steps, with a learning rate that a scheduler lowers."""
    model = copy.deepcopy(model)
    optimizer = kind(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x, y = torch.randn(2, 8, 6, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize(
    ("ours", "torchs", "options"),
    [
        (SGD, torch.optim.SGD, {"lr": 0.1}),
        (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        (Adam, torch.optim.Adam, {"lr": 0.01}),
        (AdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.1}),
    ],
)
def test_steps_are_torchs_own(ours, torchs, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    mine, my_state = trained(ours, model, **options)
    theirs, their_state = trained(torchs, model, **options)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not any(torch.equal(mine[name], start) for name, start in model.state_dict().items())
    assert my_state["param_groups"] == their_state["param_groups"]
    for key, state in their_state["state"].items():
        for name, value in state.items():
            assert torch.equal(
                torch.as_tensor(my_state["state"][key][name]), torch.as_tensor(value)
            )


def test_a_step_leaves_no_graph_behind():
    weight = nn.Parameter(torch.ones(2))
    optimizer = SGD([weight], lr=0.5)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight.is_leaf
    assert weight.tolist() == [0.5, 0.5]
