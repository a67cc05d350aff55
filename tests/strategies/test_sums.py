"""Differential privacy on the server: one device decides of no more than its own movement."""

import pytest
import torch
from federation import ScriptedClient, federation, payload_record, report, run_round
from flwr.app import Message, RecordDict

from core.errors import SettingsError
from exchange.nodes import sample_nodes
from exchange.protocol import REPORT, UPDATE, Declaration
from strategies import FedAvg, StrategyContext
from strategies.asymmetric import GroupedAvgAsymmetric
from strategies.differences import DifferenceOptions, FedCOMGATE

STATE = {"w": torch.zeros(2, 3), "b": torch.zeros(4)}
PRIVATE = {"dp_clip": 1.0, "dp_noise_multiplier": 1e-6, "weighting": "uniform", "quantized": ["w"]}


def moving(place, value, of=4, bits=32):
    """A device that moves every number so far."""
    return ScriptedClient(place, of, bits, lambda s: {n: t + value for n, t in s.items()})


def model_of(values):
    strategy = FedAvg(context=StrategyContext(**PRIVATE))
    new = run_round(
        strategy, federation([moving(i, v) for i, v in enumerate(values)], STATE), STATE
    )
    assert len(strategy.round_log.aggregated) == len(values)
    return torch.cat([new["w"].flatten(), new["b"]])


def test_no_device_decides_whether_the_updates_of_others_count():
    """As by the median of norm-bound: of 0, 0, 100 and 100 it is 0, beside which 100 is large."""
    one, other = model_of([0, 0, 100, 100]), model_of([0, 100, 100, 100])
    # Each device is one clip of four.
    assert float((one - other).norm()) == pytest.approx(1 / 4, abs=1e-4)


class Broken(ScriptedClient):
    def __call__(self, message):
        if message.metadata.message_type == "query":
            return super().__call__(message)
        content = RecordDict({UPDATE: payload_record(b"nonsense"), REPORT: report(10)})
        return Message(content, reply_to=message)


def test_an_update_that_is_rejected_leaves_the_share_of_the_others_as_it_was():
    clients = [*(moving(i, 0.1) for i in range(3)), Broken(3, 4, 32, None)]
    strategy = FedAvg(context=StrategyContext(**PRIVATE))
    new = run_round(strategy, federation(clients, STATE), STATE)
    assert set(strategy.round_log.rejected) == {3}
    assert new["b"].tolist() == pytest.approx([0.1 * 3 / 4] * 4, abs=1e-4)


class Noting(FedAvg):
    """Keeps what it was given."""

    needs_means_only = True

    def combine(self, server_round, start, updates):
        self.given = list(updates)
        return super().combine(server_round, start, iter(self.given))


@pytest.mark.parametrize("drawn", [[], [0], [0, 1, 2, 3]])
def test_whoever_is_drawn_each_width_has_its_noise_and_counts_alike(drawn, monkeypatch):
    numbers = iter([0.0 if place in drawn else 1.0 for place in range(4)])
    monkeypatch.setattr("exchange.nodes.SystemRandom.random", lambda _: next(numbers))
    clients = [moving(i, 0.0, bits=bits) for i, bits in enumerate((4, 4, 32, 32))]
    state = {"w": torch.zeros(40, 50)}
    context = {**PRIVATE, "dp_noise_multiplier": 3.0, "fraction_train": 0.5}
    strategy = Noting(context=StrategyContext(**context))
    run_round(strategy, federation(clients, state), state)
    assert [(item.client.bits, item.count) for item in strategy.given] == [(4, 2), (32, 2)]
    for item in strategy.given:
        # Of two devices, one takes part on average.
        assert float(item.update.floats["w"].std()) == pytest.approx(3.0, rel=0.1)
        assert item.report.num_examples == 2
    assert strategy.round_log.sampled == drawn
    assert strategy.round_log.noise_multiplier == 3.0


def test_who_is_drawn_each_alone_does_not_follow_from_the_seed():
    present = {i: Declaration(i, 64, 32, 10, "") for i in range(64)}
    draws = {tuple(sample_nodes(present, 0.5, 0, 1, each_alone=True)) for _ in range(3)}
    # Alike once in 2**63 times.
    assert len(draws) == 3
    assert sample_nodes(present, 1e-12, 0, 1, each_alone=True) == {}
    assert len(sample_nodes(present, 1.0, 0, 1, each_alone=True)) == 64


def test_a_rule_of_its_own_is_not_one_of_means_because_its_parents_is():
    class Median(FedAvg):
        def combine(self, server_round, start, updates):
            return start

    class OfMeans(Median):
        needs_means_only = True

    context = StrategyContext(secure_aggregation=True, quantized=["w"])
    with pytest.raises(SettingsError, match="with Median, which needs each client's own update"):
        Median(context=context)
    for kind in (OfMeans, GroupedAvgAsymmetric):
        kind(context=context)


def test_what_is_refused_in_any_case_names_no_setting_that_would_not_help():
    context = StrategyContext(secure_aggregation=True, low_bit_training="qat")
    reason = FedCOMGATE.why_not_secure(DifferenceOptions(), context)
    assert reason == "FedCOMGATE, which needs each client's own update; allowed: false"
