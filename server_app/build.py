"""From a flat run configuration to validated settings and a strategy that can be made."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from core.constructors import Broadcast
from core.devices import pick_device
from core.errors import SettingsError
from core.options import Options, format_assignments, parse_assignments
from core.reference import in_one_line, load_class
from core.settings import Settings
from server_app.account import noise_multiplier_of
from strategies import (
    OWN_CLASS,
    STRATEGIES,
    MixedPrecisionStrategy,
    StrategyContext,
    strategy_names,
)

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
    chosen = _registered(settings.strategy)
    own: dict[str, object] = {}
    left = set(run_config) - Settings.keys()
    # The longest first, as a name may begin with another.
    for name in sorted(STRATEGIES, key=len, reverse=True):
        prefix, strategy_class = f"{name}-", STRATEGIES[name]
        keys = {key for key in left if key.startswith(prefix)}
        left -= keys
        values = {key.removeprefix(prefix): run_config[key] for key in keys}
        read = strategy_class.Options.read(values, prefix)
        if name == chosen:
            own = read.to_settings(prefix)
    if left:
        key = sorted(left)[0]
        raise SettingsError(f"{key}: there is no such setting (value {run_config[key]!r})")
    if not chosen:
        values = parse_assignments(settings.strategy_options)
        read = _class_of(settings.strategy).Options.read(values, _OWN_PREFIX)
        try:
            own = {"strategy-options": format_assignments(read.to_settings())}
        except ValueError as error:  # Of an unvalidated default, or a type of their own.
            raise SettingsError(f"{_OWN_PREFIX}{error}") from None
    elif settings.strategy_options:
        raise SettingsError(
            f"strategy-options: {settings.strategy_options!r} with strategy {settings.strategy}; "
            f"allowed with {OWN_CLASS} only"
        )
    return settings, own


def _registered(strategy: str) -> str:
    """Return the name under which a strategy is registered; empty for a class of the user's own."""
    name, colon, _ = strategy.partition(":")
    known = STRATEGIES.get(name)
    if known is None and colon:
        return ""
    if known is None or bool(colon) != bool(known.suffix):
        allowed = ", ".join([*strategy_names(), OWN_CLASS])
        raise SettingsError(f"strategy: there is no {strategy!r}; allowed: {allowed}")
    return name


def _class_of(strategy: str) -> type[MixedPrecisionStrategy]:
    if name := _registered(strategy):
        return STRATEGIES[name].named(strategy.partition(":")[2])
    base: type[MixedPrecisionStrategy] = MixedPrecisionStrategy  # type: ignore[type-abstract]
    return load_class("strategy", strategy, base, "strategies.MixedPrecisionStrategy")


@dataclass(frozen=True)
class Choice:
    """A strategy that is chosen and validated, and not made yet.

    Attributes
    ----------
    setting : str
        `strategy` of the settings.
    kind : type
        Its class.
    options : Options
        Its own settings.
    context : StrategyContext
        What the settings determine of it, without data and network.
    """

    setting: str
    kind: type[MixedPrecisionStrategy]
    options: Options
    context: StrategyContext

    def make(self, context: StrategyContext | None = None) -> MixedPrecisionStrategy:
        """Make the strategy, with a context that has more than this one.

        Raises
        ------
        SettingsError
            If it cannot be made; a class of the user's own is named.
        """
        with self._named():
            made = self.kind(options=self.options, context=context or self.context)
        if not hasattr(made, "nodes"):
            raise SettingsError(
                f"strategy: the __init__ of {self.setting!r} does not call super().__init__"
            )
        return made

    def check(self) -> None:
        """Refuse what does not go together, without making the strategy."""
        with self._named():
            self.kind.check_all(self.options, self.context)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say which class it is that fails."""
        cannot = f"strategy: {self.setting!r} cannot be made"
        try:
            yield
        except SettingsError:
            raise
        except ValueError as error:
            raise SettingsError(f"{cannot} ({in_one_line(error)})") from None
        except TypeError as error:
            raise SettingsError(
                f"{cannot} ({in_one_line(error)}); it defines combine, and its __init__, if it has "
                "one, takes options and context and passes both on"
            ) from None


def choose_strategy(settings: Settings, own: Mapping[str, object]) -> Choice:
    """Find the strategy that the settings name, and validate all that can be before it is made.

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
    kind = _class_of(settings.strategy)
    if name := _registered(settings.strategy):
        prefix = f"{name}-"
        options = kind.Options.read({k.removeprefix(prefix): v for k, v in own.items()}, prefix)
    else:
        options = kind.Options.read(parse_assignments(str(own["strategy-options"])), _OWN_PREFIX)
    choice = Choice(settings.strategy, kind, options, _context(settings, kind))
    choice.check()
    return choice


def _context(settings: Settings, kind: type[MixedPrecisionStrategy]) -> StrategyContext:
    return StrategyContext(
        fraction_train=settings.fraction_train,
        fraction_evaluate=settings.fraction_evaluate,
        seed=settings.seed,
        min_nodes=settings.min_nodes,
        node_wait=settings.node_wait,
        broadcast=_broadcast(settings, kind),
        low_bit_training=settings.low_bit_training,
        optimizer=settings.optimizer,
        upload=None if settings.upload == "auto" else settings.upload,
        weight_step=settings.weight_step,
        secure_aggregation=settings.secure_aggregation,
        secure_threshold=settings.secure_threshold,
        secure_min_group=settings.secure_min_group,
        secure_small_groups=settings.secure_small_groups,
        secure_float_bits=settings.secure_float_bits,
        dp_clip=settings.dp_clip if settings.is_private else 0.0,
        dp_noise_multiplier=noise_multiplier_of(settings),
        round_timeout=settings.round_timeout,
        norm_bound=settings.norm_bound,
        coded=settings.lossless_coding,
        local_epochs=settings.local_epochs,
        batch_size=settings.batch_size,
        max_examples=settings.max_examples,
        weighting=settings.weighting,
    )


def _broadcast(settings: Settings, kind: type[MixedPrecisionStrategy]) -> Broadcast:
    """Resolve ``broadcast="auto"``."""
    has_buffer = settings.server_buffer >= 2
    if settings.broadcast == "calibrated" and not has_buffer:
        raise SettingsError(
            f"server-buffer: {settings.server_buffer} leaves too few images for "
            "broadcast=calibrated; allowed: 2 or more"
        )
    if settings.broadcast != "auto":
        return settings.broadcast
    return kind.preferred_broadcast(settings.low_bit_training, has_buffer)
