"""FedPAQ, FedCOM and FedCOMGATE against few-line NumPy models of their papers' algorithms."""

import numpy as np
import pytest
import torch
from federation import ScriptedClient, federation, run_round
from flwr.app import RecordDict

from client_app.tracking import correction, effective_steps, remember
from quant import Update, quantize_difference
from strategies import FedCOM, FedCOMGATE, FedPAQ
from strategies.differences import DifferenceOptions, ServerStepOptions
from task.errors import SettingsError

START = {"w": torch.tensor([[1.0, -2.0, 0.5]])}
# Clients whose loss is |w - a|^2 / 2, so that a local step is w <- w - eta (w - a).
OPTIMA = np.array([[4.0, 0.0, 1.0], [-2.0, 3.0, 0.0], [1.0, 1.0, -5.0]], np.float32)
ETA, STEPS = 0.1, 3


class Descending(ScriptedClient):
    """Takes local gradient steps and sends the quantized difference; tracks if asked to."""

    def __init__(self, partition, bits, tracks=False, own_bits=32):
        super().__init__(partition, len(OPTIMA), own_bits, self.descend)
        self.sent_bits, self.tracks = bits, tracks
        self.state = RecordDict()
        self.delta: dict = {}
        self.sent = []
        self.rounds = 0

    def descend(self, received):
        self.rounds += 1
        gamma = self.instructions[-1].server_learning_rate
        if self.tracks:
            self.delta = correction(self.state, received, self.rounds, gamma)
        optimum = torch.from_numpy(OPTIMA[self.declaration.partition_id])
        w = received["w"].clone()
        for _ in range(STEPS):
            w -= ETA * ((w - optimum) - self.delta.get("w", 0.0))
        generator = torch.Generator().manual_seed(self.declaration.partition_id + 10 * self.rounds)
        update = quantize_difference({"w": w - received["w"]}, self.sent_bits, generator)
        sent = update.dequantize()
        self.sent.append(sent["w"].numpy().copy())
        if self.tracks:
            remember(self.state, self.delta, received, sent, self.rounds, ETA, STEPS)
        return update


def run(strategy, clients, rounds):
    grid = federation(clients, START)
    state = START
    models = []
    for server_round in range(1, rounds + 1):
        state = run_round(strategy, grid, state, server_round)
        models.append(state["w"].numpy())
    return models


@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_fedpaq_adds_the_mean_of_the_quantized_differences(bits):
    clients = [Descending(i, bits) for i in range(3)]
    models = run(FedPAQ(DifferenceOptions(bits=bits)), clients, 3)
    w = START["w"].numpy()
    for r, model in enumerate(models):
        w = w + np.mean([c.sent[r] for c in clients], axis=0)  # x_{k+1} = x_k + mean Q(x_i - x_k)
        np.testing.assert_allclose(model, w, rtol=1e-5)


def test_unquantized_fedpaq_is_averaging_of_gradient_descent():
    models = run(FedPAQ(DifferenceOptions(bits=32)), [Descending(i, 32) for i in range(3)], 2)
    w = START["w"].numpy()
    shrink = (1 - ETA) ** STEPS
    for model in models:
        # Closed form: each client ends at a + (1 - eta)^tau (w - a).
        w = np.mean(OPTIMA + shrink * (w - OPTIMA), axis=0, keepdims=True)
        np.testing.assert_allclose(model, w, rtol=1e-5)


def test_fedcom_applies_the_mean_with_the_servers_step():
    options = ServerStepOptions(bits=8, server_learning_rate=0.5)
    clients = [Descending(i, 8) for i in range(3)]
    models = run(FedCOM(options), clients, 3)
    w = START["w"].numpy()
    for r, model in enumerate(models):
        gradient = np.mean([-c.sent[r] / ETA for c in clients], axis=0)
        w = w - ETA * 0.5 * gradient  # w_{r+1} = w_r - eta gamma mean Q((w_r - w_j) / eta)
        np.testing.assert_allclose(model, w, rtol=1e-5)


