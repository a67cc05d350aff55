"""Torch's optimizers as eager mode needs them: a new process trains seconds sooner.

The methods of torch's own are wrapped in what keeps its compiler away from them, and import the
whole of it, compiled or not. A client's process may train for less long than that takes.
"""

from inspect import unwrap

import torch
from torch.optim import Optimizer


class Eager:
    """What an optimizer inherits first to be rid of those wrappers; `step` is its own."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)


class SGD(Eager, torch.optim.SGD):
    """`torch.optim.SGD`, neither to be compiled nor to be differentiated through.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.tensor([2.0])
    >>> SGD([weight], lr=0.25).step()
    >>> weight.detach()
    tensor([0.5000])
    """

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class Adam(Eager, torch.optim.Adam):
    """`torch.optim.Adam`, neither to be compiled nor to be differentiated through."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))


class AdamW(Eager, torch.optim.AdamW):
    """`torch.optim.AdamW`, neither to be compiled nor to be differentiated through.

    >>> weight = nn.Parameter(torch.ones(1))
    >>> weight.grad = torch.tensor([2.0])
    >>> AdamW([weight], lr=0.25, weight_decay=0.0).step()
    >>> weight.detach()
    tensor([0.7500])
    """

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))
