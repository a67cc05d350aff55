"""The checkpoint: after every round, all that the next rounds depend on, in one file.

``checkpoint/last.safetensors`` holds the global model and the strategy's tensors, and in its
metadata, as JSON, the round, the settings and the strategy's other values, beside a checksum of all
that. It is replaced whole, so that one good checkpoint is there at any moment. No generator is
saved: every random number is drawn under a seed derived from the run's seed and the round.
``checkpoint/resume.toml`` holds the settings that resume the run, as ``flwr run --run-config``
reads them.

A client's state (`client_app.state_store`) does not travel: it stays in ``checkpoint/clients`` in
simulation, and in the node's own ``state-dir`` where it is networked. So a checkpoint costs no byte
on the wire but the name of that folder, or of the run.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from core.errors import SettingsError
from core.files import printable, reason, write_atomic
from core.reference import in_one_line
from core.tensor_files import DamagedError, read_tensors, to_bytes
from exchange.states import State
from quant import is_finite
from server_app.folder import writing
from server_app.plain import to_json
from server_app.record import versions

# Raised whenever a run resumed from an older checkpoint would differ from the run that it was.
FORMAT = 6
# Packages of which another version may compute other numbers.
_DECIDING = ("prowd", "torch", "torchvision", "numpy", "flwr", "flwr-datasets")
# Settings that may change on resume: they decide where, how long and with how much patience a run
# goes on, and how often it is looked at, but not what it computes.
MAY_DIFFER = frozenset(
    {
        "num-server-rounds",
        "evaluate-every",
        "round-timeout",
        "min-nodes",
        "node-wait",
        "data-dir",
        "partition-file",
        "output-dir",
        "run-name",
        "resume",
    }
)
_FOLDER, _FILE, _ARGUMENTS = "checkpoint", "last.safetensors", "resume.toml"


@dataclass(frozen=True)
class Identity:
    """What must be the same when a run is resumed.

    The widths of networked nodes are not part of it: a device may be replaced by one of another
    width while a run is going, and so it may before it is resumed.

    Attributes
    ----------
    settings : mapping
        Every setting by its full key.
    versions : mapping
        Of prowd and of the packages that decide what it computes.
    data : str
        Fingerprint of the dataset.
    shapes : mapping
        Shape of each of the model's tensors.
    num_partitions : int
        Partitions of the data.
    client_key : str
        Names the run to the clients that keep something for it.
    """

    settings: Mapping[str, object]
    versions: Mapping[str, str]
    data: str
    shapes: Mapping[str, list[int]]
    num_partitions: int
    client_key: str


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round.

    Attributes
    ----------
    identity : Identity
        Of the run.
    server_round : int
        Rounds done; 0 before the first.
    seconds : float
        Time that they took.
    model : dict of str to Tensor
        The global model.
    tensors, values : dict
        What `MixedPrecisionStrategy.checkpoint` returned.
    """

    identity: Identity
    server_round: int
    seconds: float
    model: State
    tensors: State
    values: Mapping[str, object]

    def refuse_other_versions(self) -> None:
        """Compare the packages with those that are installed now.

        Raises
        ------
        SettingsError
            One line that names all that differs, with both values.
        """
        _refuse_unlike("another version", self.identity.versions, deciding_versions())

    def refuse_other_settings(self, settings: Mapping[str, object]) -> None:
        """Compare the settings with what a run has now.

        Raises
        ------
        SettingsError
            As for `refuse_other_versions`.
        """
        was = self.identity.settings
        keys = (was.keys() | settings.keys()) - MAY_DIFFER
        if was.get("strategy") != settings["strategy"]:
            keys = {"strategy"}  # The others' own settings differ then, without meaning.
        now = {key: settings.get(key) for key in keys}
        _refuse_unlike("another run", {key: was.get(key) for key in keys}, now)

    def refuse_other(self, now: Identity) -> None:
        """Compare what the settings do not show: data, model, federation.

        Raises
        ------
        SettingsError
            As for `refuse_other_versions`.
        """
        _refuse_unlike("another run", _facts(self.identity), _facts(now))


