"""What systems were set to: the same in all, in one scenario, in one system, or in a run alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prowd.report.series import Scenario, Series, distinct
from prowd.report.tables import Table


@dataclass(frozen=True)
class ScenarioSettings:
    """What is not the same in all scenarios, or in all systems of this one.

    Attributes
    ----------
    name : str
        Of the scenario.
    shared : Table
        Settings that all its systems have alike, while others differ.
    different : Table
        Settings in which its systems differ, with the value of each.
    """

    name: str
    shared: Table
    different: Table


def common_settings(scenarios: Sequence[Scenario]) -> dict[str, object]:
    """Return the settings that every run that has them has with the same value."""
    found = _values(series for scenario in scenarios for series in scenario.series)
    return {key: values[0] for key, values in found.items() if len(values) == 1}


def common_table(scenarios: Sequence[Scenario]) -> Table:
    """Show the settings that are the same everywhere."""
    common = common_settings(scenarios)
    return Table(["setting", "value"], [[key, _shown(value)] for key, value in common.items()])


def scenario_settings(scenarios: Sequence[Scenario]) -> list[ScenarioSettings]:
    """Show of each scenario the other settings, if there are any."""
    common = common_settings(scenarios)
    all_of_them = [_of_scenario(scenario, common) for scenario in scenarios]
    return [found for found in all_of_them if found.shared.rows or found.different.rows]


def _of_scenario(scenario: Scenario, common: Iterable[str]) -> ScenarioSettings:
    found = {k: v for k, v in _values(scenario.series).items() if k not in common}
    shared = [[key, _shown(values[0])] for key, values in found.items() if len(values) == 1]
    different = [
        [key, *(_cell(series, key) for series in scenario.series)]
        for key, values in found.items()
        if len(values) > 1
    ]
    return ScenarioSettings(
        scenario.name,
        Table(["setting", "value"], shared),
        Table(["setting", *(series.name for series in scenario.series)], different),
    )


def disagreements(scenario: Scenario) -> list[str]:
    """Tell of which systems the runs have different settings, and which."""
    found = {s.name: [k for k, v in s.settings.items() if len(v) > 1] for s in scenario.series}
    return [
        f"The runs of {name} differ in more than their seed: {', '.join(keys)}."
        for name, keys in found.items()
        if keys
    ]


def _values(series: Iterable[Series]) -> dict[str, list[object]]:
    """Gather the values of each setting; a system without it, as of another strategy, adds none."""
    found: dict[str, list[object]] = {}
    for one in series:
        for key, values in one.settings.items():
            found.setdefault(key, []).extend(values)
    return {key: distinct(values) for key, values in found.items()}


def _cell(series: Series, key: str) -> str:
    """Write the value of a system, or each of its values with the seeds that have it."""
    seeds: dict[str, list[str]] = {}
    for record in series.records:
        if key in record.settings:
            seed = str(record.settings.get("seed", "?"))
            seeds.setdefault(_shown(record.settings[key]), []).append(seed)
    if len(seeds) < 2:
        return next(iter(seeds), "-")
    return "; ".join(f"{value} (seed {', '.join(of)})" for value, of in seeds.items())


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'
