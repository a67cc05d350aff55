"""What a strategy asks of a client, made complete before it is sent; what cannot be, is refused."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import get_args

from flwr.app import ConfigRecord, Message

from core.errors import SettingsError
from exchange.protocol import BY_BROADCAST, CONFIG, Instruction, ProtocolError, Uplink
from quant import FLOAT_BITS, MAX_BITS, MIN_BITS, is_width

_ALLOWED = f"0, {MIN_BITS} to {MAX_BITS}, and {FLOAT_BITS}"


def completed(instruction: Instruction, by_broadcast: int, owner: str) -> Instruction:
    """Return an instruction with the width of its downlink put in.

    Parameters
    ----------
    instruction : Instruction
        From `MixedPrecisionStrategy.instruct`.
    by_broadcast : int
        Width of the downlink where the instruction names none.
    owner : str
        Class that it is from, for the errors.

    Raises
    ------
    SettingsError
        If it asks for what there is not.
    """
    asks = f"{owner}.instruct asks for"
    if not isinstance(instruction, Instruction):
        raise SettingsError(f"strategy: {owner}.instruct returns no Instruction: {instruction!r}")
    downlink = instruction.downlink_bits
    if downlink == BY_BROADCAST:
        downlink = by_broadcast
    for key, bits in (("downlink-bits", downlink), ("uplink-bits", instruction.uplink_bits)):
        if type(bits) is not int or (bits and not is_width(bits)):
            raise SettingsError(f"{key}: {asks} {bits!r}; allowed: {_ALLOWED}")
    if instruction.uplink not in get_args(Uplink):
        allowed = ", ".join(get_args(Uplink))
        raise SettingsError(f"uplink: {asks} {instruction.uplink!r}; allowed: {allowed}")
    try:
        Instruction.from_record(instruction.to_record())
    except ProtocolError as error:
        raise SettingsError(f"strategy: {asks} what cannot be sent: {error}") from None
    if instruction.tracking_epoch and downlink != FLOAT_BITS:
        raise SettingsError(
            f"downlink-bits: {asks} {downlink} beside tracking, whose corrections need the exact "
            f"model; allowed: {FLOAT_BITS}"
        )
    return replace(instruction, downlink_bits=downlink)


def with_config(messages: Iterable[Message], config: Mapping | None) -> list[Message]:
    """Add to messages what Flower's `start` was given for the clients, if anything was."""
    messages = list(messages)
    if config:
        for message in messages:
            # A record each: a client in this process may change its own.
            message.content[CONFIG] = ConfigRecord(dict(config))
    return messages
