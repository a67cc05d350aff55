"""Which weights of a model low-bit clients hold on a grid, and why they do not hold the others."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from core.arguments import check_kind
from quant.qat.rules import kind_of, rule_of, why_no_rule

_NORMALIZATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Place:
    """Where a model has a parameter: a layer of it, by name, and the layer's attribute."""

    name: str
    layer: nn.Module
    attribute: str

    @property
    def path(self) -> str:
        """Return the parameter's name in the model."""
        return f"{self.name}.{self.attribute}".removeprefix(".")


@dataclass(frozen=True)
class Survey:
    """The parameters of a model.

    Attributes
    ----------
    on_grid : dict of str to list of Place
        All places of each weight that is quantized, by its name, which is the first one's.
    float32 : dict of str to list of (Place, str)
        By the name of a layer: those that it holds in float32, and why.
    """

    on_grid: dict[str, list[Place]] = field(default_factory=dict)
    float32: dict[str, list[tuple[Place, str]]] = field(default_factory=dict)


def survey(model: nn.Module) -> Survey:
    """Look through a model, prepared or not."""
    check_kind("model", model, nn.Module)
    modules = dict(model.named_modules())
    unfit: dict[str, str] = {}
    places: dict[int, list[Place]] = {}
    for name, module in modules.items():
        unfit[name] = _why_unfit(name, modules, unfit)
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(Place(name, module, attribute))
    in_memory = Counter(_memory_of(parameter) for parameter in model.parameters())
    found = Survey()
    for held in places.values():
        why = {place.path: _why_float32(place, unfit[place.name]) for place in held}
        parameter = held[0].layer.get_parameter(held[0].attribute)
        if in_memory[_memory_of(parameter)] > 1:
            why[held[0].path] = why[held[0].path] or "another parameter lies in its memory"
        if not any(why.values()):
            found.on_grid[held[0].path] = held
            continue
        path, reason = next((path, reason) for path, reason in why.items() if reason)
        for place in held:
            own = why[place.path] or f"it is {path} too, where it stays float32: {reason}"
            found.float32.setdefault(place.name, []).append((place, own))
    return found


def _why_unfit(name: str, modules: dict[str, nn.Module], unfit: dict[str, str]) -> str:
    """Return why no weight of a layer is quantized; empty if some may be."""
    layer = modules[name]
    if "forward" in vars(layer):
        return "the layer was given a forward pass of its own"
    if isinstance(layer, ParametrizationList):
        return "a parametrization computes with it"
    if (rule := rule_of(layer)) is None:
        return why_no_rule(layer)
    if rule.within is not None:
        outer = name.rpartition(".")[0]
        kind = kind_of(modules[outer]) if name else None
        if kind is not rule.within or unfit[outer]:
            return f"it is part of no {rule.within.__name__} that has a rule"
    return rule.stays_float32(layer)


def _why_float32(place: Place, unfit: str) -> str:
    if unfit:
        return unfit
    rule = rule_of(place.layer)
    assert rule is not None  # Or the layer would be unfit.
    if place.attribute not in rule.names(place.layer):
        return "the rule of its layer does not name it"
    parameter = place.layer.get_parameter(place.attribute)
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "it has no shape yet"
    return "" if parameter.ndim > 1 else "it has fewer than two dimensions"


def _memory_of(parameter: nn.Parameter) -> int:
    """Return what two parameters have in common that lie in the same memory."""
    unmade = isinstance(parameter, nn.parameter.UninitializedParameter)
    place = 0 if unmade else parameter.data_ptr()
    return place or id(parameter)  # What is not in memory shares none.


def quantizable_weights(model: nn.Module) -> list[str]:
    """Return the names of the weights that a low-bit client holds on a grid.

    This is the one rule of what is quantized: the weights of layers whose type has a rule
    (`register_layer`), prepared or not. Subclasses of such a type, and a layer that was given a
    `forward` of its own, are left alone, as their forward pass may be another; these, other types,
    biases and normalization compute and travel in float32 (`unsupported_layers`). A weight that
    several layers hold has one name, the first, and is quantized if all of them can be.

    Examples
    --------
    >>> quantizable_weights(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2), nn.LayerNorm(2)))
    ['0.weight', '1.weight']
    """
    return list(survey(model).on_grid)


def unsupported_layers(model: nn.Module) -> list[str]:
    """Return a line for every layer with weights that stay float32 at any width, with the reason.

    Biases and normalization, which stay float32 always, are not named.

    Parameters
    ----------
    model : nn.Module
        Prepared or not.

    Examples
    --------
    >>> unsupported_layers(nn.Sequential(nn.Linear(3, 3), nn.Embedding(9, 4, max_norm=1.0)))
    ['1 (Embedding): weight stays float32: max_norm changes it in the forward pass']
    """
    return list(_lines(model))


def _lines(model: nn.Module) -> Iterator[str]:
    for name, held in survey(model).float32.items():
        weights = {p.attribute: why for p, why in held if _is_weight(p)}
        for why in dict.fromkeys(weights.values()):
            named = [attribute for attribute, own in weights.items() if own == why]
            stay = f"{named[0]} stays" if len(named) == 1 else f"{', '.join(named)} stay"
            kind = type(held[0][0].layer).__name__
            yield f"{name or 'the model'} ({kind}): {stay} float32: {why}"


def _is_weight(place: Place) -> bool:
    """Return whether a parameter is none of those that are float32 everywhere."""
    parameter = place.layer.get_parameter(place.attribute)
    if (rule := rule_of(place.layer)) and place.attribute in rule.names(place.layer):
        return True
    if isinstance(place.layer, _NORMALIZATION) or place.attribute.startswith("bias"):
        return False
    return isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.ndim > 1
