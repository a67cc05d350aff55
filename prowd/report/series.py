"""Which runs are seeds of one system, and which systems are in one figure."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from core.mix import parse_mix
from prowd.records import Record

# The settings that differ between seeds and repetitions of one system.
_OF_A_RUN = ("seed", "output-dir", "run-name", "resume")
# Systems are compared in one federation: the same data, partitioned alike among the same widths.
_OF_A_FEDERATION = (
    "task",
    "task-options",
    "dataset",
    "data-dir",
    "image-size",
    "samples-per-client",
    "validation-samples",
    "server-buffer",
    "partitioner",
    "partition-file",
    "dirichlet-alpha",
    "bit-mix",
)


@dataclass(frozen=True, eq=False)
class Series:
    """The runs of one system in one federation, one a seed.

    Attributes
    ----------
    name : str
        Short name of the system.
    style : int
        Number of its color and line; one name has one on the whole page.
    records : tuple of Record
        At least one.
    """

    name: str
    style: int
    records: tuple[Record, ...]

    @property
    def settings(self) -> dict[str, list[object]]:
        """The values of each setting in its runs: one, unless seeds ran with different ones."""
        found: dict[str, list[object]] = {}
        for record in self.records:
            for key, value in _shared(record.settings).items():
                found.setdefault(key, []).append(value)
        return {key: distinct(values) for key, values in found.items()}

    @property
    def longest(self) -> list[Record]:
        """Its runs with the most rounds: one that is half done would lower a mean."""
        most = max(record.rounds[-1].round for record in self.records)
        return [record for record in self.records if record.rounds[-1].round == most]

    @property
    def end(self) -> str:
        """How its longest runs ended, if they did not complete."""
        ends = dict.fromkeys(record.summary.status for record in self.longest)
        said = {"running": "not finished", "": "end unknown"}
        return ", ".join(said.get(end, end) for end in ends if end != "completed")

    def widths(self) -> list[str]:
        """Return the bit-widths that take part in any of its rounds, rising."""
        found = {w for r in self.records for e in r.rounds for w in e.uplink_bytes | e.accuracy}
        return sorted(found - {"average"}, key=int)


@dataclass(frozen=True)
class Scenario:
    """Systems in one federation."""

    name: str
    series: tuple[Series, ...]

    def widths(self) -> list[str]:
        """Return the bit-widths of any of its systems, rising."""
        return sorted({w for series in self.series for w in series.widths()}, key=int)


def by_settings(records: Sequence[Record]) -> list[Scenario]:
    """Arrange runs by their settings alone.

    Runs of equal settings under different seeds are one system. Systems are named by strategy and,
    where those are equal, by the settings in which they leave what most of them have.
    A federation of Float32 clients alone, which shows what could be reached, joins the others of
    its data.
    """
    federations: dict[str, list[list[Record]]] = {}
    for runs in _seeds(records):
        federations.setdefault(_key(_federation(runs[0].settings)), []).append(runs)
    joined = _with_ceilings(list(federations.values()))
    titles = _titles([_federation(systems[0][0].settings) for systems in joined])
    return arrange(
        (title, system, record)
        for title, systems in zip(titles, joined, strict=True)
        for system, runs in zip(_system_names(systems), systems, strict=True)
        for record in runs
    )


def arrange(named: Iterable[tuple[str, str, Record]]) -> list[Scenario]:
    """Gather records by the names of their scenario and system, in the order in which they come."""
    scenarios: dict[str, dict[str, list[Record]]] = {}
    styles: dict[str, int] = {}
    for scenario, system, record in named:
        scenarios.setdefault(scenario, {}).setdefault(system, []).append(record)
        styles.setdefault(system, len(styles))
    return [
        Scenario(name, tuple(Series(s, styles[s], tuple(runs)) for s, runs in systems.items()))
        for name, systems in scenarios.items()
    ]


def distinct(values: Iterable[object]) -> list[object]:
    """Return the values that are not the same, in their order; true and 1 are two."""
    return list({_key(value): value for value in values}.values())


def _seeds(records: Sequence[Record]) -> list[list[Record]]:
    """Gather the runs of equal settings; those of one seed are repetitions and stand alone."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        shared = _shared(record.settings) or {"folder": str(record.folder)}
        groups.setdefault(_key(shared), []).append(record)
    found = []
    for runs in groups.values():
        seeds = [_key(run.settings.get("seed")) for run in runs]
        found += [runs] if len(set(seeds)) == len(seeds) else [[run] for run in runs]
    return found


def _with_ceilings(federations: list[list[list[Record]]]) -> list[list[list[Record]]]:
    """Add the systems of federations of Float32 clients alone to the others of their data."""
    ceilings = [systems for systems in federations if _is_float32(systems)]
    others = [systems for systems in federations if systems not in ceilings]
    joined = [
        [*systems, *(runs for c in ceilings if _data(c) == _data(systems) for runs in c)]
        for systems in others
    ]
    return joined + [c for c in ceilings if _data(c) not in map(_data, others)]


def _is_float32(systems: list[list[Record]]) -> bool:
    try:
        return set(parse_mix(str(systems[0][0].settings.get("bit-mix")))) == {32}
    except ValueError:
        return False


def _data(systems: list[list[Record]]) -> str:
    return _key(_federation(systems[0][0].settings) | {"bit-mix": ""})


def _titles(federations: Sequence[Mapping[str, object]]) -> list[str]:
    """Name federations by what differs and is not empty, or by all of it if that is too little."""
    told = [{k: v for k, v in settings.items() if not _is_empty(v)} for settings in federations]
    titles, every = _differences(told), _differences(federations)
    if len(set(titles)) < len(set(every)):
        titles = every
    return [title or whole or "all runs" for title, whole in zip(titles, every, strict=True)]


def _is_empty(value: object) -> bool:
    """Return whether a setting is empty: for such a one, 0 is the same as not set."""
    return value in ("", 0) and not isinstance(value, bool)


def _system_names(systems: list[list[Record]]) -> list[str]:
    strategies = [str(runs[0].settings.get("strategy") or runs[0].folder.name) for runs in systems]
    names = list(strategies)
    for strategy in set(strategies):
        places = [i for i, other in enumerate(strategies) if other == strategy]
        settings = [_shared(systems[i][0].settings) for i in places]
        found = _differences(settings, f"{strategy}-", from_usual=True)
        for i, difference in zip(places, found, strict=True):
            names[i] += f", {difference}" if difference else ""
    # Repetitions of one seed.
    return [
        f"{name} ({runs[0].folder.name})" if names.count(name) > 1 else name
        for name, runs in zip(names, systems, strict=True)
    ]


def _differences(
    all_settings: Sequence[Mapping[str, object]], prefix: str = "", from_usual: bool = False
) -> list[str]:
    """Describe each by the settings in which any two differ.

    With `from_usual`, by those of them alone in which it leaves the most common value. `prefix` is
    taken off the names of settings.
    """
    described: list[list[str]] = [[] for _ in all_settings]
    for key in dict.fromkeys(key for settings in all_settings for key in settings):
        values = [settings.get(key) for settings in all_settings]
        [(usual, count), *_] = Counter(map(_key, values)).most_common()
        for parts, value in zip(described, values, strict=True):
            said = value is not None and not (from_usual and _key(value) == usual)
            if said and count < len(values):
                short = key.removeprefix(prefix)
                parts.append(f"no {short}" if value == "" else f"{short} {_shown(value)}")
    return [", ".join(parts) for parts in described]


def _shown(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _shared(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key not in _OF_A_RUN}


def _federation(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: settings.get(key) for key in _OF_A_FEDERATION}


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)
