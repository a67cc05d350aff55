"""Quantization-aware attention."""

from typing import Any

from torch import Tensor, nn

from core.bits import FLOAT_BITS
from quant.qat.activations import fake_quantize_activation
from quant.qat.base import QuantLayer


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with fake-quantized projections, packed or not, and inputs.

    Torch's forward pass, its fused kernel included, gets the projections on their grids. The query
    has the layer's grid. Key and value share it where they are the same tensor, as in
    self-attention, and have the grid that spans them where not. What is computed between the
    projections (products of queries and keys, their softmax, what enters `out_proj`) is float32,
    and so are ``bias_k`` and ``bias_v``.

    >>> attention = prepare(nn.MultiheadAttention(4, 2), QuantConfig(weight_bits=4))
    >>> list(weight_scales(attention))
    ['in_proj_weight', 'out_proj.weight']
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        on_grid = {id(query): self.quantized_input(query)}
        for x in (key, value):
            if id(x) not in on_grid:
                on_grid[id(x)] = self._spanned(x)
        # One tensor stays one tensor: torch projects it at once.
        inputs = (on_grid[id(x)] for x in (query, key, value))
        y: tuple[Tensor, Tensor | None] = self.computed(*inputs, *args, **kwargs)
        return y

    def _spanned(self, x: Tensor) -> Tensor:
        bits = self.config.activation_bits
        return x if bits == FLOAT_BITS else fake_quantize_activation(x, bits)

    def quantized_weights(self) -> dict[str, Tensor]:
        """Return the projections on their grids, also that of `out_proj`."""
        weights = super().quantized_weights()
        if isinstance(self.out_proj, QuantLayer):
            inner = self.out_proj.quantized_weights()
            weights |= {f"out_proj.{name}": weight for name, weight in inner.items()}
        return weights

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        self._take_new_weights()
