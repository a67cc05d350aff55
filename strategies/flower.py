"""Any of Flower's own strategies on clients of any bit-width: `strategy="flwr:FedAdam"`.

The base decodes every client's update to float32; Flower's class then sees ordinary replies and
needs no change. It aggregates; sampling and messages stay with the base.
"""

import inspect
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any, Self, cast

import flwr.serverapp.strategy as flower_strategies
import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedYogi
from pydantic import Field, field_validator
from torch import Tensor

from core.errors import FederationError, SettingsError
from core.options import Options, parse_assignments
from exchange.inbox import Batch
from exchange.protocol import Declaration, Instruction, plain
from exchange.replies import ClientUpdate
from exchange.states import RoundDropped, State, to_arrays, to_state
from strategies.base import MixedPrecisionStrategy
from strategies.context import StrategyContext

PREFIX = "flwr:"
# What these take, print, and never compute with.
_ADAPTIVE, _UNHEEDED = (FedAdam, FedYogi, FedAdagrad), "eta_l"
# Those to which a group's mean is as good as its clients' updates.
_OF_MEANS = ("FedAvg", "FedAvgM", "FedProx", "FedAdam", "FedYogi", "FedAdagrad")
# What an attribute of Flower's classes may be besides arrays: a setting, a counter, nothing yet.
_PLAIN = (bool, int, float, str, type(None))


class FlowerOptions(Options):
    """Settings of Flower's strategies (`flwr-...`)."""

    arguments: str = Field("", description="Arguments of the class, as in eta = 0.1, tau = 0.001.")

    @field_validator("arguments")
    @classmethod
    def _arguments_parse(cls, value: str) -> str:
        parse_assignments(value)
        return value


def flower_names() -> list[str]:
    """Return the names of Flower's strategies that average models; those for trees do not."""
    classes = inspect.getmembers(flower_strategies, inspect.isclass)
    return [n for n, kind in classes if issubclass(kind, FedAvg) and not n.startswith("FedXgb")]


class FlowerStrategy(MixedPrecisionStrategy):
    """One of Flower's strategies behind the decoding of mixed bit-widths, chosen by `named`.

    Parameters
    ----------
    options : FlowerOptions, optional
        Arguments of Flower's class.
    context : StrategyContext, optional
        As for all.

    Raises
    ------
    SettingsError
        If there is no such class, or its arguments do not fit.

    Examples
    --------
    >>> strategy = FlowerStrategy.named("FedAdam")(FlowerOptions(arguments="eta = 0.01"))
    >>> strategy.inner.eta
    0.01
    """

    Options = FlowerOptions
    options: FlowerOptions
    suffix = "NAME"
    # Class in `flwr.serverapp.strategy`.
    name = ""

    def __init__(
        self, options: FlowerOptions | None = None, context: StrategyContext | None = None
    ) -> None:
        super().__init__(options, context)
        self.inner = _make(self.name, parse_assignments(self.options.arguments))
        self._config = ConfigRecord()

    @classmethod
    def named(cls, suffix: str) -> type[Self]:
        """Return the strategy that aggregates by Flower's class of this name."""
        return cast("type[Self]", type(cls.__name__, (cls,), {"name": suffix}))

    @classmethod
    def why_not_secure(cls, options: FlowerOptions, context: StrategyContext) -> str:
        """Name the classes of Flower that take no more than the mean."""
        if cls.name in _OF_MEANS:
            return ""
        allowed = ", ".join(PREFIX + name for name in _OF_MEANS)
        return f"{PREFIX}{cls.name}, which compares single clients; allowed of Flower's: {allowed}"

    @classmethod
    def check(cls, options: FlowerOptions, context: StrategyContext) -> None:
        """Refuse a class that Flower has not, and arguments that it does not take."""
        _make(cls.name, parse_assignments(options.arguments))

    def training_messages(self, server_round: int, arrays: ArrayRecord, grid: Grid) -> list[Batch]:
        """Let Flower's class see the round's model and write its settings, then do as always."""
        # With a share of 0 it samples no node; FedOpt keeps the model, FedProx sets its factor.
        self._config = ConfigRecord({"server-round": server_round})
        self.inner.configure_train(server_round, to_arrays(to_state(arrays)), self._config, grid)
        return super().training_messages(server_round, arrays, grid)

    def instruct(self, server_round: int, client: Declaration) -> Instruction:
        """Pass on the proximal term, the only thing that Flower's classes ask of a client."""
        mu: Any = self._config.get("proximal-mu", 0.0)
        return Instruction(server_round, proximal_mu=float(mu))

    def checkpoint(self) -> tuple[State, dict[str, object]]:
        """Return all that Flower's class keeps: momentum, moments, its present model, numbers."""
        tensors: State = {}
        kinds, numbers = {}, {}
        for key, kept in vars(self.inner).items():
            if callable(kept):
                continue  # How it aggregates metrics or selects: given once.
            if isinstance(kept, _PLAIN):
                numbers[key] = kept
                continue
            named = _named(kept, f"{PREFIX}{type(self.inner).__name__}", key)
            kinds[key] = type(kept).__name__
            tensors |= {f"{key}/{name}": _as_tensor(array) for name, array in named.items()}
        return tensors, {"kinds": kinds, "plain": numbers}

    def restore(self, tensors: State, values: Mapping[str, Any]) -> None:
        """Put them back; what was not there is not there any more."""
        known = {**values["kinds"], **values["plain"]}
        for key in [k for k, v in vars(self.inner).items() if k not in known and not callable(v)]:
            delattr(self.inner, key)
        for key, value in values["plain"].items():
            setattr(self.inner, key, value)
        for key, kind in values["kinds"].items():
            prefix = f"{key}/"
            mine = {p.removeprefix(prefix): t for p, t in tensors.items() if p.startswith(prefix)}
            setattr(self.inner, key, _rebuilt(kind, mine))

    def combine(
        self, server_round: int, start: State, updates: Iterator[ClientUpdate]
    ) -> State | None:
        """Hand the decoded updates to Flower's class.

        Raises
        ------
        RoundDropped
            If it makes no model of them, and clients were missing.
        FederationError
            If it makes none of the updates of all clients: then it will hardly do so later.
        """
        replies = [_as_reply(item, list(start)) for item in updates]
        if not replies:
            return None
        arrays, reason = self._aggregate(server_round, replies)
        if arrays is not None:
            return to_state(arrays)
        connected = sum(self.nodes.widths().values())
        if not self.round_log.left_out and connected >= self.nodes.num_partitions:
            raise FederationError(f"strategy: {reason}")
        raise RoundDropped(reason)

    def _aggregate(
        self, server_round: int, replies: list[Message]
    ) -> tuple[ArrayRecord | None, str]:
        """Return what Flower's class makes of the replies, or why it makes nothing."""
        name = PREFIX + type(self.inner).__name__
        try:
            arrays, _ = self.inner.aggregate_train(server_round, replies)
        except Exception as error:
            # A rule that needs more clients than there are, for example.
            return None, f"{name} cannot aggregate: {type(error).__name__}: {plain(str(error))}"
        return arrays, f"{name} made no model of {len(replies)} updates; it may need more clients"


