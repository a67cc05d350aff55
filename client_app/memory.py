"""What a client keeps in its ``Context.state`` from one message to the next."""

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

_MODEL, _SCALES = "own-model", "own-scales"


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Turn tensors into a record, one array each."""
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """Turn a record back into tensors of their own memory."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def keep_model(
    state: RecordDict, model: Mapping[str, Tensor], scales: Mapping[str, Tensor]
) -> None:
    """Keep a model that is not sent, and the scales of the grid that it was trained on."""
    state[_MODEL], state[_SCALES] = to_record(model), to_record(scales)


def has_model(state: RecordDict) -> bool:
    """Return whether a model was kept; it is gone after a restart."""
    return _MODEL in state


def own_model(state: RecordDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model that was kept, and its scales."""
    return from_record(state[_MODEL]), from_record(state[_SCALES])
