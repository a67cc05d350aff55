"""FedProx: what it asks of a client. The term itself is tested in tests/task/test_training.py."""

import pytest
import torch
from federation import ScriptedClient, federation, run_round, with_w

from core.errors import SettingsError
from strategies import FedProx
from strategies.fedprox import FedProxOptions

STATE = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}


def test_every_client_is_asked_for_the_proximal_term():
    clients = [ScriptedClient(i, 2, bits, lambda s: s) for i, bits in enumerate((8, 32))]
    run_round(FedProx(FedProxOptions(mu=0.25), with_w()), federation(clients, STATE), STATE)
    assert [c.instructions[0].proximal_mu for c in clients] == [0.25, 0.25]


def test_a_negative_factor_is_refused():
    with pytest.raises(SettingsError, match=r"fedprox-mu: -0\.1 is not allowed"):
        FedProxOptions.read({"mu": -0.1}, "fedprox-")