class Checkpoints:
    """Writes the checkpoints of one run.

    Parameters
    ----------
    folder : Path
        The run's.
    identity : Identity
        What every checkpoint of it carries.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder = folder / _FOLDER
        self._identity = identity
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            write_atomic(
                self._folder / _ARGUMENTS, _as_toml({**identity.settings, "resume": str(folder)})
            )

    def write(
        self,
        server_round: int,
        seconds: float,
        model: State,
        tensors: State,
        values: Mapping[str, object],
    ) -> None:
        """Replace the checkpoint.

        Raises
        ------
        SettingsError
            If it cannot be written; the last one stays as it was.
        """
        data = _to_bytes(Checkpoint(self._identity, server_round, seconds, model, tensors, values))
        path = self._folder / _FILE
        with writing(path):
            write_atomic(path, data)


def folder_of_clients(folder: Path, client_key: str) -> str:
    """Return where simulated clients keep what they must; the last part names the run anywhere."""
    return str(folder / _FOLDER / "clients" / client_key)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the checkpoint of a run.

    Raises
    ------
    SettingsError
        If there is none, it is damaged, or of another format.
    """
    path = folder / _FOLDER / _FILE
    named = printable(path)
    try:
        head, kept = read_tensors(path)
        if head["format"] != FORMAT:
            raise SettingsError(
                f"resume: {named} has format {head['format']}; this version reads {FORMAT}"
            )
        # In the order of the run: safetensors keeps its own.
        model = {name: kept[f"model/{name}"] for name in head["model"]}
        tensors = {name: kept[f"strategy/{name}"] for name in head["strategy"]}
        if not all(map(is_finite, model.values())):
            raise SettingsError(f"resume: the model in {named} is not finite")
        identity = Identity(**head["identity"])
        return Checkpoint(identity, head["round"], head["seconds"], model, tensors, head["values"])
    except (FileNotFoundError, NotADirectoryError):
        raise SettingsError(f"resume: there is no checkpoint {named}") from None
    except (OSError, DamagedError, KeyError, TypeError) as error:
        raise SettingsError(
            f"resume: {named} is no checkpoint that can be read: {reason(error)}"
        ) from None


def _facts(identity: Identity) -> dict[str, object]:
    shapes = {f"shape of {name}": shape for name, shape in identity.shapes.items()}
    return {"data": identity.data, "num-partitions": identity.num_partitions, **shapes}


def deciding_versions() -> dict[str, str]:
    """Return the installed versions of the packages that decide what a run computes."""
    installed = versions()
    return {package: installed[package] for package in _DECIDING}


def _refuse_unlike(of: str, was: Mapping[str, object], now: Mapping[str, object]) -> None:
    odd = [
        f"{key} is {now.get(key)!r} and was {was.get(key)!r}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]
    if odd:
        raise SettingsError(f"resume: the checkpoint is of {of}: {'; '.join(odd)}")


def _array(tensor: Tensor, strategy: str, name: str) -> np.ndarray:
    try:
        return tensor.detach().cpu().contiguous().numpy()
    except (AttributeError, RuntimeError, TypeError) as error:
        raise SettingsError(
            f"strategy: the checkpoint of {strategy} has {name}, which cannot be written: "
            f"{in_one_line(error)}"
        ) from None


def _to_bytes(checkpoint: Checkpoint) -> bytes:
    strategy = str(checkpoint.identity.settings.get("strategy", "strategy"))
    head = {
        "format": FORMAT,
        "identity": asdict(checkpoint.identity),
        "round": checkpoint.server_round,
        "seconds": checkpoint.seconds,
        "model": list(checkpoint.model),
        "strategy": list(checkpoint.tensors),
        "values": to_json(checkpoint.values, f"strategy: {strategy}", "checkpoint", as_null=False),
    }
    arrays = {f"model/{n}": t.contiguous().numpy() for n, t in checkpoint.model.items()}
    arrays |= {f"strategy/{n}": _array(t, strategy, n) for n, t in checkpoint.tensors.items()}
    return to_bytes(head, arrays)


def _as_toml(settings: Mapping[str, object]) -> bytes:
    """Write settings as ``flwr run --run-config FILE`` reads them."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    return ("\n".join(lines) + "\n").encode()
