"""Strategies of a user's own that something is wrong with: `strategy="faulty_strategies:Raises"`.

A message about one must name it: each but the last ones fails in its own way.
"""

import sys
from dataclasses import replace

import torch
from faulty_models import Mute

from core.errors import SettingsError
from core.options import Options
from exchange.protocol import Instruction
from strategies import (
    FedAvg,
    FederationError,
    MixedPrecisionStrategy,
    RoundDropped,
    StrategyContext,
)


class Abstract(MixedPrecisionStrategy):
    pass


class OtherArguments(FedAvg):
    def __init__(self, seed):
        super().__init__(context=StrategyContext(seed=seed))


class NoSuper(FedAvg):
    def __init__(self, options, context):
        pass


class InitValue(FedAvg):
    def __init__(self, options, context):
        raise ValueError("one\ntwo")


class InitKey(FedAvg):
    def __init__(self, options, context):
        raise KeyError("one\ntwo")


class InitExits(FedAvg):
    def __init__(self, options, context):
        sys.exit("bye")


class Eta(Options):
    eta: float = 1.0


class Unwritten(Options):
    kept: object = object()


class NotFinite(Options):
    most: float = float("inf")


class UnwrittenOption(FedAvg):
    Options = Unwritten


class InfiniteOption(FedAvg):
    Options = NotFinite


class InitDivides(FedAvg):
    Options = Eta

    def __init__(self, options, context):
        super().__init__(options, context)
        self.step = 1 / options.eta


class InstructRaises(FedAvg):
    def instruct(self, server_round, client):
        raise IndexError("one\ntwo")


class InstructNothing(FedAvg):
    def instruct(self, server_round, client):
        pass


class InstructWidth(FedAvg):
    def instruct(self, server_round, client):
        return Instruction(server_round, uplink="difference", uplink_bits=33)


class InstructText(FedAvg):
    def instruct(self, server_round, client):
        return Instruction(server_round, proximal_mu="1")


class _Combining(FedAvg):
    """Makes of the good model what `wrong` says."""

    def wrong(self, model):
        return model

    def combine(self, server_round, start, updates):
        return self.wrong(super().combine(server_round, start, updates))


class CombineRaises(_Combining):
    def wrong(self, model):
        raise ZeroDivisionError("one\ntwo")


class CombineExits(_Combining):
    def wrong(self, model):
        sys.exit()


class CombineIsMute(_Combining):
    def wrong(self, model):
        raise Mute


class CombineText(_Combining):
    def wrong(self, model):
        return "model"


class CombineArrays(_Combining):
    def wrong(self, model):
        return {name: tensor.numpy() for name, tensor in model.items()}


class CombineFewer(_Combining):
    def wrong(self, model):
        return {name: tensor for name, tensor in model.items() if name != "head.bias"}


class CombineMore(_Combining):
    def wrong(self, model):
        return {**model, "momentum": torch.zeros(1)}


class CombineShape(_Combining):
    def wrong(self, model):
        return {**model, "head.bias": model["head.bias"][:1]}


class CombineIntegers(_Combining):
    def wrong(self, model):
        return {**model, "head.bias": model["head.bias"].long()}


class CombineSparse(_Combining):
    def wrong(self, model):
        return {**model, "head.bias": model["head.bias"].to_sparse()}


class CombineNan(_Combining):
    def wrong(self, model):
        return {name: tensor * float("nan") for name, tensor in model.items()}


class CombineOverflows(_Combining):
    """Finite as it is returned, and not as it is sent."""

    def wrong(self, model):
        return {name: torch.full_like(t, 1e300, dtype=torch.float64) for name, t in model.items()}


class CombineTooLarge(_Combining):
    def wrong(self, model):
        return {name: torch.full_like(tensor, -1e30) for name, tensor in model.items()}


class CombineReadsNothing(FedAvg):
    def combine(self, server_round, start, updates):
        return start


class CombineDrops(FedAvg):
    def combine(self, server_round, start, updates):
        raise RoundDropped("not\nthis one")


class OwnSettingsError(_Combining):
    def wrong(self, model):
        class Other(SettingsError):
            def __init__(self, setting, reason):
                super().__init__(f"{setting}: {reason}")

        raise Other("strategy-options", "not\nthis one")


class OwnFederationError(_Combining):
    def wrong(self, model):
        raise FederationError("the quorum\nis lost")


class CheckpointRaises(FedAvg):
    def checkpoint(self):
        raise OSError("one\ntwo")


class CheckpointAlone(FedAvg):
    def checkpoint(self):
        return {}


class CheckpointObject(FedAvg):
    def checkpoint(self):
        return {}, {"kept": object()}


class CheckpointText(FedAvg):
    def checkpoint(self):
        return {"kept": "text"}, {}


class StateForNothing(FedAvg):
    def state_for(self, bits, state):
        return {}


class ModelForOther(FedAvg):
    def __init__(self, options, context):
        super().__init__(options, replace(context, broadcast="nearest"))

    def model_for(self, bits, state):
        return super().model_for(32, state)


class ModelForNothing(FedAvg):
    def model_for(self, bits, state):
        pass


class EvaluateRaises(FedAvg):
    def aggregate_evaluate(self, server_round, replies):
        raise RuntimeError("one\ntwo")


def _reporting(own: object) -> type[FedAvg]:
    """Make a strategy that reports this of every round."""

    class Reporting(FedAvg):
        def combine(self, server_round, start, updates):
            model = super().combine(server_round, start, updates)
            self.round_log.own = own
            return model

    return Reporting


_endless: dict[str, object] = {}
_endless["again"] = _endless

OwnObject = _reporting({"loss": {"mine": object()}})
OwnKey = _reporting({1: 2.0})
OwnBytes = _reporting({"loss": b"1"})
OwnNoUtf8 = _reporting({"name": "b\udcff"})
OwnEndless = _reporting(_endless)


# These do nothing that ends a run ----------------------------------------------------------------

OwnNotFinite = _reporting(
    {
        "nan": float("nan"),
        "list": [1.0, float("inf"), [float("-inf")]],
        "tensor": torch.tensor([0.5, float("nan")]),
    }
)


class CombineOtherFloats(_Combining):
    """Float64, part of a graph, in another order."""

    def wrong(self, model):
        return {n: t.double().requires_grad_() for n, t in reversed(list(model.items()))}
