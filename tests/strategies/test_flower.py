"""Flower's own strategies on mixed-bit clients, against NumPy."""

import numpy as np
import pytest
import torch
from federation import ScriptedClient, federation, run_round
from specs import to_bits, weights_of

from core.errors import SettingsError
from strategies import FederationError, FlowerStrategy, StrategyContext
from strategies.flower import FlowerOptions, flower_names

GENERATOR = torch.Generator().manual_seed(5)
STATE = {
    # Not in the order in which a payload holds them: some of Flower's classes pair by position.
    "z.bias": torch.randn(4, generator=GENERATOR),
    "a.weight": torch.randn(4, 6, generator=GENERATOR),
    "b.bias": torch.randn(3, generator=GENERATOR),
    "b.weight": torch.randn(3, 4, generator=GENERATOR),
}
MOVES = [{n: torch.randn(t.shape, generator=GENERATOR) for n, t in STATE.items()} for _ in range(5)]
WIDTHS = (4, 4, 8, 32, 32)


@pytest.fixture(autouse=True)
def garbage_waits(monkeypatch):
    """Flower collects it after every array that it takes out of a record, which takes a second."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def sent(i, received):
    """What client `i` holds at its width after moving by its fixed step."""
    moved = {n: received[n] + MOVES[i][n] for n in received}
    return to_bits(moved, WIDTHS[i])


def clients():
    return [
        ScriptedClient(i, 5, WIDTHS[i], lambda s, i=i: sent(i, s), examples=10 * (i + 1))
        for i in range(5)
    ]


def values(state, name):
    return np.stack([sent(i, state).dequantize()[name].numpy() for i in range(5)])


WEIGHTS = np.array([1, 2, 3, 4, 5]) / 15


def make(name, arguments=""):
    return FlowerStrategy.named(name)(
        FlowerOptions(arguments=arguments), StrategyContext(quantized=weights_of(STATE))
    )


def test_fedmedian_takes_the_median_of_the_decoded_weights():
    new = run_round(make("FedMedian"), federation(clients(), STATE), STATE)
    for name in STATE:
        np.testing.assert_allclose(new[name], np.median(values(STATE, name), axis=0), rtol=1e-5)


def test_fedadam_over_two_rounds():
    """Reddi et al., 2021 (arXiv:2003.00295), algorithm 2, with Flower's bias-corrected step."""
    eta, tau, b1, b2 = 0.1, 1e-2, 0.9, 0.99
    strategy = make("FedAdam", f"eta = {eta}, tau = {tau}, beta_1 = {b1}, beta_2 = {b2}")
    grid = federation(clients(), STATE)
    state = STATE
    m = {n: 0.0 for n in STATE}
    v = {n: 0.0 for n in STATE}
    for server_round in (1, 2):
        new = run_round(strategy, grid, state, server_round)
        rate = eta * np.sqrt(1 - b2 ** (server_round + 1)) / (1 - b1 ** (server_round + 1))
        for name in STATE:
            delta = np.tensordot(WEIGHTS, values(state, name), 1) - state[name].numpy()
            m[name] = b1 * m[name] + (1 - b1) * delta
            v[name] = b2 * v[name] + (1 - b2) * delta**2
            expected = state[name].numpy() + rate * m[name] / (np.sqrt(v[name]) + tau)
            np.testing.assert_allclose(new[name], expected, rtol=2e-4, atol=1e-5)
        state = new


def test_fedavgm_pairs_every_tensor_with_its_own():
    """Momentum 0.5 and step 1 over two rounds: v <- v / 2 + (w - mean), w <- w - v."""
    strategy = make("FedAvgM", "server_learning_rate = 1.0, server_momentum = 0.5")
    grid = federation(clients(), STATE)
    state, v = STATE, {n: 0.0 for n in STATE}
    for server_round in (1, 2):
        new = run_round(strategy, grid, state, server_round)
        for name in STATE:
            mean = np.tensordot(WEIGHTS, values(state, name), 1)
            v[name] = 0.5 * v[name] + (state[name].numpy() - mean)
            expected = state[name].numpy() - v[name]
            np.testing.assert_allclose(new[name], expected, rtol=1e-4, atol=1e-5)
        state = new


