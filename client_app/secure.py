"""A client's side of secure aggregation: what it keeps from step to step, and its masked update."""

from logging import WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.common.logger import log

from core.errors import SettingsError
from core.seeds import Stream, derive_seed
from exchange.protocol import UPDATE, Report, answer, to_array
from exchange.secure import (
    SECURE,
    SumPlan,
    answer_secure,
    context_in,
    handed_in,
    record_in,
    reveal_in,
    roster_in,
)
from privacy import Complaints, Device
from privacy.noisy_grid import NoisyGrid
from privacy.sum_grid import SumGrid
from quant import Update

# In `Context.state`, which Flower keeps in memory: never on disk, as the secrets of a round are
# worthless after it.
_KEPT = "secure-device"


def show_keys(message: Message, context: Context) -> Message:
    """Make fresh secrets for a round, and show their public keys."""
    device = Device.begin(context_in(message))
    _keep(context, device)
    return answer_secure(message, device.public_keys().to_record())


def share_secrets(message: Message, context: Context) -> Message:
    """Share the secrets with the group."""
    device = _kept(context)
    shares = device.share(*roster_in(message))
    _keep(context, device)
    return answer_secure(message, shares.to_record())


def open_shares(message: Message, context: Context) -> Message:
    """Open the shares of the others, and say whose do not open."""
    device = _kept(context)
    unopened = device.receive(handed_in(message))
    for reason in unopened.values():
        log(WARNING, "prowd: %s", reason)
    _keep(context, device)
    return answer_secure(message, Complaints(frozenset(unopened)).to_record())


def reveal_shares(message: Message, context: Context) -> Message:
    """Reveal what unmasks the sum of the group, and forget all."""
    device = _kept(context)
    revealed = device.reveal(*reveal_in(message))
    del context.state[_KEPT]
    return answer_secure(message, revealed.to_record())


def is_secure(message: Message) -> bool:
    """Return whether a message to train asks for a masked update."""
    return SECURE in message.content


def answer_masked(
    message: Message,
    context: Context,
    report: Report,
    update: Update,
    grid: SumGrid | NoisyGrid,
    seed: int,
) -> Message:
    """Answer a message to train with the update under its masks.

    Parameters
    ----------
    message, context
        Of Flower.
    report : Report
        The client's numbers, which are not masked.
    update : Update
        What it would send in the clear.
    grid : SumGrid or NoisyGrid
        The group's.
    seed : int
        The client's of this round, for the rounding to fixed point.
    """
    plan, device = SumPlan.from_record(record_in(message)), _kept(context)
    rng = np.random.default_rng(derive_seed(seed, Stream.FIXED_POINT))
    parts = grid.integers(update, plan.weight, rng)
    if any(part.size != count for part, (count, _) in zip(parts, plan.widths, strict=True)):
        raise SettingsError("model: this device's is not the server's: another number of weights")
    vector = [(part, m) for part, (_, m) in zip(parts, plan.widths, strict=True)]
    payload = device.mask(vector, plan.without)
    # It masks once: two vectors under one mask would show their difference.
    _keep(context, device)
    reply = answer(message, report)
    reply.content[UPDATE] = ArrayRecord({UPDATE: to_array(payload)})
    return reply


def _keep(context: Context, device: Device) -> None:
    context.state[_KEPT] = ConfigRecord({"device": device.to_bytes()})


def _kept(context: Context) -> Device:
    record = context.state.get(_KEPT)
    if not isinstance(record, ConfigRecord):
        raise RuntimeError("this client has no keys of this round; it was restarted within it")
    data = record["device"]
    assert isinstance(data, bytes)
    return Device.from_bytes(data)
