"""A round whose result is dropped leaves nothing behind, in any strategy."""

import pytest
import torch
from federation import ScriptedClient, federation, run_round, with_w
from specs import difference_of, to_bits

from exchange.states import why_unusable
from strategies import (
    STRATEGIES,
    FedAvg,
    FederationError,
    FlowerStrategy,
    ProWD,
    ProWDOptions,
)
from strategies.flower import FlowerOptions, flower_names
from strategies.grouped import GroupedAvg

GENERATOR = torch.Generator().manual_seed(3)
STATE = {
    "w": torch.randn(3, 4, generator=GENERATOR),
    "b": torch.randn(4, generator=GENERATOR),
}
WIDTHS = (4, 4, 8, 32, 32)
# As large as float32 goes: of two, the sum is not finite.
LARGEST = 3e38


@pytest.fixture(autouse=True)
def any_value(monkeypatch):
    """Payloads may hold what a float32 holds: no real strategy then needs to diverge first."""
    monkeypatch.setattr("quant.codec.decode.LARGEST_VALUE", 3.4e38)
    # Flower collects garbage after every array that it takes out of a record.
    monkeypatch.setattr("gc.collect", lambda *_: 0)


class Client(ScriptedClient):
    """Moves a little, another way each round; in round 2 as far as it can."""

    def __init__(self, partition, difference=False, overflows=True):
        super().__init__(partition, 5, WIDTHS[partition], self.move, 10 + partition)
        self.difference, self.overflows = difference, overflows

    def move(self, received):
        server_round = self.instructions[-1].server_round
        seed = 10 * server_round + self.declaration.partition_id
        generator = torch.Generator().manual_seed(seed)
        moved = {n: t + torch.randn(t.shape, generator=generator) for n, t in received.items()}
        if server_round == 2 and self.overflows:
            moved["b"] = torch.full((4,), LARGEST)
        if not self.difference:
            return to_bits(moved, self.bits)
        steps = {n: t - received[n] for n, t in moved.items()}
        return difference_of(steps, self.bits, generator)


def make(name):
    if name == "prowd":
        return ProWD(ProWDOptions(finetune_every=1, server_momentum=0.5), with_w(norm_bound=0))
    if name in STRATEGIES:
        return STRATEGIES[name](context=with_w(norm_bound=0))
    arguments = {"FedAvgM": "server_momentum = 0.5", "QFedAvg": "client_learning_rate = 0.1"}
    return FlowerStrategy.named(name)(
        FlowerOptions(arguments=arguments.get(name, "")), with_w(norm_bound=0)
    )


def run(strategy, rounds, clients):
    """Return the models after each round; a round that is dropped keeps the model."""
    grid = federation(clients, STATE)
    state, models, dropped = STATE, {}, {}
    for server_round in rounds:
        state = run_round(strategy, grid, state, server_round) or state
        models[server_round] = state
        dropped[server_round] = strategy.round_log.dropped
    return models, dropped


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def of_base():
    """Not local training, which makes no model, and FedCOMGATE, whose clients keep the round."""
    return [name for name in STRATEGIES if name not in ("local", "fedcomgate", "flwr")]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", [*of_base(), *flower_names()])
def test_the_run_continues_as_if_the_round_had_never_been(name):
    difference = name in ("fedpaq", "fedcom")
    disturbed, quiet = make(name), make(name)
    models, dropped = run(disturbed, (1, 2, 3, 4), [Client(i, difference) for i in range(5)])
    assert "not finite" in dropped[2] or "holds more than 1e+08" in dropped[2]
    assert [dropped[r] for r in (1, 3, 4)] == ["", "", ""]
    expected, _ = run(quiet, (1, 3, 4), [Client(i, difference) for i in range(5)])
    assert models[2] is models[1]
    for server_round in (3, 4):
        assert_same(models[server_round], expected[server_round])
    assert not torch.equal(models[4]["w"], models[3]["w"])
    assert_same(disturbed.checkpoint()[0], quiet.checkpoint()[0])
    assert disturbed.checkpoint()[1] == quiet.checkpoint()[1]


@pytest.mark.parametrize("name", flower_names())
def test_a_strategy_of_flowers_goes_back_to_before_its_first_round(name):
    """What was not there yet is not there any more."""
    strategy, fresh = make(name), make(name)
    before = strategy.checkpoint()
    run(strategy, (1,), [Client(i) for i in range(5)])
    strategy.restore(*before)
    expected, _ = run(fresh, (3,), [Client(i) for i in range(5)])
    models, _ = run(strategy, (3,), [Client(i) for i in range(5)])
    assert_same(models[3], expected[3])


def test_the_model_of_another_width_counts_too():
    """The 8-bit clients' bias overflows; what the run passes on is the 32-bit clients' model."""
    clients = [Client(i, overflows=WIDTHS[i] == 4) for i in range(5)]
    strategy = make("grouped-avg")
    models, dropped = run(strategy, (1, 2), clients)
    assert dropped[2] == "what the strategy keeps is not finite (4/b)"
    assert models[2] is models[1]
    assert torch.isfinite(strategy.state_for(4, STATE)["b"]).all()


