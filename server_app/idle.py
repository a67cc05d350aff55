"""Settings that were changed and can have no effect, to be reported to the user."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from core.files import user_path
from core.mix import parse_mix
from core.options import Idle, IdleWith
from core.settings import Settings
from quant import FLOAT_BITS
from strategies import STRATEGIES
from task.calibration import has_statistics
from task.tasks import TASKS

# What has an effect only where another setting is not as named here; the strategies' own options
# declare it themselves (`IdleWith`, `Idle`).
_NEEDS = {
    "dirichlet-alpha": ("partitioner", ("iid", "file")),
    "data-dir": ("dataset", ("digits",)),
    "integer-learning-rate": ("low-bit-training", ("qat", "strict")),
    "upload": ("low-bit-training", ("strict",)),
}
# What the other built-in tasks do not look at; one of the user's own may.
_OF_IMAGES = frozenset(
    {
        *("dataset", "image-size", "image-channels", "classes", "model", "partitioner"),
        *("partition-file", "dirichlet-alpha"),
    }
)
# What describes the devices' images where the server has none.
_OF_DEVICES = ("classes", "image-channels")
# What has none where all clients are Float32.
_OF_LOW_BITS = frozenset(
    {
        *("low-bit-training", "weight-step", "activation-bits", "gradient-bits", "broadcast"),
        *("lossless-coding", "integer-learning-rate", "upload"),
    }
)


def idle_settings(run_config: Mapping[str, object], simulated: bool = True) -> list[str]:
    """Return a line for every setting that differs from its default and has no effect.

    Flower fills a run's configuration up with the defaults, so that no more than that can be seen
    of what a user gave.

    Parameters
    ----------
    run_config : mapping
        That is valid (`server_app.build.read_settings`).
    simulated : bool
        Whether the clients have the widths of ``bit-mix``, and not their own.
    """
    defaults, own = Settings().to_settings(), _own_options()
    for name, kind in STRATEGIES.items():
        defaults |= kind.Options().to_settings(f"{name}-")
    given = {**defaults, **run_config}
    strategy = str(given["strategy"])
    chosen = strategy.partition(":")[0]
    lines = []
    for key, default in sorted(defaults.items()):
        one = own.get(key, _Option(chosen))
        if one.owner != chosen:
            why = f"strategy={strategy}"
        else:
            why = _why_idle(key, one, given, simulated)
        without_buffer = Idle.NO_BUFFER in one.marks and not given["server-buffer"]
        if why and given[key] != default:
            lines.append(f"{key}: {given[key]!r} has no effect with {why}")
        elif not why and without_buffer:  # Also where it is left at its default.
            lines.append(f"{key}: {given[key]!r} has no effect with server-buffer=0")
    return lines


@dataclass(frozen=True)
class _Option:
    """The strategy of a setting, and where its field declares it idle."""

    owner: str
    marks: tuple[object, ...] = ()


def _own_options() -> dict[str, _Option]:
    """Return the options of all registered strategies by full key."""
    return {
        f"{name}-{field.alias}": _Option(name, tuple(field.metadata))
        for name, kind in STRATEGIES.items()
        for field in kind.Options.model_fields.values()
    }


def _why_idle(key: str, one: _Option, given: Mapping[str, object], simulated: bool) -> str:
    """Return the setting with which another has no effect; empty if it has one."""
    needed: str
    idle_at: tuple[object, ...]
    needed, idle_at = _NEEDS.get(key, ("", ()))
    if needed == "dataset" and given["task"] != "images":
        needed = ""
    for mark in one.marks:
        if isinstance(mark, IdleWith):
            needed, idle_at = f"{one.owner}-{mark.key}", (mark.value,)
    if needed and given[needed] in idle_at:
        return f"{needed}={given[needed]}"
    if key in _OF_IMAGES and given["task"] != "images" and given["task"] in TASKS:
        return f"task={given['task']}"
    if key in _OF_DEVICES and given["task"] == "images":
        if given["dataset"] != "image-folder":
            return f"dataset={given['dataset']}"
        if given["data-dir"]:
            return f"data-dir={given['data-dir']}"
    strategy = str(given["strategy"])
    # Of a class of the user's own nothing is known.
    known = STRATEGIES.get(strategy.partition(":")[0])
    idle = {} if known is None else known.idle
    if key in idle and given["broadcast"] in (idle[key] or (given["broadcast"],)):
        # A resumed run was told its device, whatever the user gave.
        told = key == "server-device" and given["resume"]
        return "" if told else f"strategy={strategy}"
    if key == "bit-mix" and not simulated:
        return "networked nodes, which declare their own"
    # A strategy of the user's own may send what it likes at any width.
    if simulated and known is not None:
        widths = parse_mix(str(given["bit-mix"])).keys()
        of_low_bits = key in _OF_LOW_BITS or Idle.ALL_FLOAT32 in one.marks
        # With it Float32 clients train their weights over alpha.
        of_low_bits &= (key, given[key]) != ("low-bit-training", "integer")
        only_float = of_low_bits and widths == {FLOAT_BITS}
        if key == "lossless-coding":  # A difference may have a width of its own.
            only_float &= given.get(f"{given['strategy']}-bits", 0) in (0, FLOAT_BITS)
        if only_float or (Idle.ONE_WIDTH in one.marks and len(widths) == 1):
            return f"bit-mix={given['bit-mix']}"
    if given["resume"] and key in ("run-name", "output-dir"):
        folder = user_path("resume", str(given["resume"]))
        here = folder.parent if key == "output-dir" else Path(folder.name)
        if user_path(key, str(given[key])) != here:
            return "resume, which continues that run's record"
    return ""


def idle_with_model(settings: Settings, model: nn.Module) -> list[str]:
    """Return the same lines of what a model makes idle."""
    if settings.calibrate_normalization or has_statistics(model):
        return []
    return [
        f"calibrate-normalization: False has no effect with model={settings.model_name}, which "
        "has no BatchNorm"
    ]
