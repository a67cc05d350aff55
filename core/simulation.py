"""Whether a client runs in Flower's simulation, where all share one machine."""

import sys


def in_simulation() -> bool:
    """Return whether Flower's simulation engine runs this client: then it is in an actor of Ray's.

    The server does not ask here, but its grid (`exchange.undocumented.is_simulated`): it may be
    there before Ray is. A device's own program that uses Ray is not one of its actors.
    """
    # Not imported: a networked device need not have it, and pays a second for it at every message.
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    return ray.get_runtime_context().get_actor_id() is not None
