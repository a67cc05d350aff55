"""The one error that a user's settings can cause."""


class SettingsError(ValueError):
    """A setting, or what it points to, is wrong; the message is one line that names it."""
