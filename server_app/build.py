"""From a flat run configuration to validated settings and a strategy."""

from collections.abc import Mapping
from typing import Any

from core.constructors import Broadcast
from core.devices import pick_device
from core.errors import SettingsError
from core.options import Options, format_assignments, parse_assignments
from core.reference import in_one_line, load_reference
from core.settings import Settings
from strategies import STRATEGIES, MixedPrecisionStrategy, ProWD

# Before each key of a class of the user's own in an error.
_OWN_PREFIX = "strategy-options: "


def read_settings(run_config: Mapping[str, object]) -> tuple[Settings, dict[str, object]]:
    """Validate a run's configuration.

    Parameters
    ----------
    run_config : mapping
        Flower's: common settings, and each strategy's own under its name.

    Returns
    -------
    tuple of Settings and dict
        The common settings, and the chosen strategy's own by their full keys; those of a class of
        the user's own stand all in ``strategy-options``, the defaults too.

    Raises
    ------
    SettingsError
        If a key or a value is not allowed, also one of a strategy that is not chosen.
    """
    settings = Settings.of_run(run_config)
    # As it decides the last bits, the record names the device, and not "auto".
    device = pick_device(settings.server_device).type
    settings = settings.model_copy(update={"server_device": device})
    chosen, _ = _split_name(settings.strategy)
    own: dict[str, object] = {}
    left = set(run_config) - Settings.keys()
    for name, strategy_class in STRATEGIES.items():
        prefix = f"{name}-"
        keys = {key for key in left if key.startswith(prefix)}
        left -= keys
        values = {key.removeprefix(prefix): run_config[key] for key in keys}
        read = getattr(strategy_class, "Options", Options).read(values, prefix)
        if name == chosen:
            own = read.to_settings(prefix)
    if left:
        key = sorted(left)[0]
        raise SettingsError(f"{key}: there is no such setting (value {run_config[key]!r})")
    if not chosen:
        values = parse_assignments(settings.strategy_options)
        read = _options_class(_class_of(settings.strategy)).read(values, _OWN_PREFIX)
        try:
            own = {"strategy-options": format_assignments(read.to_settings())}
        except ValueError as error:  # Of a default that nobody validated, or a type of their own.
            raise SettingsError(f"{_OWN_PREFIX}{error}") from None
    elif settings.strategy_options:
        raise SettingsError(
            f"strategy-options: {settings.strategy_options!r} with strategy {settings.strategy}; "
            "allowed with package.module:Class only"
        )
    return settings, own


def _split_name(strategy: str) -> tuple[str, str]:
    """Part ``"flwr:FedAdam"`` into the registry's name and the class; other names have no class.

    For a class of the user's own, ``"package.module:Class"``, the registry's name is empty.
    """
    name, colon, inner = strategy.partition(":")
    if colon and name not in STRATEGIES:
        return "", strategy
    if name not in STRATEGIES or bool(colon) != (name == "flwr"):
        names = ", ".join(n for n in STRATEGIES if n != "flwr")
        raise SettingsError(
            f"strategy: there is no {strategy!r}; allowed: {names}, flwr:NAME of Flower's own, or "
            "package.module:Class"
        )
    return name, inner


def _class_of(strategy: str) -> type[MixedPrecisionStrategy]:
    name, inner = _split_name(strategy)
    if name:
        return STRATEGIES[name]
    found = load_reference("strategy", inner)
    if not (isinstance(found, type) and issubclass(found, MixedPrecisionStrategy)):
        raise SettingsError(
            f"strategy: {inner!r} is no subclass of strategies.MixedPrecisionStrategy"
        )
    return found


def _options_class(strategy_class: type[MixedPrecisionStrategy]) -> type[Options]:
    found = getattr(strategy_class, "Options", Options)
    if not (isinstance(found, type) and issubclass(found, Options)):
        raise SettingsError(
            f"strategy: {strategy_class.__name__}.Options is no subclass of core.options.Options"
        )
    return found


def build_strategy(settings: Settings, own: Mapping[str, object]) -> MixedPrecisionStrategy:
    """Make the strategy that the settings name.

    Parameters
    ----------
    settings : Settings
        Common settings.
    own : mapping
        The strategy's own, by full keys.

    Raises
    ------
    SettingsError
        If the settings do not go together with the strategy.
    """
    name, inner = _split_name(settings.strategy)
    strategy_class = _class_of(settings.strategy)
    arguments: dict[str, Any] = {
        "fraction_train": settings.fraction_train,
        "fraction_evaluate": settings.fraction_evaluate,
        "seed": settings.seed,
        "min_nodes": settings.min_nodes,
        "node_wait": settings.node_wait,
        "broadcast": _broadcast(settings, strategy_class),
        "weight_step": settings.weight_step,
        "norm_bound": settings.norm_bound,
        "coded": settings.lossless_coding,
        "local_epochs": settings.local_epochs,
        "batch_size": settings.batch_size,
    }
    if hasattr(strategy_class, "Options"):
        prefix = f"{name}-" if name else _OWN_PREFIX
        values = {key.removeprefix(prefix): value for key, value in own.items()}
        if not name:
            values = parse_assignments(str(own["strategy-options"]))
        arguments["options"] = _options_class(strategy_class).read(values, prefix)
    if name == "flwr":
        arguments["name"] = inner
    if issubclass(strategy_class, ProWD):
        arguments["low_bit_training"] = settings.low_bit_training
    if not name:
        return _make_own(strategy_class, inner, arguments)
    try:
        return strategy_class(**arguments)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _make_own(
    strategy_class: type[MixedPrecisionStrategy], text: str, arguments: Mapping[str, Any]
) -> MixedPrecisionStrategy:
    """Make a strategy of the user's own, and name it where that fails."""
    try:
        made = strategy_class(**arguments)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"strategy: {text!r} cannot be made ({in_one_line(error)})") from None
    except TypeError as error:
        raise SettingsError(
            f"strategy: {text!r} cannot be made ({in_one_line(error)}); it defines combine, and "
            "its __init__ passes **kwargs on"
        ) from None
    if not hasattr(made, "nodes"):
        raise SettingsError(f"strategy: the __init__ of {text!r} does not call super().__init__")
    return made


def _broadcast(settings: Settings, strategy_class: type[MixedPrecisionStrategy]) -> Broadcast:
    """Resolve ``broadcast="auto"``; strict clients start on the server's grid, qat ones between."""
    has_buffer = settings.server_buffer >= 2
    if settings.broadcast == "calibrated" and not has_buffer:
        raise SettingsError(
            f"server-buffer: {settings.server_buffer} leaves too few images for "
            "broadcast=calibrated; allowed: 2 or more"
        )
    if settings.broadcast != "auto":
        return settings.broadcast
    strict = settings.low_bit_training == "strict"
    calibrated = issubclass(strategy_class, ProWD) and strict and has_buffer
    return "calibrated" if calibrated else "float32"
