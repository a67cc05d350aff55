"""How settings are read: frozen pydantic models whose errors are one line that names the key."""

from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from task.errors import SettingsError


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Options(BaseModel):
    """Base of everything that is set from outside: strict types, kebab-case keys, frozen."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        alias_generator=_kebab,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )

    @classmethod
    def read(cls, values: Mapping[str, object], prefix: str = "") -> Self:
        """Validate settings.

        Parameters
        ----------
        values : mapping
            Values by kebab-case key, without the prefix.
        prefix : str
            Put before each key in an error message.

        Raises
        ------
        SettingsError
            One line that names every wrong key, its value, and what is allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise SettingsError("; ".join(_line(e, prefix) for e in error.errors())) from None

    def to_settings(self, prefix: str = "") -> dict[str, object]:
        """Return the values by kebab-case key."""
        return {prefix + key: value for key, value in self.model_dump(by_alias=True).items()}


def _line(error: Mapping[str, object], prefix: str) -> str:
    key = prefix + ".".join(str(part) for part in error["loc"])
    message = str(error["msg"])
    if isinstance(cause := error.get("ctx", {}).get("error"), SettingsError):
        return str(cause)
    if error["type"] == "extra_forbidden":
        return f"{key}: there is no such setting (value {error['input']!r})"
    return f"{key}: {error['input']!r} is not allowed: {message[0].lower()}{message[1:]}"
