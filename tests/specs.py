"""Toy models of tests, whose tensors belong to no layers: two and more dimensions are weights."""

from collections.abc import Mapping

from torch import Generator, Tensor

from quant import (
    FLOAT_BITS,
    Update,
    UpdateSpec,
    fit_scales,
    quantize_difference,
    quantize_state,
)


def weights_of(state: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in state.items() if tensor.ndim >= 2]


def spec_of_state(state: Mapping[str, Tensor]) -> UpdateSpec:
    return UpdateSpec.of(state, weights_of(state))


def to_bits(state: Mapping[str, Tensor], bits: int, scales=None) -> Update:
    """Round a toy model to nearest, on fitted grids where none are given."""
    names = [] if bits == FLOAT_BITS else weights_of(state)
    return quantize_state(state, bits, fit_scales(state, names, bits) | (scales or {}))


def difference_of(moved: Mapping[str, Tensor], bits: int, generator: Generator) -> Update:
    return quantize_difference(moved, bits, generator, weights_of(moved))