def test_a_strategy_that_knew_less_before_knows_less_again():
    """ProWD's own normalization of a width that came in the dropped round."""
    strategy, empty = make("prowd"), make("prowd")
    run(strategy, (1,), [Client(i) for i in range(5)])
    assert strategy.checkpoint()[0]
    strategy.restore(*empty.checkpoint())
    assert strategy.checkpoint() == empty.checkpoint()
    assert strategy.state_for(4, STATE) == STATE


class InPlace(FedAvg):
    """Keeps a sum that it changes in place, and raises when it is told to."""

    raises = None

    def __init__(self, options=None, context=None):
        super().__init__(options, context)
        self.total, self.rounds = torch.zeros(4), {"done": []}

    def combine(self, server_round, start, updates):
        state = super().combine(server_round, start, updates)
        self.total.add_(state["b"])
        self.rounds["done"].append(server_round)
        if self.raises:
            raise self.raises
        return state

    def checkpoint(self):
        return {"total": self.total}, self.rounds

    def restore(self, tensors, values):
        self.total, self.rounds = tensors["total"], dict(values)


@pytest.mark.parametrize("raises", [None, ValueError("no"), KeyboardInterrupt()])
def test_what_is_changed_in_place_is_put_back(raises, monkeypatch):
    strategy = InPlace(context=with_w(norm_bound=0))
    run(strategy, (1,), [Client(i) for i in range(5)])
    total = strategy.total.clone()
    monkeypatch.setattr(InPlace, "raises", raises)
    if raises is None:
        run(strategy, (2,), [Client(i) for i in range(5)])
    else:
        with pytest.raises(type(raises)):
            run(strategy, (3,), [Client(i) for i in range(5)])
    assert torch.equal(strategy.total, total)
    assert strategy.rounds == {"done": [1]}


def test_what_was_not_finite_before_is_not_the_rounds_fault():
    class Best(InPlace):
        def __init__(self, options=None, context=None):
            super().__init__(options, context)
            self.total = torch.full((4,), -torch.inf)

    strategy = Best(context=with_w())
    run(strategy, (1,), [Client(i) for i in range(5)])
    assert (strategy.round_log.dropped, strategy.rounds) == ("", {"done": [1]})


def test_a_class_over_one_that_replaces_what_it_keeps_says_so_itself():
    class Over(GroupedAvg):
        def checkpoint(self):
            return super().checkpoint()

    class Again(GroupedAvg):
        replaces_kept = True

        def combine(self, server_round, start, updates):
            return super().combine(server_round, start, updates)

    class Renamed(GroupedAvg):
        pass

    kinds = (GroupedAvg, Over, Again, Renamed)
    assert [kind.replaces_kept for kind in kinds] == [True, False, True, True]


def test_what_grouped_keeps_is_replaced_and_never_changed():
    strategy = GroupedAvg(context=with_w())
    run(strategy, (1,), [Client(i) for i in range(5)])
    kept = strategy.checkpoint()[0]
    copies = {name: tensor.clone() for name, tensor in kept.items()}
    run(strategy, (3,), [Client(i) for i in range(5)])
    assert_same(kept, copies)


def test_fedcomgate_begins_anew_after_a_dropped_round():
    """The clients have kept the round, and would take a difference to it from the next model."""
    strategy = make("fedcomgate")
    clients = [Client(i, difference=True) for i in range(5)]
    _, dropped = run(strategy, (1, 2, 3, 4), clients)
    assert "not finite" in dropped[2]
    epochs = [instruction.tracking_epoch for instruction in clients[0].instructions]
    assert epochs[0] == epochs[1] != epochs[2] == epochs[3]


def break_rule(strategy, monkeypatch):
    monkeypatch.setattr(strategy.inner, "weighted_by_key", "absent")


def test_a_rule_that_raises_ends_the_run_in_any_round_in_which_all_took_part(monkeypatch):
    strategy = make("FedAvg")
    clients = [Client(i) for i in range(5)]
    run(strategy, (1,), clients)
    break_rule(strategy, monkeypatch)
    with pytest.raises(FederationError, match=r"^strategy: flwr:FedAvg cannot aggregate: .*absent"):
        run(strategy, (3,), clients)


@pytest.mark.parametrize("missing", ["rejected", "disconnected"])
def test_a_rule_that_raises_where_clients_are_missing_costs_the_round(monkeypatch, missing):
    strategy = make("FedAvg")
    clients = [Client(i) for i in range(5)]
    grid = federation(clients, STATE)
    run_round(strategy, grid, STATE, 1)
    break_rule(strategy, monkeypatch)
    if missing == "rejected":
        clients[0].reported = {"accuracy": 2.0}
    else:
        del grid.nodes[100]
    assert run_round(strategy, grid, STATE, 3) is None
    assert "flwr:FedAvg cannot aggregate" in strategy.round_log.dropped
    assert "\n" not in strategy.round_log.dropped


def test_a_model_is_held_to_what_float32_can_send():
    """A user's `combine` may compute in another type."""
    many = {"w": torch.full((100_000,), 2.0, dtype=torch.float16)}  # Whose sum float16 cannot hold.
    assert why_unusable(many, many, {}) == ""
    beyond = {"w": torch.tensor([1e300], dtype=torch.float64)}
    assert why_unusable(beyond, {}, {}) == "its model is not finite (w)"
    assert why_unusable(None, beyond, {}) == ""
