"""Whether an app runs in Flower's simulation, where all share one machine."""

import sys


def in_simulation() -> bool:
    """Return whether Flower's simulation engine runs this app: then this process is Ray's.

    On the server it holds once a node has answered, as Ray is started beside it.
    """
    # Not imported: a networked device need not have it, and pays a second for it at every message.
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
