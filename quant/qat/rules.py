"""Which layers have a quantization-aware form: one registered rule for each type.

A type without a rule stays float32, and so does a subclass of one that has a rule, as its forward
pass may be another. `register_layer` adds a type of one's own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from core.arguments import check_names
from quant.qat.attention import QuantMultiheadAttention
from quant.qat.base import QuantLayer
from quant.qat.layers import (
    QuantBilinear,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantEmbedding,
    QuantEmbeddingBag,
    QuantLinear,
    QuantOutProjection,
)
from quant.qat.recurrent import (
    QuantGRU,
    QuantGRUCell,
    QuantLSTM,
    QuantLSTMCell,
    QuantRNN,
    QuantRNNCell,
    weights_of,
)


def _never(layer: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class LayerRule:
    """How the layers of one type are quantized.

    Attributes
    ----------
    weights : collection of str, or callable
        Names of the parameters that are weights, or ``f(layer)`` that returns them. They have two
        or more dimensions, and a scale for each index of the first. The layer's other parameters
        stay float32; its submodules go by rules of their own.
    layer : type, optional
        A subclass of `QuantLayer` and of the type, which the layer becomes. By default one that
        computes by the type's own forward pass, in which the weights are replaced by those on
        their grids, and the first argument by its own on one (`QuantLayer.forward`); it cannot be
        pickled, as no module has its name.
    stays_float32 : callable, optional
        ``f(layer)``: why this one layer stays float32 all the same; empty if it does not.
    within : type, optional
        The rule is for layers that are submodules of this type, where it has a rule itself.

    Examples
    --------
    >>> LayerRule(["kernel"]).names(nn.Linear(2, 2))
    ('kernel',)
    """

    weights: Iterable[str] | Callable[[Any], Iterable[str]]
    layer: type[QuantLayer] | None = None
    stays_float32: Callable[[Any], str] = _never
    within: type[nn.Module] | None = None

    def __post_init__(self) -> None:
        if not callable(self.weights):
            names = tuple(self.weights) if not isinstance(self.weights, str) else self.weights
            check_names("weights", names)
            object.__setattr__(self, "weights", names)

    def names(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the names of a layer's weights."""
        return tuple(self.weights(layer) if callable(self.weights) else self.weights)


_RULES: dict[type[nn.Module], LayerRule] = {}


def register_layer(kind: type[nn.Module], rule: LayerRule) -> None:
    """Let the layers of a type be quantized, wherever `prepare` meets one.

    Server and devices need to register the same: do it where the type is defined.

    Parameters
    ----------
    kind : type
        The layers' own type; its subclasses need rules of their own. A rule that the type has
        already is replaced.
    rule : LayerRule
        Its weights, and how they are computed with.

    Raises
    ------
    ValueError
        If `kind` is no type of modules, or the rule's layer is none of it.

    Examples
    --------
    >>> class Mixed(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.randn(4, 4))
    ...     def forward(self, x):
    ...         return (x @ self.kernel).relu()
    >>> register_layer(Mixed, LayerRule(["kernel"]))
    >>> quantizable_weights(nn.Sequential(Mixed(), nn.Linear(4, 1)))
    ['0.kernel', '1.weight']
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"kind: {kind!r} is not allowed: it should be a type of nn.Module")
    if not isinstance(rule, LayerRule):
        raise ValueError(f"rule: {rule!r} is not allowed: it should be a LayerRule")
    if issubclass(kind, QuantLayer):
        raise ValueError(
            f"kind: {kind.__name__} is quantization-aware; give the type it is made of"
        )
    layer = rule.layer
    if layer is None:
        layer = type(f"Quant{kind.__name__}", (QuantLayer, kind), {"__module__": kind.__module__})
    elif not (issubclass(layer, QuantLayer) and issubclass(layer, kind)):
        raise ValueError(
            f"rule: {layer.__name__} is not allowed as its layer: it should be a subclass of "
            f"QuantLayer and of {kind.__name__}"
        )
    _RULES[kind] = LayerRule(rule.weights, layer, rule.stays_float32, rule.within)


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """Return the type whose rule is a layer's, prepared or not; None if it has no rule."""
    kinds = type(layer).__mro__ if isinstance(layer, QuantLayer) else (type(layer),)
    return next((kind for kind in kinds if kind in _RULES), None)


def rule_of(layer: nn.Module) -> LayerRule | None:
    """Return the rule of a layer, prepared or not; None if it has none.

    >>> rule_of(nn.Linear(2, 2)).names(nn.Linear(2, 2))
    ('weight',)
    """
    kind = kind_of(layer)
    return None if kind is None else _RULES[kind]


def why_no_rule(layer: nn.Module) -> str:
    """Return why a layer has no rule."""
    for kind in type(layer).__mro__[1:]:
        if kind in _RULES:
            return (
                f"{type(layer).__name__} is a subclass of {kind.__name__}, whose forward pass may "
                "be another (quant.register_layer)"
            )
    return f"{type(layer).__name__} has no rule (quant.register_layer)"


def _changed_in_forward(layer: nn.Embedding | nn.EmbeddingBag) -> str:
    if layer.max_norm is not None:
        return "max_norm changes it in the forward pass"
    return "its gradient is sparse" if layer.sparse else ""


_WEIGHT = ("weight",)
_CELL = ("weight_ih", "weight_hh")
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

for _kind, _rule in {
    nn.Conv1d: LayerRule(_WEIGHT, QuantConv1d),
    nn.Conv2d: LayerRule(_WEIGHT, QuantConv2d),
    nn.Conv3d: LayerRule(_WEIGHT, QuantConv3d),
    nn.ConvTranspose1d: LayerRule(_WEIGHT, QuantConvTranspose1d),
    nn.ConvTranspose2d: LayerRule(_WEIGHT, QuantConvTranspose2d),
    nn.ConvTranspose3d: LayerRule(_WEIGHT, QuantConvTranspose3d),
    nn.Linear: LayerRule(_WEIGHT, QuantLinear),
    nn.Bilinear: LayerRule(_WEIGHT, QuantBilinear),
    nn.Embedding: LayerRule(_WEIGHT, QuantEmbedding, _changed_in_forward),
    nn.EmbeddingBag: LayerRule(_WEIGHT, QuantEmbeddingBag, _changed_in_forward),
    nn.MultiheadAttention: LayerRule(_PROJECTIONS, QuantMultiheadAttention),
    # Any other that holds one computes with its weight in a way that is not known.
    NonDynamicallyQuantizableLinear: LayerRule(
        _WEIGHT, QuantOutProjection, within=nn.MultiheadAttention
    ),
    nn.RNN: LayerRule(weights_of, QuantRNN),
    nn.LSTM: LayerRule(weights_of, QuantLSTM),
    nn.GRU: LayerRule(weights_of, QuantGRU),
    nn.RNNCell: LayerRule(_CELL, QuantRNNCell),
    nn.LSTMCell: LayerRule(_CELL, QuantLSTMCell),
    nn.GRUCell: LayerRule(_CELL, QuantGRUCell),
}.items():
    register_layer(_kind, _rule)