def fedcomgate_in_numpy(rounds, gamma):
    """Algorithm 2 of arXiv:2007.01154 without quantization; returns models and corrections."""
    w = START["w"].numpy().astype(np.float64)
    delta = np.zeros((3, 3))
    models = []
    for _ in range(rounds):
        ends = []
        for j in range(3):
            x = w[0].copy()
            for _ in range(STEPS):
                x -= ETA * ((x - OPTIMA[j]) - delta[j])
            ends.append(x)
        sent = (w - np.stack(ends)) / ETA
        average = sent.mean(0)
        w = w - ETA * gamma * average
        delta += (sent - average) / STEPS
        models.append(w)
    return models, delta


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_fedcomgate_follows_algorithm_2(gamma):
    options = ServerStepOptions(bits=32, server_learning_rate=gamma)
    clients = [Descending(i, 32, tracks=True) for i in range(3)]
    models = run(FedCOMGATE(options), clients, 5)
    expected, _ = fedcomgate_in_numpy(5, gamma)
    for model, wanted in zip(models, expected, strict=True):
        np.testing.assert_allclose(model, wanted, rtol=1e-4, atol=1e-5)
    # The corrections that the clients used in round 5 are those that the algorithm had after 4.
    _, delta = fedcomgate_in_numpy(4, gamma)
    used = np.concatenate([c.delta["w"].numpy() for c in clients])
    np.testing.assert_allclose(used, delta, rtol=1e-3, atol=1e-4)
    assert np.abs(used).max() > 0.5


@pytest.mark.parametrize("bits", [3, 8])
def test_corrections_sum_to_zero_over_the_clients(bits):
    clients = [Descending(i, bits, tracks=True) for i in range(3)]
    run(FedCOMGATE(ServerStepOptions(bits=bits, server_learning_rate=0.7)), clients, 4)
    used = np.stack([c.delta["w"].numpy() for c in clients])
    assert np.abs(used).max() > 0.1
    np.testing.assert_allclose(used.sum(0), 0, atol=2e-5)


def test_a_client_that_lost_its_state_starts_clean():
    clients = [Descending(i, 32, tracks=True) for i in range(3)]
    strategy = FedCOMGATE(ServerStepOptions(bits=32))
    grid = federation(clients, START)
    state = run_round(strategy, grid, START, 1)
    state = run_round(strategy, grid, state, 2)
    assert clients[1].delta
    clients[1].state = RecordDict()
    assert run_round(strategy, grid, state, 3) is not None
    assert clients[1].delta == {}
    assert clients[0].delta != {}
    assert strategy.round_log.aggregated == [0, 1, 2]


def test_a_client_that_missed_a_round_keeps_its_correction():
    state = RecordDict()
    received, sent = {"w": torch.ones(1, 2)}, {"w": torch.tensor([[0.5, 0.0]])}
    delta = {"w": torch.tensor([[3.0, -1.0]])}
    remember(state, delta, received, sent, 1, ETA, STEPS)
    later = {"w": torch.full((1, 2), 9.0)}
    assert torch.equal(correction(state, later, 3, 1.0)["w"], delta["w"])
    # In the round right after, by hand: delta + ((9 - 1) - sent) / (0.1 * 3).
    expected = torch.tensor([[3 + 7.5 / 0.3, -1 + 8 / 0.3]])
    torch.testing.assert_close(correction(state, later, 2, 1.0)["w"], expected)


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (7, 0.0), (1, 0.9), (5, 0.9), (40, 0.5)])
def test_effective_steps_are_what_sgd_moves_under_a_constant_gradient(steps, momentum):
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
    for _ in range(steps):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert effective_steps(steps, momentum) == pytest.approx(-float(weight.detach()), rel=1e-5)


def test_target_bits_of_0_are_each_clients_own():
    clients = [Descending(i, b, own_bits=b) for i, b in enumerate((4, 8, 32))]
    strategy = FedCOM()
    run(strategy, clients, 1)
    assert strategy.round_log.aggregated == [0, 1, 2]


def test_weights_are_refused_where_a_difference_was_asked_for():
    weights = Update(32, "weights", {}, {"w": torch.ones(1, 3)})
    clients = [Descending(0, 32), ScriptedClient(1, 3, 32, lambda _: weights)]
    strategy = FedPAQ()
    run_round(strategy, federation(clients, START), START)
    assert "asked for difference" in strategy.round_log.rejected[1]


@pytest.mark.parametrize("bits", [1, 17, 31, 33, -4])
def test_target_bits_out_of_range_are_refused(bits):
    with pytest.raises(SettingsError, match=f"fedpaq-bits: {bits} is not allowed"):
        DifferenceOptions.read({"bits": bits}, "fedpaq-")
