"""Which numbers are bit-widths: those of a grid, 2 to 16, and 32 for float32."""

from numbers import Integral
from typing import Any

MIN_BITS = 2
MAX_BITS = 16
FLOAT_BITS = 32
# What `is_width` allows, in words.
ALLOWED_WIDTHS = f"{MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS}"


def is_width(bits: object) -> bool:
    """Return whether a device can have this bit-width: a grid's, or that of float32.

    >>> is_width(4), is_width(32), is_width(20)
    (True, True, False)
    """
    return _is_whole(bits) and (MIN_BITS <= bits <= MAX_BITS or bits == FLOAT_BITS)  # type: ignore[operator]


def _is_whole(bits: object) -> bool:
    """Return whether this is a whole number, NumPy's too."""
    return isinstance(bits, Integral) and not isinstance(bits, bool)


def check_bits(bits: Any) -> int:
    """Return `bits`, of NumPy's type too, if it is a width that a grid exists for.

    Raises
    ------
    ValueError
        If `bits` is not an integer from 2 to 16.

    Examples
    --------
    >>> check_bits(4)
    4
    """
    if not _is_whole(bits) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits!r}; allowed are the integers {MIN_BITS} to {MAX_BITS}")
    return int(bits)


def check_width(name: str, bits: Any, *, or_float: bool = True) -> int:
    """Return a bit-width of a grid or, where that is allowed too, of float32; NumPy's are ints.

    Raises
    ------
    ValueError
        One line that names the argument.
    """
    if not is_width(bits) or (bits == FLOAT_BITS and not or_float):
        also = f", or {FLOAT_BITS}" if or_float else ""
        raise ValueError(
            f"{name}: {bits!r} is not allowed: it should be {MIN_BITS} to {MAX_BITS}{also}"
        )
    return int(bits)
