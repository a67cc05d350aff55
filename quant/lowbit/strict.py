"""Strict low-bit training: SGD and AdamW whose weights never leave their grid.

After every step the new weights are rounded stochastically back to the grid, so that a step
smaller than the distance between two levels still moves the weight by its size on average. The
scale is fixed for as long as the optimizer lives, one round of federated training: the server,
which knows the model that it sent, knows the grid exactly. Momentum and moments are float32.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from core.arguments import check_kind, check_number, check_tensors
from core.bits import FLOAT_BITS, check_width
from quant.grid import check_finite, dequantize, naming, quantize_nearest, quantize_stochastic
from quant.lowbit.eager import SGD, AdamW
from quant.qat.activations import fake_quantize_gradient


class Strict(Optimizer):
    """What an optimizer inherits first to be one on the grid; its `step` moves the weights."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        scales: Mapping[str, Tensor],
        bits: int,
        gradient_bits: int,
        generator: torch.Generator,
        **options: Any,
    ) -> None:
        check_width("bits", bits, or_float=False)
        check_width("gradient_bits", gradient_bits)
        check_number("lr", options["lr"], above=0)
        check_number("weight_decay", options["weight_decay"], least=0)
        check_kind("generator", generator, torch.Generator)
        check_tensors("scales", scales)
        self._named = named = _by_name(named_parameters)
        if odd := scales.keys() - named.keys():
            raise ValueError(f"scales: there is no parameter {min(odd)!r}")
        super().__init__(named.values(), **options)
        self._on_grid = {name: (named[name], scale) for name, scale in scales.items()}
        self._bits = bits
        self._gradient_bits = gradient_bits
        self._generator = generator
        with torch.no_grad():
            for name, (weight, scale) in self._on_grid.items():
                with naming(name):
                    weight.copy_(dequantize(quantize_nearest(weight, scale, bits), scale))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step and round the weights back to their grid.

        Raises
        ------
        NonFiniteError
            If a gradient, or a parameter after the step, holds a NaN or an infinity; the message
            names it. Rounding would make an ordinary code of it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, parameter in self._named.items():
            if parameter.grad is None:
                continue
            with naming(name):
                check_finite(parameter.grad, "the gradient")
            if name in self._on_grid and self._gradient_bits != FLOAT_BITS:
                parameter.grad = fake_quantize_gradient(
                    parameter.grad, self._gradient_bits, self._generator
                )
        super().step()
        for name, parameter in self._named.items():
            if name not in self._on_grid:  # Those are checked as they are rounded.
                with naming(name):
                    check_finite(parameter, "the parameter")
        for name, (weight, scale) in self._on_grid.items():
            with naming(name):
                weight.copy_(self._rounded(weight, scale))
        return loss

    def _rounded(self, weight: Tensor, scale: Tensor) -> Tensor:
        values = dequantize(quantize_stochastic(weight, scale, self._bits, self._generator), scale)
        if weight.grad is not None and weight.grad.flatten(1).any(dim=1).all():
            return values
        # There are rows that take no part, as of an embedding. The quotient of a level by its scale
        # may be off by a last bit, by which they would move once in many steps.
        nearest = dequantize(quantize_nearest(weight, scale, self._bits), scale)
        return torch.where(nearest == weight, weight, values)


class StrictSGD(Strict, SGD):
    """SGD on the grid.

    Parameters
    ----------
    named_parameters : iterable of (str, nn.Parameter)
        All parameters of the model.
    scales : mapping of str to Tensor
        Float32 scales ``[channels]`` of the parameters that live on a grid; those are brought
        onto it, to the nearest level, at once. The others are trained in float32.
    bits : int
        Bit-width of the grid, 2 to 16.
    gradient_bits : int
        Width of the weight gradients, 2 to 16, or 32 for float32.
    generator : torch.Generator
        Seeded source of the rounding noise.
    lr, momentum, weight_decay : float
        As in `torch.optim.SGD`.

    Examples
    --------
    >>> weight = nn.Parameter(torch.tensor([[0.9, -0.2]]))
    >>> noise = torch.Generator().manual_seed(0)
    >>> optimizer = StrictSGD([("w", weight)], {"w": torch.ones(1)}, 2, generator=noise, lr=0.1)
    >>> weight.detach()
    tensor([[1., 0.]])
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        scales: Mapping[str, Tensor],
        bits: int,
        *,
        gradient_bits: int = FLOAT_BITS,
        generator: torch.Generator,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        check_number("momentum", momentum, least=0, below=1)
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(named_parameters, scales, bits, gradient_bits, generator, **options)


class StrictAdamW(Strict, AdamW):
    """AdamW on the grid.

    Parameters
    ----------
    named_parameters, scales, bits, gradient_bits, generator
        As of `StrictSGD`.
    lr, betas, eps, weight_decay
        As in `torch.optim.AdamW`, but by default without a decay.

    Examples
    --------
    >>> weight = nn.Parameter(torch.tensor([[0.9, -0.2]]))
    >>> noise = torch.Generator().manual_seed(0)
    >>> optimizer = StrictAdamW([("w", weight)], {"w": torch.ones(1)}, 2, generator=noise, lr=1.0)
    >>> weight.grad = torch.tensor([[5.0, -5.0]])
    >>> optimizer.step()
    >>> weight.detach()
    tensor([[0., 1.]])
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        scales: Mapping[str, Tensor],
        bits: int,
        *,
        gradient_bits: int = FLOAT_BITS,
        generator: torch.Generator,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for index, beta in enumerate(betas):
            check_number(f"betas[{index}]", beta, least=0, below=1)
        check_number("eps", eps, above=0)
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(named_parameters, scales, bits, gradient_bits, generator, **options)


def _by_name(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, nn.Parameter]:
    pairs = list(named_parameters)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            "named_parameters: they are no pairs; allowed: names and parameters, as of "
            "model.named_parameters()"
        )
    check_tensors("named_parameters", dict(pairs))
    return dict(pairs)
