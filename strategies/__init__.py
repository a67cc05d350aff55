"""Strategies for mixed-precision federations, by name. A new one is one file and one line here."""

from strategies.base import MixedPrecisionStrategy
from strategies.fedavg import FedAvg
from strategies.local import Local
from strategies.nodes import FederationError
from strategies.prowd import ProWD, ProWDOptions
from strategies.replies import ClientUpdate, RoundLog, receive

STRATEGIES: dict[str, type[MixedPrecisionStrategy]] = {
    "prowd": ProWD,
    "fedavg": FedAvg,
    "local": Local,
}

__all__ = [
    "STRATEGIES",
    "ClientUpdate",
    "FedAvg",
    "FederationError",
    "Local",
    "MixedPrecisionStrategy",
    "ProWD",
    "ProWDOptions",
    "RoundLog",
    "receive",
]
