"""What passes between server and devices for secure aggregation, and the grid it is about.

Beside the ordinary message to train there are four more a round, each a type of its own: a device
shows its keys, shares its secrets with the others, says whose shares it cannot open, and reveals
after the round what unmasks the sum (`privacy.device`). The functions here turn Flower's records
into the values of `privacy` and back.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from torch import Tensor

from exchange.protocol import ProtocolError
from privacy import (
    HANDED_BYTES,
    PublicKeys,
    pack_by_number,
    roster_from_bytes,
    unpack_by_number,
)

SECURE, SCALES, STEPS = "secure", "scales", "steps"
KEYS = f"{MessageType.TRAIN}.keys"
SHARES = f"{MessageType.TRAIN}.shares"
OPEN = f"{MessageType.TRAIN}.open"
REVEAL = f"{MessageType.TRAIN}.reveal"


@dataclass(frozen=True)
class SumPlan:
    """What a device is told of the sum that it is to add to.

    Attributes
    ----------
    weight : int
        What its integers are multiplied by.
    widths : tuple of tuple of int
        Count and bits of each part of the vector (`privacy.sum_grid.sum_widths`).
    bits, float_bits : int
        Of the codes, 32 where there are none, and of what travels in fixed point.
    without : list of int
        Peers that shared their secrets and take no part in the masking.
    clip, noise_multiplier : float
        Of differential privacy (`privacy.noisy_grid`); 0: without.
    devices : int
        The fewest whose sum is unmasked.
    """

    weight: int
    widths: tuple[tuple[int, int], ...]
    bits: int
    float_bits: int
    without: list[int]
    clip: float = 0.0
    noise_multiplier: float = 0.0
    devices: int = 0

    def to_record(self) -> ConfigRecord:
        """Return it as a record of Flower's."""
        return ConfigRecord(
            {
                "weight": self.weight,
                "widths": [number for part in self.widths for number in part],
                "bits": self.bits,
                "float-bits": self.float_bits,
                "without": self.without,
                "clip": self.clip,
                "noise-multiplier": self.noise_multiplier,
                "devices": self.devices,
            }
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "SumPlan":
        """Read it.

        Raises
        ------
        ProtocolError, MessageError
            If something is missing, or of another type or length.
        """
        names = ("weight", "bits", "float-bits")
        weight, bits, float_bits = (_whole(record, key, 1, 255) for key in names)
        flat = _list(record, "widths", int)
        if len(flat) != 4 or min(flat) < 0:
            raise ProtocolError("secure: widths are not as agreed")
        widths = ((flat[0], flat[1]), (flat[2], flat[3]))
        without = _list(record, "without", int)
        devices = _whole(record, "devices", 0)
        clip, noise = _number(record, "clip"), _number(record, "noise-multiplier")
        return cls(weight, widths, bits, float_bits, without, clip, noise, devices)


def keys_wanted(context: bytes) -> RecordDict:
    """Ask a device for the public keys of a round."""
    return RecordDict({SECURE: ConfigRecord({"context": context})})


def context_in(message: Message) -> bytes:
    """Return what names the round and the group in a message of the first step."""
    return _bytes(record_in(message), "context")


def shares_wanted(number: int, roster: bytes, threshold: int) -> RecordDict:
    """Show a device its group (`privacy.roster_to_bytes`), and ask for shares of its secrets."""
    record = ConfigRecord({"number": number, "threshold": threshold, "roster": roster})
    return RecordDict({SECURE: record})


def roster_in(message: Message) -> tuple[int, dict[int, PublicKeys], int]:
    """Return a device's own number, the group by number, and the threshold."""
    record = record_in(message)
    roster = roster_from_bytes(_bytes(record, "roster"))
    return _whole(record, "number", 0), roster, _whole(record, "threshold", 1)


def opening_wanted(handed: Mapping[int, bytes]) -> RecordDict:
    """Hand a device the shares of its peers, and ask whose it cannot open."""
    return RecordDict({SECURE: ConfigRecord({"handed": pack_by_number(handed)})})


def handed_in(message: Message) -> dict[int, bytes]:
    """Return the shares for a device, by sender."""
    return unpack_by_number(_bytes(record_in(message), "handed"), HANDED_BYTES)


def reveal_wanted(answered: Collection[int], dropped: Collection[int]) -> RecordDict:
    """Say whose masks are to be taken out of the sum."""
    record = ConfigRecord({"answered": sorted(answered), "dropped": sorted(dropped)})
    return RecordDict({SECURE: record})


def reveal_in(message: Message) -> tuple[list[int], list[int]]:
    """Return the devices that answered, and those that dropped out."""
    record = record_in(message)
    return _list(record, "answered", int), _list(record, "dropped", int)


def answer_secure(message: Message, record: Mapping[str, Any]) -> Message:
    """Answer one of the steps with what `privacy.device` makes."""
    return Message(RecordDict({SECURE: ConfigRecord(dict(record))}), reply_to=message)


def record_in(message: Message) -> ConfigRecord:
    """Return the record of a step.

    Raises
    ------
    ProtocolError
        If the message has none.
    """
    record = message.content.get(SECURE)
    if not isinstance(record, ConfigRecord):
        raise ProtocolError("secure: the message holds no record of secure aggregation")
    return record


def scales_record(scales: Mapping[str, Tensor]) -> ArrayRecord:
    """Return the scales of the group's grid as a record."""
    return ArrayRecord({name: Array(scale.numpy()) for name, scale in scales.items()})


def scales_in(message: Message, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Return the scales of the group's grid.

    Raises
    ------
    ProtocolError
        If one is not positive, or of another shape than the model's channels.
    """
    scales = {}
    for name, array in message.content.array_records[SCALES].items():
        scale = torch.from_numpy(array.numpy().copy())
        if scale.dtype != torch.float32 or list(scale.shape) != list(shapes.get(name, ())[:1]):
            raise ProtocolError(f"secure: the scale of {name} is {scale.dtype} {list(scale.shape)}")
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ProtocolError(f"secure: the scale of {name} is not positive")
        scales[name] = scale
    return scales


def steps_in(message: Message, names: Collection[str]) -> dict[str, float]:
    """Return the fixed-point steps of a group whose devices have several starts; empty of others.

    Raises
    ------
    ProtocolError
        If one is not positive, or they are not those of the model's tensors.
    """
    record = message.content.get(STEPS)
    steps = dict(record) if isinstance(record, ConfigRecord) else {}
    if steps and set(steps) != set(names):
        raise ProtocolError("secure: the steps are not of the model's tensors")
    if odd := [name for name in steps if not _number(steps, name) > 0]:
        raise ProtocolError(f"secure: the step of {odd[0]} is not positive")
    return {name: _number(steps, name) for name in steps}


def _list(record: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = record.get(key)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise ProtocolError(f"secure: {key} is no list of {kind.__name__}")
    return values


def _whole(record: Mapping[str, Any], key: str, least: int, most: int = 2**31) -> int:
    value = record.get(key)
    if type(value) is not int or not least <= value <= most:
        raise ProtocolError(f"secure: {key} is {value!r}; allowed: {least} to {most}")
    return value


def _number(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    if not isinstance(value, float) or not 0 <= value < inf:
        raise ProtocolError(f"secure: {key} is {value!r}; allowed: a number from 0")
    return value


def _bytes(record: Mapping[str, Any], key: str) -> bytes:
    value = record.get(key)
    if type(value) is not bytes:
        raise ProtocolError(f"secure: {key} is no bytes")
    return value
