"""Independent random streams from the run's one seed."""

import numpy as np


def derive_seed(seed: int, *path: int) -> int:
    """Return a 63-bit seed for one purpose, given by a path of non-negative integers.

    Different paths give independent streams; the same path gives the same seed on every machine.
    """
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0] >> 1)
