"""A model made quantization-aware by one call, and the scales of its weights.

`prepare` changes the class of every layer whose type has a rule (`quant.qat.rules`) for one that
computes with fake-quantized weights and inputs, on torch's own operators, and keeps parameter
names, so that a state dict fits both models. With `QuantConfig(gradient_bits=8)` the output
gradients of each layer are quantized too.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from core.arguments import check_kind, check_tensors
from quant.grid import check_finite, naming
from quant.qat.base import LayerWeight, QuantLayer, wrong_dtype
from quant.qat.config import QuantConfig
from quant.qat.rules import rule_of
from quant.qat.survey import Place, survey


def prepare(model: nn.Module, config: QuantConfig) -> nn.Module:
    """Make a model quantization-aware, in place.

    Parameters
    ----------
    model : nn.Module
        Any model; the layers of its `quantizable_weights` change their class and keep their
        parameters, hooks and names. Layers that were prepared for other widths take the new ones.
    config : QuantConfig
        Widths.

    Returns
    -------
    nn.Module
        The same model. Scales are fitted to its present weights, and again whenever weights are
        loaded into it, a layer is given another `nn.Parameter`, or its ``reset_parameters`` is
        called; after each, grids of activations are to be fitted anew. What changes weights in
        place, as an optimizer, `torch.nn.init` or ``weight.data``, leaves the scales as they are,
        and clips what is beyond them: call `refit_scales` after it.

    Raises
    ------
    ValueError
        If a weight that is to be quantized is empty, not finite or not float32; the message names
        it, and the model is as it was.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 2)), QuantConfig(weight_bits=4))
    >>> model(torch.ones(1, 3)).shape
    torch.Size([1, 2])
    """
    if not isinstance(config, QuantConfig):
        raise ValueError(f"config: {config!r} is not allowed: it should be a QuantConfig")
    weights = survey(model).on_grid
    for name, held in weights.items():
        _check_weight(name, held[0].layer.get_parameter(held[0].attribute).detach())
    layers = _to_change(model, weights)
    for layer in layers.values():
        _make_quantized(layer)
    # In the order of the model: each scale's layer before the others that hold the weight.
    for layer in layers.values():
        _attach(layer, config, weights)
    for module in model.modules():
        # Torch's fused kernel would compute with the weights as they are, not on their grid.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def _check_weight(name: str, weight: Tensor) -> None:
    with naming(name):
        check_finite(weight, "the weight")
    if weight.dtype != torch.float32:
        raise ValueError(f"{name}: {wrong_dtype(weight.dtype)}")
    if not weight.numel():
        raise ValueError(f"{name} has no values: its shape is {list(weight.shape)}")


def _to_change(model: nn.Module, weights: Mapping[str, list[Place]]) -> dict[str, nn.Module]:
    """Return the layers of these weights, and those that compute with another's, by name."""
    named = {place.name for held in weights.values() for place in held}
    modules = dict(model.named_modules())
    for name in list(named):
        rule = rule_of(modules[name])
        if rule is not None and rule.within is not None:
            named.add(name.rpartition(".")[0])
    return {name: module for name, module in modules.items() if name in named}


def _make_quantized(layer: nn.Module) -> None:
    rule = rule_of(layer)
    assert rule is not None  # Or it would not have been found.
    assert rule.layer is not None
    if not isinstance(layer, QuantLayer):
        layer.__class__ = rule.layer


def _attach(layer: nn.Module, config: QuantConfig, weights: Mapping[str, list[Place]]) -> None:
    own, owners = [], {}
    for first, *others in weights.values():
        own += [place.attribute for place in (first, *others) if place.layer is layer]
        for place in others:
            if place.layer is layer:
                owners[place.attribute] = _quantized(first.layer), first.attribute
    _quantized(layer).attach(config, own, owners)


