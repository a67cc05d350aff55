"""Settings that were changed and can have no effect, which a user would else not hear of."""

from collections.abc import Mapping

from strategies import STRATEGIES
from task.options import Options
from task.settings import Settings

# What has an effect only where another setting is not as named here.
_NEEDS = {
    "dirichlet-alpha": ("partitioner", ("iid", "file")),
    "data-dir": ("dataset", ("digits",)),
    "prowd-finetune-steps": ("prowd-finetune-every", (0,)),
    "prowd-finetune-learning-rate": ("prowd-finetune-every", (0,)),
    "prowd-distill-weight": ("prowd-finetune-every", (0,)),
    "prowd-mask": ("prowd-mask-at-least", (1,)),
}


def idle_settings(run_config: Mapping[str, object]) -> list[str]:
    """Return a line for every setting that differs from its default and has no effect.

    Flower fills a run's configuration up with the defaults, so that no more than that can be told
    of what a user gave.

    Parameters
    ----------
    run_config : mapping
        That is valid (`server_app.build.read_settings`).
    """
    defaults = Settings().to_settings()
    owners: dict[str, str] = {}
    for name, kind in STRATEGIES.items():
        own = getattr(kind, "Options", Options)().to_settings(f"{name}-")
        defaults |= own
        owners |= dict.fromkeys(own, name)
    given = {**defaults, **run_config}
    strategy = str(given["strategy"])
    lines = []
    for key in sorted(key for key in defaults if given[key] != defaults[key]):
        needed, idle_at = _NEEDS.get(key, ("strategy", ()))
        if owners.get(key, strategy) not in (strategy, strategy.partition(":")[0]):
            lines.append(f"{key}: {given[key]!r} has no effect with strategy={strategy}")
        elif given[needed] in idle_at:
            lines.append(f"{key}: {given[key]!r} has no effect with {needed}={given[needed]}")
    return lines
