"""What holds of every run, each with the expected numbers computed here."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite

import numpy as np
import torch
from flwr.app import RecordDict
from matrix.cells import LEARNING_RATE, SERVER_STEP
from matrix.payloads import float64, returned_by, sent_to
from matrix.rules import GROUPED, next_models
from matrix.running import Exchange, Trace
from safetensors.torch import load_file

# Largest relative distance of a number from the next one.
EPS = float(np.finfo(np.float32).eps)
# By how many steps of plain SGD three steps under momentum 0.9 move: 1 + 1.9 + 2.71.
THREE_STEPS = 5.61


def completes_with_everybody(trace: Trace) -> None:
    """Every client is used in every round, and the run says that it is completed."""
    clients = len(trace.cell.widths)
    everybody = {"sampled": clients, "aggregated": clients, "rejected": 0, "failed": 0}
    assert trace.summary["status"] == "completed"
    assert trace.summary["rounds"] == len(trace.entries) == len(trace.rounds)
    for entry in trace.entries:
        assert entry["clients"] == everybody
        assert entry["left_out"] == entry["left_out_of_evaluation"] == {}


def is_finite(trace: Trace) -> None:
    """No number of model, checkpoint or record is missing, NaN or infinite."""
    # JSON has neither; the record writes null.
    for entry in trace.entries:
        for path, value in _leaves(entry):
            assert isinstance(value, str) or (value is not None and isfinite(value)), path
    kept = trace.checkpoint
    tensors = {**kept.model, **kept.tensors}
    if trace.cell.evaluates_on_server:
        tensors |= load_file(trace.folder / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), name


def records_its_bytes(trace: Trace) -> None:
    """The record counts the payloads that passed, by the width of their clients."""
    up, down = Counter(), Counter()
    for server_round, entry in enumerate(trace.entries, start=1):
        mine = [e for e in trace.exchanges if e.instruction.server_round == server_round]
        expected = {"uplink_bytes": Counter(), "downlink_bytes": Counter()}
        for exchange in mine:
            width = str(trace.cell.widths[exchange.partition])
            expected["uplink_bytes"][width] += len(exchange.returned or b"")
            expected["downlink_bytes"][width] += len(exchange.sent or b"")
        for key, counted in expected.items():
            assert +Counter(entry[key]) == +counted, f"{key} of round {server_round}"
        up += expected["uplink_bytes"]
        down += expected["downlink_bytes"]
    assert trace.summary["uplink_bytes"] == up.total()
    assert trace.summary["downlink_bytes"] == down.total()


def sends_the_widths_asked_for(trace: Trace) -> None:
    """Models go out at the broadcast's width, the same to all of a width; updates come at theirs.

    `decode` accepts a payload of one width, spec, content and round only.
    """
    for server_round in trace.rounds:
        by_width: dict[int, set[bytes]] = defaultdict(set)
        for exchange in trace.trained(server_round):
            keeps_its_own = trace.cell.strategy == "local" and server_round > 1
            assert (sent_to(trace, exchange) is None) == keeps_its_own
            sends_nothing = trace.cell.strategy == "local"
            assert (returned_by(trace, exchange) is None) == sends_nothing
            by_width[trace.cell.widths[exchange.partition]].add(exchange.sent or b"")
        assert set(by_width) == set(trace.cell.widths)
        assert all(len(payloads) == 1 for payloads in by_width.values())


def dithers_each_client_by_itself(trace: Trace) -> None:
    """Every low-bit client gets a dither of its own in every round, where one is asked for."""
    dithers = [
        e.instruction.dither
        for server_round in trace.rounds
        for e in trace.trained(server_round)
        if trace.cell.widths[e.partition] != 32
    ]
    by_itself = (trace.cell.strategy, trace.cell.upload) == ("prowd", "auto")
    dithered = trace.cell.upload == "dithered" or (by_itself and trace.cell.in_integers)
    if dithered and trace.cell.training != "strict":
        assert len(set(dithers)) == len(dithers)
        assert min(dithers) > 0
    else:
        assert not any(dithers)


def rounds_the_model_that_it_has(trace: Trace) -> None:
    """What is sent in float32 is the round's model; what is rounded to nearest lies nearest to it.

    Under strategies that have one model for all widths. Calibrated rounding trades the errors of
    some weights for those of others: it stays on its grid, and not all codes are the nearest.
    """
    if trace.cell.strategy in ("prowd", "prowd-paper", *GROUPED):
        return
    farthest = 0.0
    for exchange in trace.exchanges:
        update = sent_to(trace, exchange)
        if update is None:
            continue
        later = exchange.kind == "evaluate"
        model = float64(trace.starts[exchange.instruction.server_round + later])
        for name, tensor in update.floats.items():
            assert np.array_equal(tensor.numpy(), model[name]), name
        for name, tensor in update.quantized.items():
            largest = 2 ** (update.bits - 1) - 1
            if trace.cell.in_integers:  # From -0.5 to 0.5, on one grid of -1 to 1.
                largest = 2 ** (update.bits - 2)
                assert (tensor.scale == 2.0 ** (1 - update.bits)).all(), name
            codes = tensor.codes.numpy().astype(np.int64)
            assert np.abs(codes).max() <= largest, name
            scale = tensor.scale.to(torch.float64).numpy()
            steps = model[name] / scale.reshape(-1, *[1] * (codes.ndim - 1))
            distances = np.abs(np.clip(steps, -largest, largest) - codes)
            farthest = max(farthest, distances.max())
    # A tie may fall to either side.
    by_nearest = farthest <= 0.5 + 1e-4
    assert by_nearest == (trace.cell.broadcast != "calibrated" or min(trace.cell.widths) == 32)


def aggregates_by_its_rule(trace: Trace) -> None:
    """Each round's model is what the rule makes of the updates that came."""
    if trace.cell.strategy not in ("prowd", "prowd-paper"):
        _assert_models(trace, trace.cell.strategy)


