"""What Flower's `start` is given for the clients: theirs to read, and not ours to ignore."""

import pytest
from federation import ClientAppNode
from flwr.app import ConfigRecord, Message, RecordDict

from client_app import config_in


def message(kind, config):
    return Message(RecordDict({"config": ConfigRecord(config)}), 7, kind)


def test_a_client_of_ones_own_reads_it():
    assert config_in(message("train", {"lr": 0.5})) == {"lr": 0.5}
    assert config_in(Message(RecordDict(), 7, "train")) == {}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_our_client_refuses_what_it_would_not_heed(kind):
    node = ClientAppNode(0, 1, {"bit-mix": "32:1.0"})
    reply = node(message(kind, {"lr": 0.5, "epochs": 3}))
    assert reply.error.reason.endswith(
        "config: this client has no use for epochs, lr; allowed: none"
    )
