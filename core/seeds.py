"""Independent random streams from the run's one seed."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


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
    # What a model draws by itself: as teacher and student, in the evaluation, and where unlabelled
    # images pass through it.
    DISTILLATION = 9
    EVALUATION = 10
    CALIBRATION = 11
    # Of what a client sends in a round: the server draws the same.
    DITHER = 12
    # Below a client's seed of a round: of what it sums in fixed point.
    FIXED_POINT = 13


class DataStream(IntEnum):
    """What is drawn of a run's data, for `data_generator`."""

    PARTITION = 1
    LOCAL_TEST = 2
    LOCAL_ORDER = 3
    SERVER_SAMPLE = 4


def data_generator(seed: int, stream: DataStream) -> np.random.Generator:
    """Return what draws the order of data, or a part of it: the same for all rounds."""
    return np.random.default_rng([seed, stream])


def derive_seed(seed: int, *path: int) -> int:
    """Return a 63-bit seed for one purpose, given by a path of non-negative integers.

    Different paths give independent streams; the same path gives the same seed on every machine.
    """
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0] >> 1)


def client_seed(seed: int, server_round: int, number: int) -> int:
    """Return what a client's random numbers of a round are drawn under; the server knows it too."""
    return derive_seed(seed, Stream.CLIENT, server_round, number)


def difference_noise(client_seed: int) -> torch.Generator:
    """Return what draws the noise that a client's difference of a round is rounded with."""
    return torch.Generator().manual_seed(derive_seed(client_seed, Stream.DIFFERENCE))


def seed_torch(seed: int, device: torch.device | None = None) -> None:
    """Seed what torch draws from on the CPU and on a device, if that is a GPU.

    `torch.manual_seed` asks every kind of device there is and takes a thousand times as long, which
    is as long as a small client takes for a step.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized() or (device is not None and device.type == "cuda"):
        torch.cuda.manual_seed_all(seed)


@contextmanager
def drawn_under(seed: int, *path: int) -> Iterator[None]:
    """Let a model draw random numbers under `derive_seed`; torch's generators stay untouched."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        seed_torch(derive_seed(seed, *path))
        yield
