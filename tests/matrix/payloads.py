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
    """Open the update that a client sent, at its own width."""
    if exchange.returned is None:
        return None
    bits, server_round = trace.cell.widths[exchange.partition], exchange.instruction.server_round
    sent = sent_to(trace, exchange)
    start = sent if sent is not None and sent.bits == bits else None
    spec = UpdateSpec.of(trace.starts[server_round], trace.cell.on_grid)
    content = exchange.instruction.uplink
    return decode(exchange.returned, spec, bits, content, start, server_round)


def float64(state: Mapping[str, Tensor]) -> Values:
    """Return tensors as arrays in which their sums are exact for all that is compared here."""
    return {name: tensor.to(torch.float64).numpy() for name, tensor in state.items()}
