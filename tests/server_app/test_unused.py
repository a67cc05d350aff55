"""A run in which nothing is used any more has failed; one bad client in a sample fails none."""

import json
import sys

import pytest
import torch
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, Error, Message, RecordDict

from server_app.app import main
from server_app.unused import UnusedRounds
from strategies import FedAvg, FederationError, GroupedAvg

SMALL = {
    "model": "toy:net",
    "samples-per-client": 16,
    "server-buffer": 16,
    "validation-samples": 16,
    "bit-mix": "32:1.0",
    "strategy": "fedavg",
    "calibrate-normalization": False,
}


def entry(number, aggregated=0, left_out=(), dropped="", asked=()):
    found = {
        "round": number,
        "clients": {"aggregated": aggregated},
        "left_out": {str(partition): f"reason {partition}" for partition in left_out},
    }
    return found | ({"dropped": dropped, "asked": list(asked)} if dropped else {})


def fatal(entries, nodes, is_last=False):
    unused = UnusedRounds()
    for each in entries:
        unused.add(json.loads(json.dumps(each)))
    return unused.fatal(set(nodes), is_last)


LINE = "no result could be used in rounds 2 to 4, though every node was asked: reason 0"
VAIN = [entry(n, left_out=(0, 1)) for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("entries", "nodes", "is_last", "reason"),
    [
        ([], (0, 1), True, ""),
        ([entry(1, aggregated=2)], (0, 1), True, ""),
        (VAIN, (0, 1), False, LINE),
        (VAIN[:2], (0, 1), False, ""),
        (VAIN[:2], (0, 1), True, LINE.replace("4", "3")),
        (VAIN[:1], (0, 1), True, LINE.replace("rounds 2 to 4", "round 2")),
        # Another node is there, that was not asked: it may yet bring something, until the end.
        (VAIN, (0, 1, 2), False, ""),
        (VAIN, (0, 1, 2), True, LINE.replace("every node was", "2 nodes were")),
        # The last rounds, but not most of the run; and too few of them.
        ([entry(n, left_out=(n,)) for n in (5, 6, 7, 8)], range(100), True, ""),
        ([entry(n, left_out=(n,)) for n in (4, 5, 6, 7)], range(100), True, "4 nodes were asked"),
        ([entry(2, left_out=(2,))], range(100), True, ""),
        # One bad client that three rounds in a row happened to sample.
        ([entry(n, left_out=(7,)) for n in (5, 6, 7)], (6, 7, 8), True, ""),
        # Together the samples were everybody.
        ([entry(n, left_out=(n,)) for n in (5, 6, 7)], (5, 6, 7), False, "reason 7"),
        # A used round makes a new beginning.
        ([*VAIN, entry(5, 1, left_out=(0,)), entry(6, left_out=(0, 1))], (0, 1), False, ""),
        # What clients sent was good, and no model could be made of it.
        (
            [entry(n, 2, dropped="inf", asked=(0, 1)) for n in (2, 3, 4)],
            (0, 1),
            False,
            "asked: inf",
        ),
        ([entry(n, 1, (1,), "inf", (0, 1)) for n in (2, 3, 4)], (0, 1), False, "asked: inf"),
        ([*VAIN[:2], entry(4, 2, dropped="inf", asked=(0, 1))], (0, 1), False, "asked: inf"),
    ],
)
def test_when_a_run_has_failed(entries, nodes, is_last, reason):
    found = fatal(entries, nodes, is_last)
    assert reason in found if reason else not found


GATHERS = "Own.combine returned no model"


@pytest.mark.parametrize(
    ("unchanged", "is_last", "reason"),
    [
        ([GATHERS] * 5, False, ""),
        ([GATHERS] * 5, True, f"no round changed the model: {GATHERS}"),
        ([GATHERS, GATHERS, "", GATHERS], True, ""),
    ],
)
def test_a_strategy_that_never_makes_a_model_has_failed_at_the_end(unchanged, is_last, reason):
    rounds = [entry(n, 2) | {"unchanged": why} for n, why in enumerate(unchanged, 1)]
    assert fatal(rounds, (0, 1), is_last) == reason


class Failing(ClientAppNode):
    """Fails in training from a round on."""

    rounds: tuple = ()

    def __call__(self, message):
        asked = message.content.get("instruction", {})
        if message.metadata.message_type == "train" and asked["server_round"] in self.rounds:
            return Message(Error(code=2, reason="no power"), reply_to=message)
        return super().__call__(message)


class Diverging(FedAvg):
    """Makes no model of its own fault from the second round on."""

    def combine(self, server_round, start, updates):
        state = super().combine(server_round, start, updates)
        return {n: t * (torch.inf if server_round > 1 else 1.0) for n, t in state.items()}


class Makes(FedAvg):
    """Makes no model but in one round, if any."""

    in_round = 0

    def combine(self, server_round, start, updates):
        state = super().combine(server_round, start, updates)
        return state if server_round == self.in_round else None


class MakesTheSecond(Makes):
    in_round = 2


class GroupsDiverge(GroupedAvg):
    """Spoils what it keeps, and not the model that it passes on."""

    def combine(self, server_round, start, updates):
        state = super().combine(server_round, start, updates)
        if server_round > 1:
            self._models[2] = {"w": torch.tensor([torch.nan])}
        return state


