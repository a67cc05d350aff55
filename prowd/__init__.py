"""prowd for other programs: ``from prowd import ProWD, prepare, quantize_state``.

The packages behind it have names that other projects may use too (`task`, `strategies`).
From the import of this one on they are prowd's own, which lie beside this folder, whatever stands
first on ``sys.path``. Names are imported when they are first used: with torch and Flower that takes
seconds.
"""

import importlib
import sys
import tomllib
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client_app import *  # noqa: F403
    from core.errors import SettingsError as SettingsError
    from core.options import Options as Options
    from core.settings import Settings as Settings
    from exchange.protocol import Declaration as Declaration
    from exchange.protocol import Instruction as Instruction
    from exchange.protocol import Report as Report
    from quant import *  # noqa: F403
    from strategies import *  # noqa: F403
    from task.data.dataset import load_dataset as load_dataset

_HOME = Path(__file__).resolve().parents[1]
_OWN = (
    "core",
    "quant",
    "privacy",
    "task",
    "exchange",
    "strategies",
    "client_app",
    "server_app",
)
# Those whose `__all__` is public here, what imports least first; and single names of others.
_WHOLE = ("quant", "strategies", "client_app")
_SINGLE = {
    "Declaration": "exchange.protocol",
    "Instruction": "exchange.protocol",
    "Options": "core.options",
    "Report": "exchange.protocol",
    "Settings": "core.settings",
    "SettingsError": "core.errors",
    "load_dataset": "task.data.dataset",
}


class _OwnFirst(MetaPathFinder):
    """Finds prowd's own packages beside this one, before anything on ``sys.path``."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, [str(_HOME)], target) if fullname in _OWN else None


def _refuse_others() -> None:
    """Refuse another project's module under the name of one of prowd's own.

    Raises
    ------
    ImportError
        If one is imported already.
    """
    for name in _OWN:
        module = sys.modules.get(name)
        if module is None:
            continue
        places = [*getattr(module, "__path__", ()), getattr(module, "__file__", None) or ""]
        if not any(Path(place).resolve().is_relative_to(_HOME / name) for place in places if place):
            raise ImportError(
                f"prowd: {name!r} is {places[-1] or places[0]}, and prowd's own is {_HOME / name}; "
                "import prowd before it, or give that module another name"
            )


_refuse_others()
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__qualname__ != _OwnFirst.__qualname__]
sys.meta_path.insert(0, _OwnFirst())


def _version() -> str:
    try:
        return version("prowd")
    except PackageNotFoundError:  # A checkout that is on the path and not installed.
        project = tomllib.loads((_HOME / "pyproject.toml").read_text())["project"]
        return str(project["version"])


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name == "__all__":
        return __dir__()
    if name in _SINGLE:
        return getattr(importlib.import_module(_SINGLE[name]), name)
    if not name.startswith("_"):
        for package in _WHOLE:
            module = importlib.import_module(package)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module 'prowd' has no attribute {name!r}")


def __dir__() -> list[str]:
    whole = (importlib.import_module(package).__all__ for package in _WHOLE)
    return sorted({*_SINGLE, *(name for names in whole for name in names)})
