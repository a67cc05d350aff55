"""The errors that end a run, and the message of any error."""


class SettingsError(ValueError):
    """A setting, or what it points to, is wrong; the message is one line that names it."""


class FederationError(RuntimeError):
    """The federation cannot continue; the message says why."""


def words_of(error: BaseException) -> str:
    """Return an error's message; of one whose own code fails at that, what it is called."""
    try:
        return str(error)
    except Exception:  # Whatever the user's code raises.
        return f"(a {type(error).__name__} without words, as its __str__ fails)"