def _quantized(layer: nn.Module) -> QuantLayer:
    assert isinstance(layer, QuantLayer)
    return layer


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Yield the names and quantization-aware layers of a prepared model.

    >>> model = prepare(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), QuantConfig(weight_bits=4))
    >>> [name for name, _ in quantized_layers(model)]
    ['0']
    """
    check_kind("model", model, nn.Module)
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def layers_by_weight(model: nn.Module) -> Iterator[tuple[str, LayerWeight]]:
    """Yield the weights on grids of a prepared model by name, each with the layer that holds it.

    A weight that several layers hold is that of the first.

    >>> model = prepare(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), QuantConfig(weight_bits=4))
    >>> [(name, type(held.layer).__name__) for name, held in layers_by_weight(model)]
    [('0.weight', 'QuantLinear')]
    """
    for name, layer in quantized_layers(model):
        for attribute in layer.weight_names:
            if layer.owner(attribute) == (layer, attribute):
                yield f"{name}.{attribute}".removeprefix("."), LayerWeight(layer, attribute)


def refit_scales(model: nn.Module) -> None:
    """Fit the scales of a prepared model to its present weights.

    >>> model = prepare(nn.Sequential(nn.Linear(1, 1)), QuantConfig(weight_bits=8))
    >>> _ = nn.init.constant_(model[0].weight, 12.7)
    >>> refit_scales(model)
    >>> weight_scales(model)
    {'0.weight': tensor([0.1000])}
    """
    for _, held in layers_by_weight(model):
        held.layer.refit_scale(held.attribute)


def set_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> None:
    """Give a prepared model's layers the scales of the grid that their weights came on.

    Parameters
    ----------
    model : nn.Module
        Prepared model.
    scales : mapping of str to Tensor
        Float32 scales ``[channels]`` by weight name; layers that are not named keep theirs.

    Raises
    ------
    ValueError
        If there is no such layer, or a scale is not one positive number for each of its channels.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 1)), QuantConfig(weight_bits=4))
    >>> set_scales(model, {"0.weight": torch.tensor([0.5])})
    >>> weight_scales(model)
    {'0.weight': tensor([0.5000])}
    """
    layers = dict(layers_by_weight(model))
    check_tensors("scales", scales)
    for name, scale in scales.items():
        if name not in layers:
            raise ValueError(f"{name}: there is no layer that was prepared with this weight")
        shape = layers[name].parameter.shape[:1]
        if scale.shape != shape or (scale <= 0).any():
            raise ValueError(
                f"{name}: a scale of shape {list(scale.shape)}; allowed: a number above 0 for each "
                f"of {shape[0]} channels"
            )
        with naming(name):
            check_finite(scale, "the scale")
    for name, scale in scales.items():
        layers[name].layer.set_scale(scale.float().clone(), layers[name].attribute)


def set_generator(model: nn.Module, generator: torch.Generator) -> None:
    """Give a prepared model's layers the source of the noise that rounds their gradients.

    Parameters
    ----------
    model : nn.Module
        Prepared model.
    generator : torch.Generator
        On the model's device. Without one, layers draw from torch's own, as dropout does.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 1)), QuantConfig(4, gradient_bits=8))
    >>> set_generator(model, torch.Generator().manual_seed(1))
    >>> model[0].generator.initial_seed()
    1
    """
    check_kind("generator", generator, torch.Generator)
    for _, layer in quantized_layers(model):
        layer.generator = generator


def weight_scales(model: nn.Module) -> dict[str, Tensor]:
    """Return the scales of a prepared model by the names of the weights they belong to.

    Raises
    ------
    ValueError
        If a weight was tied or parametrized after it was prepared, and so has no grid any more.

    Examples
    --------
    >>> model = prepare(nn.Sequential(nn.Linear(3, 2)), QuantConfig(weight_bits=4))
    >>> weight_scales(model)["0.weight"].shape
    torch.Size([2])
    """
    layers, found = dict(layers_by_weight(model)), survey(model).on_grid
    loose = [name for name, held in found.items() if not _is_whole(held)]
    if loose := [*loose, *(name for name in layers if name not in found)]:
        raise ValueError(
            f"{loose[0]}: its layer was prepared, and its weight tied, parametrized or given "
            "another forward pass since; prepare the model last"
        )
    return {name: held.scale for name, held in layers.items()}


def _is_whole(held: list[Place]) -> bool:
    """Return whether all layers of a weight take its scale from the first of them, or none has."""
    owners = [
        place.layer.owner(place.attribute)
        if isinstance(place.layer, QuantLayer) and place.attribute in place.layer.weight_names
        else None
        for place in held
    ]
    return set(owners) in ({None}, {(held[0].layer, held[0].attribute)})
