"""Settings that were changed and can have no effect, which a user would else not hear of."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from core.files import user_path
from core.mix import parse_mix
from core.settings import Settings
from quant import FLOAT_BITS
from strategies import STRATEGIES
from task.calibration import has_statistics

# What has an effect only where another setting is not as named here.
_NEEDS = {
    "dirichlet-alpha": ("partitioner", ("iid", "file")),
    "data-dir": ("dataset", ("digits",)),
    "prowd-ladder": ("prowd-finetune-every", (0,)),
    "prowd-dequantize": ("prowd-finetune-every", (0,)),
    "prowd-finetune-steps": ("prowd-finetune-every", (0,)),
    "prowd-finetune-learning-rate": ("prowd-finetune-every", (0,)),
    "prowd-distill-weight": ("prowd-finetune-every", (0,)),
    "prowd-mask": ("prowd-mask-at-least", (1,)),
    # Local training sends no update.
    "norm-bound": ("strategy", ("local",)),
}
# What has none in local training, where the server evaluates no model and is sent none, with one of
# these broadcasts.
_IDLE_IN_LOCAL = {
    "server-device": ("auto", "float32", "nearest"),
    "lossless-coding": ("auto", "float32"),
}
# What has none where all clients are Float32,
_OF_LOW_BITS = frozenset(
    {
        *("low-bit-training", "weight-step", "activation-bits", "gradient-bits", "broadcast"),
        *("prowd-reference", "prowd-ladder", "prowd-dequantize", "lossless-coding"),
    }
)
# and where all are of one width.
_OF_SEVERAL_WIDTHS = frozenset(
    {
        *("prowd-align", "prowd-own-normalization", "prowd-low-bit-weight", "prowd-finetune-every"),
        *("prowd-mask", "prowd-mask-at-most", "prowd-mask-at-least"),
    }
)


def idle_settings(run_config: Mapping[str, object], simulated: bool = True) -> list[str]:
    """Return a line for every setting that differs from its default and has no effect.

    Flower fills a run's configuration up with the defaults, so that no more than that can be told
    of what a user gave.

    Parameters
    ----------
    run_config : mapping
        That is valid (`server_app.build.read_settings`).
    simulated : bool
        Whether the clients have the widths of ``bit-mix``, and not their own.
    """
    defaults = Settings().to_settings()
    owners: dict[str, str] = {}
    for name, kind in STRATEGIES.items():
        own = kind.Options().to_settings(f"{name}-")
        defaults |= own
        owners |= dict.fromkeys(own, name)
    given = {**defaults, **run_config}
    strategy = str(given["strategy"])
    lines = []
    for key in sorted(key for key in defaults if given[key] != defaults[key]):
        foreign = owners.get(key, strategy) not in (strategy, strategy.partition(":")[0])
        if why := f"strategy={strategy}" if foreign else _why_idle(key, given, simulated):
            lines.append(f"{key}: {given[key]!r} has no effect with {why}")
    if strategy == "prowd" and given["prowd-finetune-every"] and not given["server-buffer"]:
        weight = given["prowd-distill-weight"]
        lines.append(f"prowd-distill-weight: {weight!r} has no effect with server-buffer=0")
    return lines


def _why_idle(key: str, given: Mapping[str, object], simulated: bool) -> str:
    """Return the setting with which another has no effect; empty if it has one."""
    needed, idle_at = _NEEDS.get(key, ("", ()))
    if needed and given[needed] in idle_at:
        return f"{needed}={given[needed]}"
    # What goes on was told which device it is on, whatever the user gave.
    told = key == "server-device" and given["resume"]
    if given["strategy"] == "local" and given["broadcast"] in _IDLE_IN_LOCAL.get(key, ()):
        return "" if told else "strategy=local"
    if key == "bit-mix" and not simulated:
        return "networked nodes, which declare their own"
    # A strategy of the user's own may send what it likes at any width.
    if simulated and str(given["strategy"]).partition(":")[0] in STRATEGIES:
        widths = parse_mix(str(given["bit-mix"])).keys()
        only_float = key in _OF_LOW_BITS and widths == {FLOAT_BITS}
        if key == "lossless-coding":  # A difference may have a width of its own.
            only_float &= given.get(f"{given['strategy']}-bits", 0) in (0, FLOAT_BITS)
        if only_float or (key in _OF_SEVERAL_WIDTHS and len(widths) == 1):
            return f"bit-mix={given['bit-mix']}"
    if given["resume"] and key in ("run-name", "output-dir"):
        folder = user_path("resume", str(given["resume"]))
        here = folder.parent if key == "output-dir" else Path(folder.name)
        if user_path(key, str(given[key])) != here:
            return "resume, which goes on with that run's record"
    return ""


def idle_with_model(settings: Settings, model: nn.Module) -> list[str]:
    """Return the same lines of what a model makes idle."""
    if settings.calibrate_normalization or has_statistics(model):
        return []
    return [
        f"calibrate-normalization: False has no effect with model={settings.model}, which has no "
        "BatchNorm"
    ]
