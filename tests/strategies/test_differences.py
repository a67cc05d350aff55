"""FedPAQ, FedCOM and FedCOMGATE against few-line NumPy models of their papers' algorithms."""

import numpy as np
import pytest
import torch
from federation import ScriptedClient, federation, run_round, with_w
from flwr.app import RecordDict
from specs import difference_of

from client_app.tracking import TrackedRound, effective_steps, next_correction
from core.errors import SettingsError
from quant import Update
from strategies import FedCOM, FedCOMGATE, FedPAQ
from strategies.differences import DifferenceOptions, ServerStepOptions

START = {"w": torch.tensor([[1.0, -2.0, 0.5]])}
# Clients whose loss is |w - a|^2 / 2, so that a local step is w <- w - eta (w - a).
OPTIMA = np.array([[4.0, 0.0, 1.0], [-2.0, 3.0, 0.0], [1.0, 1.0, -5.0]], np.float32)
ETA, STEPS = 0.1, 3


class Descending(ScriptedClient):
    """Takes local gradient steps and sends the quantized difference; tracks if asked to."""

    def __init__(self, partition, bits, own_bits=32, examples=10, steps=STEPS):
        super().__init__(partition, len(OPTIMA), own_bits, self.descend, examples)
        self.sent_bits, self.steps = bits, steps
        self.state = RecordDict()
        self.delta: dict = {}
        self.sent = []

    def descend(self, received):
        instruction = self.instructions[-1]
        if instruction.tracking_epoch:
            self.delta = next_correction(self.state, received, instruction, momentum=0.0)
        optimum = torch.from_numpy(OPTIMA[self.declaration.partition_id])
        w = received["w"].clone()
        for _ in range(self.steps):
            w -= ETA * ((w - optimum) - self.delta.get("w", 0.0))
        self.reported = {"steps": self.steps, "began_clean": int(not self.delta)}
        seed = self.declaration.partition_id + 10 * instruction.server_round
        generator = torch.Generator().manual_seed(seed)
        update = difference_of({"w": w - received["w"]}, self.sent_bits, generator)
        sent = update.dequantize()
        self.sent.append(sent["w"].numpy().copy())
        epoch, number = instruction.tracking_epoch, instruction.server_round
        TrackedRound(epoch, number, ETA, self.delta, received, sent).keep(self.state)
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
    models = run(FedPAQ(DifferenceOptions(bits=bits), with_w()), clients, 3)
    w = START["w"].numpy()
    for r, model in enumerate(models):
        w = w + np.mean([c.sent[r] for c in clients], axis=0)  # x_{k+1} = x_k + mean Q(x_i - x_k)
        np.testing.assert_allclose(model, w, rtol=1e-5, atol=1e-6)


def test_unquantized_fedpaq_is_averaging_of_gradient_descent():
    models = run(
        FedPAQ(DifferenceOptions(bits=32), with_w()), [Descending(i, 32) for i in range(3)], 2
    )
    w = START["w"].numpy()
    shrink = (1 - ETA) ** STEPS
    for model in models:
        # Closed form: each client ends at a + (1 - eta)^tau (w - a).
        w = np.mean(OPTIMA + shrink * (w - OPTIMA), axis=0, keepdims=True)
        np.testing.assert_allclose(model, w, rtol=1e-5)


def test_fedcom_applies_the_mean_with_the_servers_step():
    options = ServerStepOptions(bits=8, server_learning_rate=0.5)
    clients = [Descending(i, 8) for i in range(3)]
    models = run(FedCOM(options, with_w()), clients, 3)
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
    clients = [Descending(i, 32) for i in range(3)]
    models = run(FedCOMGATE(options, with_w()), clients, 5)
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
    clients = [Descending(i, bits) for i in range(3)]
    run(FedCOMGATE(ServerStepOptions(bits=bits, server_learning_rate=0.7), with_w()), clients, 4)
    used = np.stack([c.delta["w"].numpy() for c in clients])
    assert np.abs(used).max() > 0.1
    np.testing.assert_allclose(used.sum(0), 0, atol=2e-5)


def test_weighted_corrections_sum_to_zero_and_the_optimum_is_the_weighted_one():
    """Clients of unequal size and number of steps; in the limit every difference vanishes."""
    sizes, steps = np.array([10, 20, 70]), [1, 2, 7]
    clients = [Descending(i, 32, examples=int(sizes[i]), steps=steps[i]) for i in range(3)]
    models = run(FedCOMGATE(ServerStepOptions(bits=32), with_w()), clients, 120)
    used = np.concatenate([c.delta["w"].numpy() for c in clients])
    assert np.abs(used).max() > 0.5
    np.testing.assert_allclose(sizes @ used / 100, 0, atol=1e-3)
    # The minimum of the weighted sum of |w - a_j|^2 is the weighted mean of the a_j.
    np.testing.assert_allclose(models[-1][0], sizes @ OPTIMA / 100, atol=2e-3)
    plain = [Descending(i, 32, examples=int(sizes[i]), steps=steps[i]) for i in range(3)]
    drifted = run(FedCOM(ServerStepOptions(bits=32), with_w()), plain, 120)
    assert np.abs(drifted[-1][0] - sizes @ OPTIMA / 100).max() > 0.3


