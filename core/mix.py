"""The mix of bit-widths in a simulated federation: shares by width, assigned to partitions."""

from math import floor
from typing import Any

from core.bits import ALLOWED_WIDTHS, is_width
from core.errors import SettingsError


def check_client_bits(bits: Any, origin: str) -> int:
    """Return a client's bit-width if it is one: 2 to 16, or 32 for float32.

    Raises
    ------
    SettingsError
        Otherwise; the message names `origin`.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not is_width(bits):
        raise SettingsError(f"{origin}: {bits!r} is not a bit-width; allowed: {ALLOWED_WIDTHS}")
    return bits


def width_name(width: str) -> str:
    """Return what a bit-width of the run record, or its "average", is called."""
    return width if width == "average" else f"{width}-bit"


def parse_mix(text: str) -> dict[int, float]:
    """Read ``"8:0.5,32:0.5"`` into shares by width, in the order given.

    Raises
    ------
    SettingsError
        If an entry is not ``bits:share``, a width is repeated or not allowed, a share is not
        positive, or the shares do not add up to 1.
    """
    shares: dict[int, float] = {}
    for entry in text.split(","):
        width, _, share = entry.partition(":")
        try:
            bits, value = int(width), float(share)
        except ValueError:
            raise SettingsError(
                f"bit-mix: {entry.strip()!r} in {text!r} is not bits:share, as in 8:0.5"
            ) from None
        check_client_bits(bits, "bit-mix")
        if bits in shares:
            raise SettingsError(f"bit-mix: width {bits} stands twice in {text!r}")
        if not 0 < value <= 1:
            raise SettingsError(f"bit-mix: share {value:g} of width {bits}; allowed: above 0 to 1")
        shares[bits] = value
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise SettingsError(f"bit-mix: the shares in {text!r} add up to {total:g}, not to 1")
    return shares


def widths_of_partitions(shares: dict[int, float], num_partitions: int) -> list[int]:
    """Width of every partition: whole numbers of clients by largest remainder, in the mix's order.

    >>> widths_of_partitions({8: 0.5, 32: 0.5}, 5)
    [8, 8, 8, 32, 32]

    Raises
    ------
    SettingsError
        If there are too few clients for every width to have one.
    """
    exact = {bits: share * num_partitions for bits, share in shares.items()}
    counts = {bits: floor(value + 1e-9) for bits, value in exact.items()}
    by_remainder = sorted(exact, key=lambda bits: counts[bits] - exact[bits])
    for bits in by_remainder[: num_partitions - sum(counts.values())]:
        counts[bits] += 1
    if empty := [bits for bits, count in counts.items() if not count]:
        mix = ",".join(f"{bits}:{share:g}" for bits, share in shares.items())
        raise SettingsError(
            f"bit-mix: {mix!r} leaves width {empty[0]} without a client among {num_partitions}; "
            f"use more clients (--federation-config num-supernodes=N) or a larger share"
        )
    return [bits for bits, count in counts.items() for _ in range(count)]
