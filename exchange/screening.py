"""Updates set aside before they are combined: those far too large, and malformed ones."""

from collections.abc import MutableMapping

from exchange.decoding import decode_in_turn
from exchange.norms import all_small, norms_of, scale_of, too_large
from exchange.replies import Packed
from exchange.round_plan import Asked


def usable(
    asked: Asked, packed: list[Packed], bound: float, rejected: MutableMapping[int, str]
) -> list[Packed]:
    """Return the replies that are not far too large (`exchange.norms`).

    Parameters
    ----------
    asked : Asked
        What they are held against.
    packed : list of Packed
        The replies.
    bound : float
        Of the strategy; 0 lets everything pass.
    rejected : mutable mapping of int to str
        Is told of those that are left out: partition and reason.
    """
    sent = scale_of(asked.start)
    if not bound or all_small((asked.norms_at_most(item) for item in packed), sent, bound):
        return packed
    # Seldom: the norms themselves are needed, for which everything is unpacked once more.
    norms = {
        item.client.partition_id: norms_of(update.dequantize())
        for item, update in decode_in_turn(asked, packed, rejected)
    }
    large = too_large(norms, sent, bound)
    rejected.update(large)
    return [i for i in packed if i.client.partition_id in norms.keys() - large.keys()]