def lose_state(clients, grid):
    clients[1].state = RecordDict()


def lose_reply(clients, grid):
    honest = grid.nodes[101]

    def lost(message):
        honest(message)  # It trained and kept its round, but its reply is lost.
        grid.nodes[101] = honest

    grid.nodes[101] = lost


def spoil_replies(clients, grid):
    for node_id, client in dict(grid.nodes).items():

        def spoilt(message, node_id=node_id, client=client):
            reply = client(message)
            grid.nodes[node_id] = client
            reply.content.metric_records["report"]["accuracy"] = 7.0
            return reply

        grid.nodes[node_id] = spoilt


@pytest.mark.parametrize("disturb", [lose_state, lose_reply, spoil_replies])
def test_a_disturbed_round_leaves_no_bias_behind(disturb):
    """Whatever happens in round 4, everybody starts clean, and tracking still finds the optimum."""
    clients = [Descending(i, 32) for i in range(3)]
    strategy = FedCOMGATE(ServerStepOptions(bits=32), with_w())
    grid = federation(clients, START)
    state = START
    for server_round in range(1, 100):
        if server_round == 4:
            assert all(c.delta for c in clients)
            disturb(clients, grid)
        state = run_round(strategy, grid, state, server_round) or state
        if server_round == 4 and disturb is lose_state:
            assert clients[1].delta == {}
            assert strategy.round_log.aggregated == [0, 1, 2]
        if server_round == 5:
            assert all(c.delta == {} for c in clients)
    np.testing.assert_allclose(state["w"][0], OPTIMA.mean(0), atol=2e-3)
    used = np.concatenate([c.delta["w"].numpy() for c in clients])
    np.testing.assert_allclose(used.sum(0), 0, atol=1e-4)


def test_fedcomgate_refuses_partial_participation():
    with pytest.raises(ValueError, match=r"fraction-train: 0\.5, but fedcomgate"):
        FedCOMGATE(context=with_w(fraction_train=0.5))


def test_fedpaq_averages_over_the_sampled_clients_only():
    strategy = FedPAQ(DifferenceOptions(bits=32), with_w(fraction_train=0.67, seed=3))
    clients = [Descending(i, 32, examples=10 * (i + 1)) for i in range(3)]
    grid = federation(clients, START)
    state, w = START, START["w"].numpy()
    seen = set()
    for server_round in range(1, 5):
        state = run_round(strategy, grid, state, server_round)
        sampled = strategy.round_log.sampled
        seen.add(tuple(sampled))
        assert len(sampled) == 2
        weights = np.array([10 * (i + 1) for i in sampled])
        sent = np.concatenate([clients[i].sent[-1] for i in sampled])
        w = w + weights @ sent / weights.sum()
        np.testing.assert_allclose(state["w"], w, rtol=1e-5)
    assert len(seen) > 1


def test_the_servers_step_moves_weights_and_not_statistics():
    start = {"w": torch.zeros(1, 2), "bn.running_mean": torch.tensor([1.0])}
    moved = {"w": torch.ones(1, 2), "bn.running_mean": torch.tensor([2.0])}
    client = ScriptedClient(0, 1, 32, lambda _: Update(32, "difference", {}, moved))
    strategy = FedCOM(ServerStepOptions(server_learning_rate=0.25), with_w())
    new = run_round(strategy, federation([client], start), start)
    assert new["w"].tolist() == [[0.25, 0.25]]
    assert new["bn.running_mean"].tolist() == [3.0]


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
    strategy = FedCOM(context=with_w())
    run(strategy, clients, 1)
    assert strategy.round_log.aggregated == [0, 1, 2]


def test_weights_are_refused_where_a_difference_was_asked_for():
    weights = Update(32, "weights", {}, {"w": torch.ones(1, 3)})
    clients = [Descending(0, 32), ScriptedClient(1, 3, 32, lambda _: weights)]
    strategy = FedPAQ(context=with_w(node_wait=0.2))
    run_round(strategy, federation(clients, START), START)
    assert "asked for difference" in strategy.round_log.rejected[1]


@pytest.mark.parametrize("bits", [1, 17, 31, 33, -4])
def test_target_bits_out_of_range_are_refused(bits):
    with pytest.raises(SettingsError, match=f"fedpaq-bits: {bits} is not allowed"):
        DifferenceOptions.read({"bits": bits}, "fedpaq-")
