"""An experiment file: which systems, under which settings, with which seeds."""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from core.errors import SettingsError
from core.options import Options

Setting = str | int | float | bool


class Experiment(Options):
    """Content of an experiment file.

    Attributes
    ----------
    title, about : str
        What is compared, and how long it takes on what.
    federation : str
        Flower's ``--federation-config``.
    seeds : list of int
        Every system runs once a seed.
    settings : dict
        Settings that all systems share.
    scenarios : dict of str to dict
        By name, the settings of each federation that the systems are compared in, on top.
    systems : dict of str to dict
        By name, the settings of each system on top.
    """

    title: str
    about: str = ""
    federation: str = "num-supernodes=10 client-resources-num-cpus=1"
    seeds: Annotated[list[int], Field(min_length=1)]
    settings: dict[str, Setting] = Field(default_factory=dict)
    scenarios: Annotated[dict[str, dict[str, Setting]], Field(min_length=1)]
    systems: Annotated[dict[str, dict[str, Setting]], Field(min_length=1)]

    @field_validator("scenarios", "systems", mode="before")
    @classmethod
    def _dots_are_quoted(cls, value: Any, info: ValidationInfo) -> Any:
        parts = value if isinstance(value, dict) else {}
        for name, part in parts.items():
            for rest, inner in part.items() if isinstance(part, dict) else ():
                if isinstance(inner, dict):
                    where = f'[{info.field_name}."{name}.{rest}"]'
                    raise SettingsError(f"a name with a dot is quoted: {where}")
        return value

    @field_validator("scenarios", "systems")
    @classmethod
    def _names_are_folders(
        cls, value: dict[str, dict[str, Setting]]
    ) -> dict[str, dict[str, Setting]]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+=-]*", name):
                raise ValueError(f"{name!r}: letters, digits and . _ + = - only")
        return value

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: list[int]) -> list[int]:
        for seed in value:
            if value.count(seed) > 1:
                raise ValueError(f"{seed} is there twice")
        return value

    @model_validator(mode="after")
    def _runs_are_named_here(self) -> "Experiment":
        for part in (self.settings, *self.scenarios.values(), *self.systems.values()):
            refuse_own(part)
        return self


def refuse_own(settings: Iterable[str]) -> None:
    """Refuse the settings that a comparison gives each run itself.

    Raises
    ------
    ValueError
        If there is one.
    """
    if taken := sorted({"seed", "output-dir", "run-name", "resume"}.intersection(settings)):
        raise ValueError(f"{taken[0]} is left to prowd compare")


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment file.

    A file that names another one beside it as ``base`` has everything from there that it does not
    say itself; its settings add to those of the base.

    Raises
    ------
    SettingsError
        If it cannot be read, or something in it is missing, unknown or of the wrong type.
    """
    content = _read_toml(path)
    if "base" in content:
        name = content.pop("base")
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise SettingsError(f"{path.name}: base: {name!r} is not the name of a file beside it")
        base = _read_toml(path.with_name(name))
        settings = [part.get("settings", {}) for part in (base, content)]
        if all(isinstance(part, dict) for part in settings):
            content = {**content, "settings": settings[0] | settings[1]}
        content = {**base, **content}
    return Experiment.read(content, f"{path.name}: ")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # TOML, or the text that it is not.
        raise SettingsError(f"{path}: {error}") from None