def run(tmp_path, rounds, failing=((), ()), **changes):
    config = {
        **SMALL,
        "num-server-rounds": rounds,
        "output-dir": str(tmp_path),
        "run-name": "run",
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    nodes = {}
    for partition, of_node in enumerate(failing):
        nodes[50 + partition] = Failing(partition, len(failing), config)
        nodes[50 + partition].rounds = of_node
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    return tmp_path / "run"


def summary(folder):
    return json.loads((folder / "run" / "summary.json").read_text())


def entries(folder):
    return [json.loads(line) for line in (folder / "run" / "rounds.jsonl").open()]


def test_a_run_whose_clients_all_fail_ends_with_one_line_and_the_model_that_it_had(tmp_path):
    from_two = tuple(range(2, 9))
    reason = "no result could be used in rounds 2 to 4, though every node was asked: no power"
    with pytest.raises(FederationError) as error:
        run(tmp_path, 8, (from_two, from_two))
    assert str(error.value) == reason
    assert (summary(tmp_path)["status"], summary(tmp_path)["reason"]) == ("failed", reason)
    assert len(entries(tmp_path)) == 4
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    run(tmp_path / "one", 1)
    assert (tmp_path / "one" / "run" / "model.safetensors").read_bytes() == model


def test_a_client_that_fails_alone_ends_no_run(tmp_path):
    run(tmp_path, 4, ((1, 2, 3, 4), ()))
    assert summary(tmp_path)["status"] == "completed"


def test_the_last_round_needs_a_result_where_everybody_was_asked(tmp_path):
    with pytest.raises(FederationError, match="no result could be used in round 2, though"):
        run(tmp_path, 2, ((2,), (2,)))
    assert summary(tmp_path)["status"] == "failed"
    # Resuming with the rounds that it has changes nothing; with one more it gets another try.
    with pytest.raises(FederationError, match="no result could be used in round 2, though"):
        run(tmp_path, 2, resume=str(tmp_path / "run"))
    assert summary(tmp_path)["status"] == "failed"
    run(tmp_path, 3, resume=str(tmp_path / "run"))
    assert summary(tmp_path)["status"] == "completed"


def test_rounds_before_a_resume_count(tmp_path, monkeypatch):
    """Two in vain, then a crash, then one more."""
    from_two, calls = (2, 3, 4, 5), []
    real = UnusedRounds.fatal

    def crash(unused, partitions, is_last):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(unused, partitions, is_last)

    monkeypatch.setattr(UnusedRounds, "fatal", crash)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 9, (from_two, from_two))
    monkeypatch.undo()
    with pytest.raises(FederationError, match="rounds 2 to 4, though every node was asked"):
        run(tmp_path, 9, (from_two, from_two), resume=str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Diverging", "its model is not finite ("),
        ("GroupsDiverge", "what the strategy keeps is not finite (2/w)"),
    ],
)
def test_a_dropped_result_is_recorded_and_ends_the_run(tmp_path, monkeypatch, kind, reason, caplog):
    monkeypatch.setitem(sys.modules, "own_strategies", sys.modules[__name__])
    with pytest.raises(FederationError) as error:
        run(tmp_path, 5, strategy=f"own_strategies:{kind}")
    line = "no result could be used in rounds 2 to 4, though every node was asked: "
    assert str(error.value).startswith(line)
    first, *others = entries(tmp_path)
    assert not {"dropped", "asked"} & first.keys()
    assert len(others) == 3
    for each in others:
        assert each["dropped"].startswith(reason)
        assert each["dropped"] == str(error.value).removeprefix(line)
        assert each["asked"] == [0, 1]
        assert f"clients 2 of 2 | dropped: {each['dropped']} | " in caplog.text


def test_nodes_that_fail_one_after_another_end_no_run_as_completed(tmp_path):
    """One node of many is asked in a round, and from the second round on each fails."""
    from_two = tuple(range(2, 7))
    with pytest.raises(FederationError) as error:
        run(tmp_path, 6, [from_two] * 30, fraction_train=0.01, samples_per_client=4)
    asked = {name for each in entries(tmp_path)[1:] for name in each["left_out"]}
    assert 1 < len(asked) < 6
    line = f"no result could be used in rounds 2 to 6, though {len(asked)} nodes were asked: no"
    assert str(error.value).startswith(line)
    assert summary(tmp_path)["status"] == "failed"


def test_a_strategy_that_makes_no_model_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "own_strategies", sys.modules[__name__])
    with pytest.raises(FederationError) as error:
        run(tmp_path, 2, strategy="own_strategies:Makes")
    assert str(error.value) == "no round changed the model: Makes.combine returned no model"
    assert summary(tmp_path)["status"] == "failed"
    assert "clients 2 of 2 | unchanged: Makes.combine returned no model | " in caplog.text
    # One that gathers updates for some rounds is another matter.
    run(tmp_path / "other", 3, strategy="own_strategies:MakesTheSecond")
    assert summary(tmp_path / "other")["status"] == "completed"
    unchanged = [each.get("unchanged") for each in entries(tmp_path / "other")]
    said = "MakesTheSecond.combine returned no model"
    assert unchanged == [said, None, said]
