"""Secure aggregation: the exact sum of integer vectors, and no vector, shown to the server.

Integers and bytes in, integers and bytes out; independent of Flower.
"""

from privacy.aggregation import GroupAggregation
from privacy.device import Device, Parts
from privacy.errors import MessageError, NotEnoughError, UnmaskingError
from privacy.messages import (
    HANDED_BYTES,
    SEALED_BYTES,
    Complaints,
    PublicKeys,
    Revealed,
    Shares,
    pack_by_number,
    roster_from_bytes,
    roster_to_bytes,
    unpack_by_number,
)
from privacy.words import MOST_BITS, packed_size

__all__ = [
    "HANDED_BYTES",
    "MOST_BITS",
    "SEALED_BYTES",
    "Complaints",
    "Device",
    "GroupAggregation",
    "MessageError",
    "NotEnoughError",
    "Parts",
    "PublicKeys",
    "Revealed",
    "Shares",
    "UnmaskingError",
    "pack_by_number",
    "packed_size",
    "roster_from_bytes",
    "roster_to_bytes",
    "unpack_by_number",
]
