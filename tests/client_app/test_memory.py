"""What a client keeps between messages."""

import torch
from flwr.app import RecordDict

from client_app.memory import has_model, keep_model, own_model


def test_a_kept_model_comes_back_bit_for_bit():
    state = RecordDict()
    model = {"w": torch.randn(3, 4), "b": torch.tensor([1e-40, -0.0])}
    keep_model(state, model, {"w": torch.rand(3)})
    back, scales = own_model(state)
    assert all(torch.equal(back[n], t) for n, t in model.items())
    assert scales["w"].shape == (3,)
    back["w"].zero_()
    assert own_model(state)[0]["w"].any(), "what is returned has memory of its own"


def test_a_new_client_has_no_model():
    state = RecordDict()
    assert not has_model(state)
    keep_model(state, {"w": torch.ones(1)}, {})
    assert has_model(state)
