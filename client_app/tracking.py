"""Gradient tracking: the correction that a FedCOMGATE client keeps from round to round.

Algorithm 2 of Haddadpour et al. (2021, arXiv:2007.01154), per client ``j``::

    local step        w <- w - eta (g - delta_j)
    sent              D_j = Q((w_r - w_j) / eta)
    server            D = mean of D_j,   w_{r+1} = w_r - eta gamma D
    correction        delta_j <- delta_j + (D_j - D) / tau

The client needs ``D`` for its correction. It has kept ``w_r``; with the next model it knows
``eta D = (w_r - w_{r+1}) / gamma``, so that the server's average difference reaches it inside the
model and the downlink stays one model. With momentum ``m`` a constant gradient moves the weights
by ``eta A g`` in ``tau`` steps, ``A = sum of (1 - m^i) / (1 - m), i = 1..tau``; ``A`` takes the
place of ``tau``, which it equals without momentum.
"""

from collections.abc import Mapping

from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from client_app.memory import from_record, to_record

_ROUND = "tracking-round"
_RECEIVED, _SENT, _CORRECTION = "tracking-received", "tracking-sent", "tracking-correction"


def effective_steps(steps: int, momentum: float) -> float:
    """Return by how many plain SGD steps heavy-ball SGD moves under a constant gradient."""
    if momentum == 0:
        return float(steps)
    return sum((1 - momentum**i) / (1 - momentum) for i in range(1, steps + 1))


def correction(
    state: RecordDict, received: Mapping[str, Tensor], server_round: int, server_lr: float
) -> dict[str, Tensor]:
    """Return this round's correction from what the client kept.

    Parameters
    ----------
    state : RecordDict
        The client's ``Context.state``.
    received : mapping of str to Tensor
        Float32 model of this round.
    server_round : int
        This round.
    server_lr : float
        ``gamma``.

    Returns
    -------
    dict of str to Tensor
        ``delta_j`` by parameter; empty for a client that keeps nothing, in its first round or
        after it lost its state.
    """
    if _ROUND not in state:
        return {}
    kept = state[_ROUND]
    delta = from_record(state[_CORRECTION])
    if kept["server-round"] != server_round - 1:
        # It took no part in the last round, so the last average did not contain its difference.
        return delta
    before, sent = from_record(state[_RECEIVED]), from_record(state[_SENT])
    rate = kept["learning-rate"] * kept["effective-steps"]
    for name in sent:
        average = (received[name] - before[name]) / server_lr
        step = (average - sent[name]) / rate
        delta[name] = delta[name] + step if name in delta else step
    return delta


def remember(
    state: RecordDict,
    delta: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    sent: Mapping[str, Tensor],
    server_round: int,
    learning_rate: float,
    steps: float,
) -> None:
    """Keep what the next round's correction is made from, all of it or nothing.

    Parameters
    ----------
    state : RecordDict
        The client's ``Context.state``.
    delta, received, sent : mapping of str to Tensor
        This round's correction, model, and dequantized difference, of the trained parameters.
    server_round : int
        This round.
    learning_rate : float
        ``eta`` of this round.
    steps : float
        Effective steps of this round.
    """
    new = {_RECEIVED: to_record(received), _SENT: to_record(sent), _CORRECTION: to_record(delta)}
    kept = {
        "server-round": server_round,
        "learning-rate": float(learning_rate),
        "effective-steps": float(steps),
    }
    for key, record in {**new, _ROUND: ConfigRecord(kept)}.items():
        state[key] = record
