"""The error that ends a run for want of a federation."""


class FederationError(RuntimeError):
    """The federation cannot go on; the message says why."""
