"""The widths that a quantization-aware layer computes with."""

from dataclasses import dataclass

from core.bits import FLOAT_BITS, check_width


@dataclass(frozen=True)
class QuantConfig:
    """Widths that a layer computes with.

    Attributes
    ----------
    weight_bits : int
        Per-channel grid of the weights, 2 to 16.
    activation_bits : int
        Per-tensor grid of each layer's input, 2 to 16; 32 leaves it float32.
    gradient_bits : int
        Per-tensor grid of the gradients of each layer's output, 2 to 16; 32 leaves them float32.

    Examples
    --------
    >>> QuantConfig(weight_bits=4, activation_bits=8)
    QuantConfig(weight_bits=4, activation_bits=8, gradient_bits=32)
    """

    weight_bits: int
    activation_bits: int = FLOAT_BITS
    gradient_bits: int = FLOAT_BITS

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "gradient_bits"):
            bits = check_width(name, getattr(self, name), or_float=name != "weight_bits")
            object.__setattr__(self, name, bits)
