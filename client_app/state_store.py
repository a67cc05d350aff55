"""State store: what a client keeps between messages, in its ``Context.state`` and on its disk.

``Context.state`` lives in memory. A run that is resumed after a crash needs what it held, to
the bit, and it is too large and too private to travel. So each client writes it to a folder as
well: one file a round, of which two stay, since the server may resume from before the last round.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from logging import WARNING
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor

from core.errors import SettingsError
from core.files import failing_by_name, printable, reason, write_atomic
from core.tensor_files import read_tensors, to_bytes

_MODEL, _SCALES = "own-model", "own-scales"
_ENDING = ".safetensors"
# What a kill within `write_atomic` leaves.
_TORN = f"{_ENDING}.part"


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
    arrays = state.array_records
    return from_record(arrays[_MODEL]), from_record(arrays[_SCALES])


def state_folder(node_config: Mapping[str, object], keep_in: str) -> Path | None:
    """Return where this client's state of this run is kept on disk; None: in memory only.

    Every run has a folder of its own in ``state-dir``. A node is not told that a run has ended, or
    will not be resumed, so it deletes none: its owner may, of runs that are over.

    Parameters
    ----------
    node_config : mapping
        A networked node may have a ``state-dir`` of its own.
    keep_in : str
        `Instruction.keep_in`: in simulation a folder, as the server's disk is the client's.

    Raises
    ------
    SettingsError
        If ``state-dir`` is not an absolute path, or `keep_in` names no run.
    """
    own = node_config.get("state-dir")
    if own is not None and not (
        isinstance(own, str) and Path(own).is_absolute() and "\0" not in own
    ):
        raise SettingsError(f"node-config: state-dir is {own!r}; it must be an absolute path")
    if own is not None:
        _refuse_impossible(own)
    if not keep_in or (own is None and "bits" in node_config):
        return None
    name = Path(keep_in).name
    if not name.isalnum():
        raise SettingsError(f"keep_in is {keep_in!r}; its last part must be letters and digits")
    if own is None and not Path(keep_in).is_absolute():
        return None
    folder = Path(own) / name if own else Path(keep_in)
    return folder / str(node_config.get("partition-id", "device"))


def _refuse_impossible(folder: str) -> None:
    """Refuse a folder that can neither be there nor be made, as one of too long a name."""
    with failing_by_name("node-config: state-dir", folder, "used"), suppress(FileNotFoundError):
        os.lstat(folder)


def store(state: RecordDict, folder: Path | None, server_round: int) -> None:
    """Write what is kept after a round to disk, and drop all but this round and the one before."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{key}/{name}": array.numpy()
        for key, record in state.array_records.items()
        for name, array in record.items()
    }
    names = {key: list(record) for key, record in state.array_records.items()}
    values = {key: dict(record) for key, record in state.config_records.items()}
    data = to_bytes({"names": names, "values": values}, arrays)
    write_atomic(_file(folder, server_round), data)
    rounds = _rounds(folder)
    earlier = [r for r in rounds if r < server_round]
    for other in rounds:
        if other not in (server_round, *earlier[-1:]):
            _file(folder, other).unlink()
    for torn in _rounds(folder, _TORN):
        _file(folder, torn, _TORN).unlink()


def recall(state: RecordDict, folder: Path | None, before: int) -> None:
    """Fill an empty ``Context.state`` with what was kept before a round, if anything was.

    A damaged file counts as lost: what is older would be of another round.
    """
    if folder is None or state:
        return
    earlier = [r for r in _rounds(folder) if r < before]
    if not earlier:
        return
    path = _file(folder, earlier[-1])
    try:
        state.update(_read(path))
    except (OSError, KeyError, TypeError, ValueError) as error:
        what = printable(path), reason(error)
        log(WARNING, "prowd: %s is damaged and counts as lost: %s", *what)


def _read(path: Path) -> RecordDict:
    kept = RecordDict()
    head, tensors = read_tensors(path)
    for key, names in head["names"].items():
        kept[key] = to_record({name: tensors[f"{key}/{name}"] for name in names})
    for key, values in head["values"].items():
        kept[key] = ConfigRecord(values)
    return kept


def _file(folder: Path, server_round: int, ending: str = _ENDING) -> Path:
    return folder / f"{server_round}{ending}"


def _rounds(folder: Path, ending: str = _ENDING) -> list[int]:
    """Return the rounds that have a file; other files in the folder are ignored."""
    stems = {path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")}
    return sorted(int(stem) for stem in stems if stem.isdecimal() and stem == str(int(stem)))