def _make(name: str, arguments: dict[str, Any]) -> FedAvg:
    if name not in flower_names():
        allowed = ", ".join(PREFIX + n for n in flower_names())
        raise SettingsError(f"strategy: {f'{PREFIX}{name}'!r} is not one of {allowed}")
    kind: type[FedAvg] = getattr(flower_strategies, name)
    settable = _settable(kind)
    if _UNHEEDED in arguments and issubclass(kind, _ADAPTIVE):
        raise SettingsError(
            f"flwr-arguments: {_UNHEEDED} has no effect in Flower's {name}; the step size of the "
            "clients is learning-rate"
        )
    for key, value in arguments.items():
        if key not in settable:
            raise SettingsError(
                f"flwr-arguments: {name} has no {key!r}; it takes {', '.join(settable) or 'none'}"
            )
        wanted = settable[key].annotation
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not isfinite(value) or value < 0 or (wanted is int and value % 1):
            raise SettingsError(
                f"flwr-arguments: {key} = {value!r} is not allowed; {name} takes "
                f"{'a whole number' if wanted is int else 'a number'} from 0"
            )
    needed = [key for key, p in settable.items() if p.default is inspect.Parameter.empty]
    if missing := [key for key in needed if key not in arguments]:
        raise SettingsError(f"flwr-arguments: {name} needs {', '.join(missing)}")
    try:
        inner = kind(**arguments)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"flwr-arguments: {name} refuses {arguments}: {error}") from None
    # It is not to sample: the base does.
    inner.fraction_train = inner.fraction_evaluate = 0.0
    return inner


def _named(kept: object, owner: str, key: str) -> dict[str, np.ndarray]:
    """Return the arrays of one attribute by name or position.

    Raises
    ------
    SettingsError
        If it holds anything else: a run with it could not be resumed.
    """
    if isinstance(kept, ArrayRecord):
        return {name: array.numpy() for name, array in kept.items()}
    pairs = dict(enumerate(kept)) if isinstance(kept, list) else kept
    # NumPy makes a number, not an array, of what it computes from arrays of no dimension.
    if not isinstance(pairs, dict) or not all(
        isinstance(value, np.ndarray | np.generic) for value in pairs.values()
    ):
        raise SettingsError(
            f"strategy: {owner} keeps {key}, a {type(kept).__name__}; allowed: numbers and arrays"
        )
    return {str(name): np.asarray(value) for name, value in pairs.items()}


def _as_tensor(array: np.ndarray) -> Tensor:
    """Wrap an array; torch warns of one that may not be written."""
    return torch.from_numpy(np.require(array, requirements=["W", "C"]))


def _rebuilt(kind: str, tensors: State) -> dict[str, np.ndarray] | list[np.ndarray] | ArrayRecord:
    """Make the attribute again that `_named` took apart."""
    if kind == "ArrayRecord":
        return to_arrays(tensors)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return arrays if kind == "dict" else list(arrays.values())


def _settable(kind: type[FedAvg]) -> dict[str, inspect.Parameter]:
    """Numbers that a class takes, but for those of its sampling."""
    parameters = inspect.signature(kind.__init__).parameters
    return {
        key: parameter
        for key, parameter in parameters.items()
        if parameter.annotation in (int, float) and not key.startswith(("fraction_", "min_"))
    }


def _as_reply(item: ClientUpdate, names: list[str]) -> Message:
    # In the order of the global model: some of Flower's classes pair arrays by position.
    values = item.update.dequantize()
    metrics = MetricRecord(
        {"num-examples": item.report.num_examples, "train_loss": item.report.loss}
    )
    arrays = to_arrays({name: values[name] for name in names})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content, item.client.partition_id, MessageType.TRAIN)