def test_krum_picks_the_client_nearest_to_its_neighbours():
    """Blanchard et al., 2017: 5 clients, 1 malicious: least sum of distances to 5 - 1 - 2 = 2."""
    flat = np.concatenate([values(STATE, n).reshape(5, -1) for n in STATE], 1)
    squared = ((flat[:, None] - flat[None]) ** 2).sum(2)
    nearest = np.argmin(np.sort(squared, axis=1)[:, 1:3].sum(1))
    new = run_round(make("Krum", "num_malicious_nodes = 1"), federation(clients(), STATE), STATE)
    for name in STATE:
        np.testing.assert_allclose(new[name], values(STATE, name)[nearest], rtol=1e-5)


def test_fedprox_passes_its_factor_on():
    nodes = clients()
    run_round(make("FedProx", "proximal_mu = 0.25"), federation(nodes, STATE), STATE)
    assert {c.instructions[0].proximal_mu for c in nodes} == {0.25}


NAMES = [
    "Bulyan",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedMedian",
    "FedProx",
    "FedTrimmedAvg",
    "FedYogi",
    "Krum",
    "MultiKrum",
    "QFedAvg",
]


def test_the_names_are_flowers_own_that_average_models():
    assert flower_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_one_aggregates(name):
    arguments = "client_learning_rate = 0.1" if name == "QFedAvg" else ""
    new = run_round(make(name, arguments), federation(clients(), STATE), STATE)
    assert all(torch.isfinite(t).all() for t in new.values())
    assert any(not torch.equal(new[n], STATE[n]) for n in STATE)


@pytest.mark.parametrize("name", ["FedYogi", "FedAdagrad"])
def test_yogi_and_adagrad_take_the_step_of_their_paper(name):
    """Reddi et al., 2021 (arXiv:2003.00295), algorithm 2, first round."""
    eta, tau, b1, b2 = 0.1, 1e-2, 0.9, 0.99
    more = f", beta_1 = {b1}, beta_2 = {b2}" if name == "FedYogi" else ""
    strategy = make(name, f"eta = {eta}, tau = {tau}{more}")
    new = run_round(strategy, federation(clients(), STATE), STATE)
    for key in STATE:
        delta = np.tensordot(WEIGHTS, values(STATE, key), 1) - STATE[key].numpy()
        m, v = ((1 - b1) * delta, (1 - b2) * delta**2) if more else (delta, delta**2)
        expected = STATE[key].numpy() + eta * m / (np.sqrt(v) + tau)
        np.testing.assert_allclose(new[key], expected, rtol=1e-3, atol=1e-4)


def test_a_rule_that_makes_no_model_ends_with_a_line():
    strategy = make("Bulyan", "num_malicious_nodes = 1")
    with pytest.raises(FederationError, match="flwr:Bulyan made no model of 5 updates"):
        run_round(strategy, federation(clients(), STATE), STATE)


def test_a_rule_that_never_made_a_model_ends_in_the_first_round_that_all_took_part_in():
    strategy, nodes = make("Bulyan", "num_malicious_nodes = 1"), clients()
    nodes[0].reported = {"accuracy": 2.0}
    assert run_round(strategy, federation(nodes, STATE), STATE) is None
    nodes[0].reported = {}
    with pytest.raises(FederationError, match="flwr:Bulyan made no model of 5 updates"):
        run_round(strategy, federation(nodes, STATE), STATE, server_round=2)


