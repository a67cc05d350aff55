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
from strategies import STRATEGIES, MixedPrecisionStrategy
from task.calibration import has_statistics
from task.tasks import TASKS

Given = Mapping[str, object]

# What has an effect only where another setting is not as named here; the strategies' own options
# declare it themselves (`IdleWith`, `Idle`).
_NEEDS = {
    "dirichlet-alpha": ("partitioner", ("iid", "file")),
    "data-dir": ("dataset", ("digits",)),
    "integer-learning-rate": ("low-bit-training", ("qat", "strict")),
    "upload": ("low-bit-training", ("strict",)),
    "dp-delta": ("dp-clip", (0.0,)),
    **dict.fromkeys(
        ("secure-threshold", "secure-min-group", "secure-small-groups", "secure-float-bits"),
        ("secure-aggregation", (False,)),
    ),
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


def _why_idle(key: str, one: _Option, given: Given, simulated: bool) -> str:
    """Return the setting with which another has no effect; empty if it has one."""
    if key == "bit-mix" and not simulated:
        return "networked nodes, which declare their own"
    return (
        _by_another(key, one, given)
        or _by_task(key, given)
        or _by_strategy(key, given)
        or _by_masks(key, given)
        or (_by_mix(key, one, given) if simulated else "")
        or _by_resume(key, given)
    )


def _by_another(key: str, one: _Option, given: Given) -> str:
    needed: str
    idle_at: tuple[object, ...]
    needed, idle_at = _NEEDS.get(key, ("", ()))
    if needed == "dataset" and given["task"] != "images":
        needed = ""
    for mark in one.marks:
        if isinstance(mark, IdleWith):
            needed, idle_at = f"{one.owner}-{mark.key}", (mark.value,)
    return f"{needed}={given[needed]}" if needed and given[needed] in idle_at else ""


def _by_task(key: str, given: Given) -> str:
    if key in _OF_IMAGES and given["task"] != "images" and given["task"] in TASKS:
        return f"task={given['task']}"
    if key in _OF_DEVICES and given["task"] == "images":
        if given["dataset"] != "image-folder":
            return f"dataset={given['dataset']}"
        if given["data-dir"]:
            return f"data-dir={given['data-dir']}"
    return ""


def _strategy_of(given: Given) -> type[MixedPrecisionStrategy] | None:
    """Return the registered strategy; of a class of the user's own nothing is known."""
    return STRATEGIES.get(str(given["strategy"]).partition(":")[0])


def _by_strategy(key: str, given: Given) -> str:
    known = _strategy_of(given)
    # A resumed run was told its device, whatever the user gave.
    told = key == "server-device" and given["resume"]
    if known is None or key not in known.idle or told:
        return ""
    broadcasts = known.idle[key]
    return (
        f"strategy={given['strategy']}"
        if given["broadcast"] in broadcasts or not broadcasts
        else ""
    )


def _by_masks(key: str, given: Given) -> str:
    """Masked updates are not coded, codes of a model that is sent are; and a clip is a bound."""
    if key == "norm-bound" and given["dp-clip"] and not given["secure-aggregation"]:
        return f"dp-clip={given['dp-clip']}"
    if key != "lossless-coding" or not given["secure-aggregation"]:
        return ""
    known, broadcast = _strategy_of(given), given["broadcast"]
    if broadcast == "auto" and known is not None:
        has_buffer = bool(given["server-buffer"])
        broadcast = known.preferred_broadcast(str(given["low-bit-training"]), has_buffer)
    return "secure-aggregation and a model in float32" if broadcast == "float32" else ""


def _by_mix(key: str, one: _Option, given: Given) -> str:
    if _strategy_of(given) is None:  # It may send what it likes at any width.
        return ""
    widths = parse_mix(str(given["bit-mix"])).keys()
    of_low_bits = key in _OF_LOW_BITS or Idle.ALL_FLOAT32 in one.marks
    # With it Float32 clients train their weights over alpha.
    of_low_bits &= (key, given[key]) != ("low-bit-training", "integer")
    only_float = of_low_bits and widths == {FLOAT_BITS}
    if key == "lossless-coding":  # A difference may have a width of its own.
        only_float &= given.get(f"{given['strategy']}-bits", 0) in (0, FLOAT_BITS)
    idle = only_float or (Idle.ONE_WIDTH in one.marks and len(widths) == 1)
    return f"bit-mix={given['bit-mix']}" if idle else ""


def _by_resume(key: str, given: Given) -> str:
    if not given["resume"] or key not in ("run-name", "output-dir"):
        return ""
    folder = user_path("resume", str(given["resume"]))
    here = folder.parent if key == "output-dir" else Path(folder.name)
    same = user_path(key, str(given[key])) == here
    return "" if same else "resume, which continues that run's record"


def idle_with_model(settings: Settings, model: nn.Module) -> list[str]:
    """Return the same lines of what a model makes idle."""
    if settings.calibrate_normalization or has_statistics(model):
        return []
    return [
        f"calibrate-normalization: False has no effect with model={settings.model_name}, which "
        "has no BatchNorm"
    ]
