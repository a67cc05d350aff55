"""What the payloads of a trace say, opened at the widths that they ought to have."""

from collections.abc import Mapping

import numpy as np
import torch
from matrix.running import Exchange, Trace
from torch import Tensor

from quant import Update, UpdateSpec, decode

Values = dict[str, np.ndarray]


def sent_to(trace: Trace, exchange: Exchange) -> Update | None:
    """Open the model that a client was sent, at the width that the cell asks for."""
    if exchange.sent is None:
        return None
    spec = UpdateSpec.of(trace.starts[exchange.instruction.server_round], trace.cell.on_grid)
    return decode(exchange.sent, spec, trace.cell.downlink_bits(exchange.partition))


def returned_by(trace: Trace, exchange: Exchange) -> Update | None:
    """Open the update that a client sent, at the width that it was asked for."""
    if exchange.returned is None:
        return None
    bits, asked = trace.cell.uplink_bits(exchange.partition), exchange.instruction
    server_round = asked.server_round
    spec = UpdateSpec.of(trace.starts[server_round], trace.cell.on_grid)
    start = sent_to(trace, exchange)
    return decode(exchange.returned, spec, bits, asked.uplink, start, server_round, asked.dither)


def float64(state: Mapping[str, Tensor]) -> Values:
    """Return tensors as arrays in which their sums are exact for all that is compared here."""
    return {name: tensor.to(torch.float64).numpy() for name, tensor in state.items()}
