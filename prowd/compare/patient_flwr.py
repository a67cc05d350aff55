"""Flower's `flwr` with more patience for the local SuperLink that it starts.

It ends a SuperLink that is not up after 15 seconds, and starts a second one where the first does
not answer in 0.4: a loaded machine misses both.
"""

import sys

from flwr.cli import local_superlink
from flwr.cli.app import app

_SECONDS = {"LOCAL_SUPERLINK_STARTUP_TIMEOUT": 180.0, "CONTROL_API_PROBE_TIMEOUT": 10.0}


def be_patient() -> None:
    """Set what Flower has as constants.

    Raises
    ------
    RuntimeError
        If this version of Flower has others.
    """
    reads = (local_superlink._start_local_superlink, local_superlink._is_local_superlink_started)
    names = {name for function in reads for name in function.__code__.co_names}
    if missing := sorted(set(_SECONDS) - names):
        raise RuntimeError(f"flwr no longer waits for its local SuperLink by {', '.join(missing)}")
    vars(local_superlink).update(_SECONDS)


if __name__ == "__main__":
    be_patient()
    sys.exit(app())