def is_flowers_fedavg(trace: Trace) -> None:
    """With Float32 clients only, FedAvg and what is built on it are Flower's own FedAvg."""
    _assert_models(trace, "flwr:FedAvg")
    _assert_models(trace, "fedavg")


def corrections_sum_to_zero(trace: Trace, rounds: Sequence[int] | None = None) -> None:
    """FedCOMGATE: weighted by examples, and are not zero; by default from the second round on."""
    if trace.cell.strategy != "fedcomgate":
        return
    for server_round in rounds or trace.rounds[1:]:
        exchanges = trace.trained(server_round)
        assert all(exchange.correction for exchange in exchanges)
        for name in exchanges[0].correction:
            parts = [_share(trace, e) * e.correction[name].astype(np.float64) for e in exchanges]
            assert max(np.abs(part).max() for part in parts) > 1e-3, name
            lost = _lost_in_corrections(trace, server_round, name)
            assert np.abs(sum(parts)).max() <= lost, f"{name} in round {server_round}"


def corrections_are_the_deviations(trace: Trace) -> None:
    """FedCOMGATE: each grows by how the client's update deviated from the mean, a step of SGD."""
    if trace.cell.strategy != "fedcomgate":
        return
    for before in trace.rounds[:-1]:
        rate = LEARNING_RATE * 0.97 ** (before - 1) * THREE_STEPS
        asked, corrected = trace.trained(before), trace.trained(before + 1)
        updates = [float64(returned_by(trace, e).dequantize()) for e in asked]
        for name in corrected[0].correction:
            shares = [_share(trace, e) for e in asked]
            mean = sum(share * u[name] for share, u in zip(shares, updates, strict=True))
            for was, now, update in zip(asked, corrected, updates, strict=True):
                expected = was.correction.get(name, 0.0) + (mean - update[name]) / rate
                lost = 2 * _lost_in_corrections(trace, before + 1, name)
                assert np.abs(now.correction[name] - expected).max() <= lost, name


def _share(trace: Trace, exchange: Exchange) -> float:
    """A client's share of all examples."""
    return exchange.num_examples / sum(trace.cell.examples)


def _lost_in_corrections(trace: Trace, server_round: int, name: str) -> float:
    """Bound what the mean difference loses on its way, as that of two float32 models."""
    size = float(trace.starts[server_round][name].abs().max())
    return 4 * EPS * size / (LEARNING_RATE * THREE_STEPS * SERVER_STEP) * (server_round - 1)


def is_the_same_run(one: Trace, other: Trace) -> None:
    """Two runs left the same, to the bit, but for the time that they took."""
    assert _without_seconds(one.entries) == _without_seconds(other.entries)
    assert {**one.summary, "seconds": 0} == {**other.summary, "seconds": 0}
    for name in ("model.safetensors", "weights.jsonl"):
        assert _bytes(one, name) == _bytes(other, name), name
    assert (_bytes(one, "model.safetensors") is not None) == one.cell.evaluates_on_server
    here, there = one.checkpoint, other.checkpoint
    assert (here.server_round, here.values) == (there.server_round, there.values)
    for kept, again in ((here.model, there.model), (here.tensors, there.tensors)):
        assert list(kept) == list(again)
        assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    assert [_in_bytes(s) for s in one.states] == [_in_bytes(s) for s in other.states]


# What has to hold of every run in which all clients answered.
OF_EVERY_RUN = (
    completes_with_everybody,
    is_finite,
    records_its_bytes,
    sends_the_widths_asked_for,
    dithers_each_client_by_itself,
    rounds_the_model_that_it_has,
    aggregates_by_its_rule,
    corrections_sum_to_zero,
    corrections_are_the_deviations,
)


def _assert_models(trace: Trace, strategy: str) -> None:
    for server_round, expected in zip(trace.rounds, next_models(trace, strategy), strict=True):
        start, got = (float64(trace.starts[r]) for r in (server_round, server_round + 1))
        assert got.keys() == expected.keys()
        for name, values in expected.items():
            # Some float32 roundings on the way from one model to the next.
            size = np.abs(start[name]).max() + np.abs(values).max()
            deviation = np.abs(got[name] - values).max()
            assert deviation <= 8 * EPS * size, f"{name} after round {server_round}"


def _leaves(entry: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _without_seconds(entries: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def _bytes(trace: Trace, name: str) -> bytes | None:
    path = trace.folder / name
    return path.read_bytes() if path.exists() else None


def _in_bytes(state: RecordDict) -> dict[str, object]:
    arrays = {
        f"{key}/{name}": array.numpy().tobytes()
        for key, record in state.array_records.items()
        for name, array in record.items()
    }
    return arrays | {key: dict(record) for key, record in state.config_records.items()}