def test_one_bad_client_in_the_first_round_costs_no_more_than_the_round(caplog):
    """Bulyan needs 4 f + 3 clients: of seven, none may be missing where one may be malicious."""
    seven = [
        ScriptedClient(i, 7, 32, lambda s: {n: t + 0.1 for n, t in s.items()}) for i in range(7)
    ]
    strategy, grid = make("Bulyan", "num_malicious_nodes = 1"), federation(seven, STATE)
    seven[3].reported = {"accuracy": 2.0}
    assert run_round(strategy, grid, STATE) is None
    assert strategy.round_log.left_out.keys() == {3}
    assert "Round 1 is left out: flwr:Bulyan made no model of 6 updates" in caplog.text
    seven[3].reported = {}
    assert run_round(strategy, grid, STATE, server_round=2) is not None


@pytest.mark.parametrize("name", ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM"])
def test_a_parameter_without_dimensions_keeps_what_the_class_knows_of_it(name):
    """NumPy turns arrays of no dimension into numbers, which are kept as the others are."""
    state = {**STATE, "temperature": torch.tensor(0.5)}
    arguments = "server_momentum = 0.5" if name == "FedAvgM" else ""

    def grid():
        move = lambda s: {n: t + 0.1 for n, t in s.items()}  # noqa: E731
        return federation([ScriptedClient(i, 2, 32, move) for i in range(2)], state)

    whole, resumed = make(name, arguments), make(name, arguments)
    first = run_round(whole, grid(), state)
    tensors, values = whole.checkpoint()
    kept = ["momentum_vector"] if name == "FedAvgM" else ["m_t", "v_t"]
    assert values["kinds"].keys() >= set(kept)
    assert sum(tensor.ndim == 0 for tensor in tensors.values()) == len(kept) + 1
    resumed.restore(tensors, values)
    expected = run_round(whole, grid(), first, server_round=2)
    second = run_round(resumed, grid(), first, server_round=2)
    for key in state:
        assert torch.equal(second[key], expected[key])


def test_a_rule_that_cannot_aggregate_ends_with_its_reason(monkeypatch):
    strategy = make("FedAvg")
    monkeypatch.setattr(strategy.inner, "weighted_by_key", "absent")
    with pytest.raises(FederationError, match=r"flwr:FedAvg cannot aggregate: .*absent"):
        run_round(strategy, federation(clients(), STATE), STATE)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("FedNova", "", "strategy: 'flwr:FedNova' is not one of flwr:Bulyan"),
        ("FedOpt2", "", "is not one of"),
        ("DifferentialPrivacyServerSideFixedClipping", "", "is not one of"),
        ("QFedAvg", "", "flwr-arguments: QFedAvg needs client_learning_rate"),
        ("FedAdam", "etta = 0.1", "flwr-arguments: FedAdam has no 'etta'; it takes"),
        ("FedAdam", "fraction_train = 0.5", "FedAdam has no 'fraction_train'"),
        ("FedAdam", 'eta = "abc"', "eta = 'abc' is not allowed; FedAdam takes a number from 0"),
        ("FedAdam", "eta = nan", "eta = nan is not allowed"),
        ("FedAdam", "eta.x = 1", "is not allowed"),
        ("Krum", "num_malicious_nodes = 1.5", "Krum takes a whole number from 0"),
        ("FedAvg", "train_metrics_aggr_fn = 3", "FedAvg has no 'train_metrics_aggr_fn'"),
        ("FedProx", "proximal_mu = -1", "proximal_mu = -1 is not allowed"),
        ("FedAvgM", "server_momentum = true", "server_momentum = True is not allowed"),
        ("FedXgbBagging", "", "is not one of"),
        ("FedYogi", "eta_l = 0.5", "flwr-arguments: eta_l has no effect in Flower's FedYogi"),
    ],
)
def test_a_class_that_does_not_fit_is_refused_in_one_line(name, arguments, message):
    with pytest.raises(SettingsError) as error:
        make(name, arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["eta: 3", "} \nx = {a=1", "eta"])
def test_arguments_that_are_no_assignments_are_refused(text):
    with pytest.raises(SettingsError) as error:
        FlowerOptions.read({"arguments": text}, "flwr-")
    assert "flwr-arguments: " in str(error.value)
    assert "eta = 0.1, tau = 0.001" in str(error.value)
