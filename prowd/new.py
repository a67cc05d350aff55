"""`prowd new`: a task of one's own to begin with, which runs at once in simulation."""

import keyword
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from core.errors import SettingsError
from core.files import printable
from core.reference import PACKAGES

_TEMPLATE = '''"""A task: what is learned, from which data. Run it with

    flwr run . --stream --run-config 'task="{name}:{kind}"'
"""

import torch
from torch import nn

from task import Node, Task


class {kind}(Task):
    """Replace data and model by yours; what is not written here has defaults that work."""

    def model(self, seed):
        """Return a new network; it must have the same weights under the same seed."""
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))

    def train_data(self, node: Node):
        """Return the examples of one device: tensors of inputs and targets, or a torch Dataset.

        On a real device `node.data_path` is what its node-config says; in simulation this is part
        `node.partition_id` of `node.num_partitions`.
        """
        return made_up(200, seed=node.partition_id)

    def test_data(self):
        """Return held-out examples on the server; without this, devices evaluate on their own."""
        return made_up(500, seed=1000)

    def server_inputs(self):
        """Return unlabelled inputs, with which the server calibrates low-bit models."""
        return made_up(64, seed=1001)[0]

    # def loss(self, outputs, targets): ...     the default is the cross-entropy
    # def metrics(self, outputs, targets): ...  the default is the accuracy


def made_up(count, seed):
    """Points in 8 dimensions, of which the sum of the first two decides the class."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 8, generator=generator)
    return points, (points[:, 0] + points[:, 1] > 0).long()
'''


def new_task(name: str, folder: Path) -> Iterator[str]:
    """Write a task into a module, and let the app send it.

    Parameters
    ----------
    name : str
        Of the module, as ``my_task``.
    folder : Path
        Of prowd's checkout, from which the app is run.

    Yields
    ------
    str
        What was written, and how it is run.

    Raises
    ------
    SettingsError
        If that is no name of a module, is taken, or the folder is no checkout.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or not name.islower():
        raise SettingsError(f"NAME: {name!r} is no module's name; allowed: as in my_task")
    project, file = folder / "pyproject.toml", folder / f"{name}.py"
    if file.exists():
        raise SettingsError(f"NAME: {printable(file)} exists already; allowed: another name")
    kind = "".join(word.capitalize() for word in name.split("_")) or name
    if keyword.iskeyword(kind) or (name not in PACKAGES and find_spec(name) is not None):
        raise SettingsError(f"NAME: {name!r} is taken in Python; allowed: another name")
    if name in PACKAGES:
        raise SettingsError(f"NAME: {name!r} is a package of prowd's own; allowed: another name")
    settings = project.read_text() if project.is_file() else ""
    if "\nfab-include = [\n" not in settings:
        raise SettingsError(f"{printable(folder)} is no checkout of prowd; allowed: run it in one")
    file.write_text(_TEMPLATE.format(name=name, kind=kind))
    yield str(file)
    line = f'    "{name}.py",\n'
    if line not in settings:
        before, after = settings.split("\nfab-include = [\n", 1)
        project.write_text(f"{before}\nfab-include = [\n{line}{after}")
        yield f"{project}: {name}.py is sent with the app (fab-include)"
    yield f"""flwr run . --stream --run-config 'task="{name}:{kind}"'"""
