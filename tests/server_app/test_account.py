"""The privacy that rounds cost: as accounted by hand, refused beyond a budget, kept by a resume."""

import pytest

from core.errors import SettingsError
from core.settings import Settings
from privacy.accounting import Mechanism, epsilon_after
from server_app.account import Account, noise_multiplier_of


def settings(**given):
    private = {"dp-clip": 1.0, "weighting": "uniform", "dp-noise-multiplier": 2.0}
    return Settings.read({**private, **given})


def test_each_round_adds_to_epsilon_as_the_accountant_says():
    account = Account(settings())
    entries = [account.add(2.0) for _ in range(3)]
    wanted = [epsilon_after(Mechanism(2.0), rounds, 1e-5) for rounds in (1, 2, 3)]
    assert [entry["epsilon"] for entry in entries] == pytest.approx(wanted)
    assert Account(settings(), entries[:2]).add(2.0) == entries[2]


def test_the_budget_refuses_the_round_that_would_exceed_it():
    budget = epsilon_after(Mechanism(2.0), 2, 1e-5)
    account = Account(settings(**{"dp-epsilon": budget}))
    for _ in range(2):
        assert account.refusal() == ""
        account.add(2.0)
    assert account.refusal().startswith(f"dp-epsilon: {budget:g} allows no further round")


def test_a_budget_alone_makes_noise_that_all_rounds_fit_in():
    own = {"dp-noise-multiplier": 0.0, "dp-epsilon": 4.0, "num-server-rounds": 5}
    account = Account(settings(**own))
    noise = noise_multiplier_of(settings(**own))
    for _ in range(5):
        assert account.refusal() == ""
        last = account.add(noise)
    assert 3.95 < last["epsilon"] <= 4.0
    assert account.refusal()


def test_less_noise_than_was_asked_for_counts_as_less():
    account = Account(settings(**{"dp-epsilon": 100.0}))
    assert account.add(1.0)["epsilon"] == pytest.approx(epsilon_after(Mechanism(1.0), 1, 1e-5))


def test_sampling_amplifies_but_for_the_server_that_secure_aggregation_is_against():
    sampled = {"fraction-train": 0.1}
    spent = Account(settings(**sampled)).add(2.0)["epsilon"]
    assert spent == pytest.approx(epsilon_after(Mechanism(2.0, 0.1), 1, 1e-5))
    secure = {**sampled, "secure-aggregation": True}
    spent = Account(settings(**secure)).add(2.0)["epsilon"]
    assert spent == pytest.approx(epsilon_after(Mechanism(2.0, 1.0, discrete=True), 1, 1e-5))
    budget = {**secure, "dp-noise-multiplier": 0.0, "dp-epsilon": 4.0}
    whole = {**budget, "fraction-train": 1.0}
    assert noise_multiplier_of(settings(**budget)) == noise_multiplier_of(settings(**whole))


def test_a_budget_that_no_noise_is_enough_for_is_refused_by_name():
    given = {"dp-noise-multiplier": 0.0, "dp-epsilon": 1e-12, "dp-delta": 1e-300}
    with pytest.raises(SettingsError, match=r"^dp-epsilon: 1e-12 is not allowed: at delta"):
        noise_multiplier_of(settings(**given))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dp-clip": 1.0}, "dp-clip: 1 with dp-noise-multiplier 0 and dp-epsilon 0"),
        ({"dp-epsilon": 1.0}, "dp-clip: 0 with"),
        ({"dp-noise-multiplier": 1.0}, "dp-clip: 0 with"),
        ({"dp-clip": 1.0, "dp-epsilon": 1.0}, "weighting: examples with dp-clip 1"),
        ({"dp-delta": 1.0}, "dp-delta: 1.0 is not allowed"),
        ({"dp-clip": -1.0}, "dp-clip: -1.0 is not allowed"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(given, named):
    with pytest.raises(SettingsError) as refused:
        Settings.read(given)
    assert str(refused.value).startswith(named)
