"""What a run's rounds cost in privacy: epsilon after each, and the budget that ends it."""

from collections.abc import Iterable, Mapping
from typing import Any

from core.errors import SettingsError
from core.settings import Settings
from privacy.accounting import Ledger, Mechanism, noise_for


def noise_multiplier_of(settings: Settings) -> float:
    """Return the noise multiplier of a run: as it is set, or what its budget takes over all rounds.

    Raises
    ------
    SettingsError
        If no noise is enough for the budget.
    """
    if not settings.is_private or settings.dp_noise_multiplier:
        return settings.dp_noise_multiplier
    epsilon, delta, rounds = settings.dp_epsilon, settings.dp_delta, settings.num_server_rounds
    try:
        return noise_for(epsilon, delta, rounds, sampling_of(settings), settings.secure_aggregation)
    except ValueError as error:
        raise SettingsError(f"dp-{error}") from None


def sampling_of(settings: Settings) -> float:
    """Return the probability with which a device takes part, for those whom epsilon is stated for.

    With secure aggregation that is the server too, which knows who does; and how much noise is in a
    sum tells everybody how many do, as each device adds its share.
    """
    return 1.0 if settings.secure_aggregation else settings.fraction_train


class Account:
    """The privacy that a run has spent; made of the lines of its record, so that a resume goes on.

    Parameters
    ----------
    settings : Settings
        Of the run.
    entries : iterable of mapping
        What `add` returned for the rounds so far.
    """

    def __init__(self, settings: Settings, entries: Iterable[Mapping[str, Any]] = ()) -> None:
        self._settings = settings
        self._noise = noise_multiplier_of(settings)
        self._ledger = Ledger()
        for entry in entries:
            self.add(entry["noise_multiplier"])

    def refusal(self) -> str:
        """Return why there is to be no next round; empty if there is."""
        budget, delta = self._settings.dp_epsilon, self._settings.dp_delta
        if not budget:
            return ""
        after = self._ledger.add(self._mechanism(self._noise)).epsilon(delta)
        if after <= budget:
            return ""
        spent = self._ledger.epsilon(delta) if self._ledger.rounds else 0.0
        return (
            f"dp-epsilon: {budget:g} allows no further round: epsilon is {spent:.3g} at delta "
            f"{delta:g}, and would be {after:.3g}"
        )

    def add(self, noise_multiplier: float) -> dict[str, float]:
        """Add a round; return what its line says."""
        self._ledger = self._ledger.add(self._mechanism(noise_multiplier))
        # A sum of devices' shares can be worth a little less than was asked for.
        self._noise = min(self._noise, noise_multiplier)
        delta = self._settings.dp_delta
        return {
            "epsilon": self._ledger.epsilon(delta),
            "delta": delta,
            "noise_multiplier": noise_multiplier,
        }

    def _mechanism(self, noise_multiplier: float) -> Mechanism:
        settings = self._settings
        return Mechanism(noise_multiplier, sampling_of(settings), settings.secure_aggregation)
