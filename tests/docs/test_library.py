"""docs/library.md: another project's app, as it stands, with its own network, data and loops."""

import importlib

import pytest
import torch
from documents import importable, section
from federation import InProcessGrid
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.cli.config_utils import load_and_validate

from quant import payload_size, quantizable_weights, spec_of
from strategies import ProWD, StrategyContext


class Node:
    """A node that runs their ClientApp."""

    def __init__(self, app, part, of):
        config = {"partition-id": part, "num-partitions": of}
        self.app = app
        self.context = Context(1, part, config, RecordDict(), {})
        self.replies = []

    def __call__(self, message):
        self.replies.append(self.app(message, self.context))
        return self.replies[-1]


@pytest.fixture
def their_app(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    section("library.md", "The app").write(tmp_path)
    with importable(tmp_path, "their_app"):
        yield lambda module: importlib.import_module(f"their_app.{module}")


def test_it_trains_across_bit_widths(their_app, tmp_path):
    nodes = {10 + i: Node(their_app("client_app").app, i, 4) for i in range(4)}
    server = their_app("server_app")
    server.main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), {}))

    network = their_app("model").new_network()
    values, labels = their_app("model").examples(0, 1)

    def accuracy():
        return (network.eval()(values).argmax(1) == labels).float().mean().item()

    assert accuracy() < 0.8
    network.load_state_dict(torch.load(tmp_path / "their-model.pt"))
    assert accuracy() > 0.95
    # One query and three rounds; the Int8 nodes send codes, which are shorter.
    spec = spec_of(network)
    for number, node in enumerate(nodes.values()):
        query, *rounds = node.replies
        bits = 32 if number % 2 else 8
        assert query.content["declaration"]["bits"] == bits
        assert len(rounds) == 3
        for reply in rounds:
            payload = reply.content["update"]["update"].data
            assert 0 < len(payload) <= payload_size(spec, bits)
    assert payload_size(spec, 8) < payload_size(spec, 32) / 2


def test_it_is_an_app_for_flower(their_app, tmp_path):
    config, warnings = load_and_validate(tmp_path / "pyproject.toml")
    assert warnings == []
    assert config["tool"]["flwr"]["app"]["fab-include"] == ["their_app/**/*.py"]


def test_codes_that_were_sent_are_taken_up(their_app):
    """The page says so of broadcast="nearest"."""
    nodes = {10 + i: Node(their_app("client_app").app, i, 2) for i in range(2)}
    weights = quantizable_weights(their_app("model").new_network())
    context = StrategyContext(min_nodes=2, broadcast="nearest", upload="forward", quantized=weights)
    strategy = ProWD(context=context)
    grid = InProcessGrid(nodes)
    initial = ArrayRecord(their_app("model").new_network().state_dict())
    strategy.start(grid, initial, num_rounds=2)
    downlink = [m.content["instruction"]["downlink_bits"] for m in grid.sent if len(m.content)]
    assert sorted(set(downlink)) == [8, 32]
    assert strategy.round_log.aggregated == [0, 1]
    assert strategy.round_log.left_out == {}
