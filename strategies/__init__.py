"""Strategies for mixed-precision federations, by name. A new one is one file and one line here."""

from core.errors import FederationError
from exchange.inbox import receive
from exchange.replies import ClientUpdate
from exchange.round_plan import RoundLog
from exchange.states import RoundDropped
from quant import WeightedMean
from strategies.asymmetric import GroupedAvgAsymmetric
from strategies.base import MixedPrecisionStrategy
from strategies.context import StrategyContext
from strategies.differences import FedCOM, FedCOMGATE, FedPAQ
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx
from strategies.flower import FlowerStrategy
from strategies.grouped import GroupedAvg
from strategies.local import Local
from strategies.prowd import ProWD, ProWDOptions, ProWDPaper, ProWDPaperOptions

STRATEGIES: dict[str, type[MixedPrecisionStrategy]] = {
    "prowd": ProWD,
    "prowd-paper": ProWDPaper,
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedpaq": FedPAQ,
    "fedcom": FedCOM,
    "fedcomgate": FedCOMGATE,
    "grouped-avg": GroupedAvg,
    "grouped-avg-asymmetric": GroupedAvgAsymmetric,
    "local": Local,
    "flwr": FlowerStrategy,
}
# How a class of the user's own is written.
OWN_CLASS = "package.module:Class"


def strategy_names() -> list[str]:
    """Return how each of `STRATEGIES` is written in the setting ``strategy``."""
    return [f"{name}:{k.suffix}" if k.suffix else name for name, k in STRATEGIES.items()]


__all__ = [
    "STRATEGIES",
    "ClientUpdate",
    "FedAvg",
    "FedCOM",
    "FedCOMGATE",
    "FedPAQ",
    "FedProx",
    "FederationError",
    "FlowerStrategy",
    "GroupedAvg",
    "GroupedAvgAsymmetric",
    "Local",
    "MixedPrecisionStrategy",
    "ProWD",
    "ProWDOptions",
    "ProWDPaper",
    "ProWDPaperOptions",
    "RoundDropped",
    "RoundLog",
    "StrategyContext",
    "WeightedMean",
    "receive",
]
