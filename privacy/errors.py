"""The errors of a secure aggregation. None of them holds a secret."""


class MessageError(ValueError):
    """A message of the protocol that is rejected; the line says whose it is and what is allowed."""


class NotEnoughError(RuntimeError):
    """Fewer devices are left than the threshold: nobody can unmask the sum of this group."""


class UnmaskingError(RuntimeError):
    """The sum cannot be unmasked, because one device shared other secrets than it committed to.

    Attributes
    ----------
    number : int
        That device.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"device {number}: {reason}")
        self.number = number
