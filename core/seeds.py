"""Independent random streams from the run's one seed."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are drawn for: the first step of a path below a seed."""

    SAMPLING = 2
    DEQUANTIZER = 3
    FINE_TUNING = 4
    CLIENT = 5
    # Below a client's seed of a round, beside its dropout and the order of its images.
    DIFFERENCE = 6
    MASK = 7
    ROUNDING = 8


def derive_seed(seed: int, *path: int) -> int:
    """Return a 63-bit seed for one purpose, given by a path of non-negative integers.

    Different paths give independent streams; the same path gives the same seed on every machine.
    """
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0] >> 1)
