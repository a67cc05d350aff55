"""Gradient tracking: the correction that a FedCOMGATE client keeps from round to round.

Algorithm 2 of Haddadpour et al. (2021, arXiv:2007.01154), per client ``j``::

    local step        w <- w - eta (g - delta_j)
    sent              D_j = Q((w_r - w_j) / eta)
    server            D = mean of D_j,   w_{r+1} = w_r - eta gamma D
    correction        delta_j <- delta_j + (D_j - D) / tau

The client needs ``D`` for its correction. It has kept ``w_r``; with the next model it knows
``eta D = (w_r - w_{r+1}) / gamma``, so that the server's average difference reaches it inside the
model and the downlink stays one model.

Two things are more general than in the paper. With momentum ``m`` a constant gradient moves the
weights by ``eta A g`` in ``tau`` steps, ``A = sum of (1 - m^i) / (1 - m), i = 1..tau``; ``A``,
which is ``tau`` without momentum, takes its place. And where clients hold different numbers of
images, the mean is weighted by them and ``A`` is that of the client with the most steps, for all:
then the corrections, weighted alike, sum to zero, and the fixed point is the optimum of the
weighted loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from client_app.state_store import from_record, to_record
from exchange.protocol import Instruction

_ROUND = "tracking-round"
_RECEIVED, _SENT, _CORRECTION = "tracking-received", "tracking-sent", "tracking-correction"


def effective_steps(steps: int, momentum: float) -> float:
    """Return by how many plain SGD steps heavy-ball SGD moves under a constant gradient."""
    if momentum == 0:
        return float(steps)
    # The sum of (1 - m^i) / (1 - m) in closed form: `steps` comes from outside, and may be huge.
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


@dataclass(frozen=True)
class TrackedRound:
    """What a client keeps of a round: the parameters' correction, the model and what it sent.

    Attributes
    ----------
    epoch, server_round : int
        Of the instruction.
    learning_rate : float
        ``eta``.
    correction, received, sent : mapping of str to Tensor
        ``delta_j`` (empty if there was none), ``w_r``, and the dequantized ``-eta D_j``.
    """

    epoch: int
    server_round: int
    learning_rate: float
    correction: Mapping[str, Tensor]
    received: Mapping[str, Tensor]
    sent: Mapping[str, Tensor]

    def keep(self, state: RecordDict) -> None:
        """Write this round into the client's ``Context.state``."""
        state[_RECEIVED] = to_record(self.received)
        state[_SENT] = to_record(self.sent)
        state[_CORRECTION] = to_record(self.correction)
        state[_ROUND] = ConfigRecord(
            {
                "epoch": self.epoch,
                "server-round": self.server_round,
                "learning-rate": float(self.learning_rate),
            }
        )


def next_correction(
    state: RecordDict, received: Mapping[str, Tensor], instruction: Instruction, momentum: float
) -> dict[str, Tensor]:
    """Return this round's correction from what the client kept of the last.

    Parameters
    ----------
    state : RecordDict
        The client's ``Context.state``.
    received : mapping of str to Tensor
        Float32 model of this round.
    instruction : Instruction
        Of this round.
    momentum : float
        Of local SGD.

    Returns
    -------
    dict of str to Tensor
        ``delta_j`` by parameter; empty if nothing was kept of the round before in this epoch: the
        client starts clean.
    """
    if _ROUND not in state:
        return {}
    kept: Mapping[str, Any] = state.config_records[_ROUND]
    current = (instruction.tracking_epoch, instruction.server_round - 1)
    if (kept["epoch"], kept["server-round"]) != current:
        return {}
    arrays = state.array_records
    delta, sent = from_record(arrays[_CORRECTION]), from_record(arrays[_SENT])
    before = from_record(arrays[_RECEIVED])
    rate = kept["learning-rate"] * effective_steps(instruction.tracking_steps, momentum)
    for name in sent:
        average = (received[name] - before[name]) / instruction.server_learning_rate
        step = (average - sent[name]) / rate
        delta[name] = delta[name] + step if name in delta else step
    return delta
