"""Mutated payloads against the decoder: rejected with `UpdateError` or a sane update, nothing else.

The test suite runs 40,000 (tests/quant/codec/test_fuzz.py). A million, from the project's root::

    python -m tests.fuzz --count 1000000

A failure prints the seed and the payload that caused it.
"""

import argparse
import resource
import struct
import time
import tracemalloc
from collections import Counter
from itertools import product

import numpy as np
import torch
from specs import difference_of, spec_of_state, to_bits
from xxhash import xxh3_64_intdigest

from quant import (
    UpdateError,
    decode,
    encode,
    largest_code,
)

# Where the layout in quant/codec/encode.py puts the fields of the header.
CODING, TABLE_BYTES, CHECKSUM, TABLE = 7, 8, 12, 20
WIDTHS = (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 32)
SHAPES = (
    {"conv.weight": (3, 2, 2, 2), "conv.bias": (3,), "bn.running_var": (3,), "fc.weight": (5, 3)},
    {"w": (1, 1)},
    {"b": (4,), "s": ()},
    {"empty.weight": (0, 3), "none": (0,), "w": (2, 9)},
    # Large enough that coded codes are shorter.
    {"w": (6, 40), "b": (2,)},
)
# Every so many payloads, memory is measured: it makes decoding several times slower.
_MEASURED = 20
# Each payload is below 1 kB; what a decoder may take besides has nothing to do with its claims.
MOST_BYTES = 200_000
MOST_GROWTH = 50_000_000
_EXTREMES = struct.pack(
    "<12f4I",
    *(0, -0.0, 1e-45, 1e8, 1.1e8, 3e38, -3e38, 1, -1),
    *(np.nan, np.inf, -np.inf),
    0,
    1,
    2**31,
    2**32 - 1,
)


class Target:
    """One model at one width: a good payload, and what the decoder is told to expect."""

    def __init__(self, shapes: dict, bits: int, content: str, coded: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        state = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        self.start = None
        if content == "weights":
            self.start = to_bits({n: t * 0.98 for n, t in state.items()}, bits)
            update = to_bits(state, bits)
        else:
            update = difference_of(state, bits, generator)
        self.bits, self.content = bits, content
        self.spec = spec_of_state(state)
        data = encode(update, coded=coded, start=self.start)
        self.coding = data[CODING]
        self.data = np.frombuffer(data, np.uint8)


def targets() -> list[Target]:
    """Return all of them."""
    contents = ("weights", "difference")
    choices = product(SHAPES, WIDTHS, contents, (False, True))
    return [Target(*choice, seed=0) for choice in choices]


def mutate(data: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> bytes:
    """Alter a payload in one to three ways and, mostly, mend its checksum."""
    new = data.copy()
    for _ in range(rng.integers(1, 4)):
        new = _KINDS[rng.integers(len(_KINDS))](new, other, rng)
    # Else the checksum would reject nearly all, and what comes after it see nothing.
    if len(new) >= TABLE and rng.random() < 0.9:
        checksum = xxh3_64_intdigest(np.delete(new, slice(CHECKSUM, TABLE)))
        new[CHECKSUM:TABLE] = np.frombuffer(struct.pack("<Q", checksum), np.uint8)
    return new.tobytes()


def _flip(new, other, rng):
    if len(new):
        at = rng.integers(len(new), size=rng.integers(1, 5))
        new[at] ^= (1 << rng.integers(8, size=len(at))).astype(np.uint8)
    return new


def _header(new, other, rng):
    if len(new) >= TABLE:
        new[rng.integers(TABLE)] = rng.integers(256)
    return new


def _claim(new, other, rng):
    """A table, a name or a size of up to gigabytes, anywhere in header and table."""
    if len(new) > TABLE_BYTES + 4:
        at = rng.integers(TABLE_BYTES, min(len(new) - 4, TABLE + 60) + 1)
        new[at : at + 4] = np.frombuffer(struct.pack("<I", 2 ** rng.integers(33) - 1), np.uint8)
    return new


def _extreme(new, other, rng):
    """An extreme number where a scale, a float or a code may stand."""
    if len(new) > 4:
        at, pick = rng.integers(len(new) - 3), 4 * rng.integers(len(_EXTREMES) // 4)
        new[at : at + 4] = np.frombuffer(_EXTREMES[pick : pick + 4], np.uint8)
    return new


def _noise(new, other, rng):
    start, end = sorted(rng.integers(len(new) + 1, size=2))
    new[start:end] = rng.integers(256, size=end - start, dtype=np.uint8)
    return new


def _cut(new, other, rng):
    start, end = sorted(rng.integers(len(new) + 1, size=2))
    return np.concatenate([new[:start], new[end:]]) if rng.random() < 0.5 else new[:end].copy()


def _lengthen(new, other, rng):
    at = rng.integers(len(new) + 1)
    extra = rng.integers(256, size=rng.integers(1, 30), dtype=np.uint8)
    return np.concatenate([new[:at], extra, new[at:]])


def _splice(new, other, rng):
    """The head of one payload before the tail of another, of another width or model."""
    at = rng.integers(min(len(new), len(other)) + 1)
    return np.concatenate([new[:at], other[at:]])


def _replace(new, other, rng):
    return other.copy()


# Those that keep the length are likelier: others are rejected before anything is read.
_KINDS = (
    _flip,
    _flip,
    _header,
    _claim,
    _extreme,
    _extreme,
    _noise,
    _cut,
    _lengthen,
    _splice,
    _replace,
)


def check(data: bytes, target: Target) -> bool:
    """Decode; return whether it was accepted.

    Raises
    ------
    AssertionError
        If what was accepted is not of the model's shapes, finite and on its grid.
    """
    bits = target.bits
    try:
        update = decode(data, target.spec, bits, target.content, target.start)
    except UpdateError:
        return False
    assert (update.bits, update.content) == (bits, target.content)
    for tensor in update.quantized.values():
        codes = tensor.codes.numpy().astype(np.int32)
        assert codes.size == 0 or np.abs(codes).max() <= largest_code(bits)
    values = update.dequantize()
    assert {name: tuple(v.shape) for name, v in values.items()} == dict(target.spec.shapes)
    for value in values.values():
        assert np.isfinite(value.numpy()).all()
    return True


def fuzz(count: int, seed: int = 0) -> Counter:
    """Decode so many mutated payloads.

    Returns
    -------
    Counter
        How many were ``accepted`` and ``rejected``; ``peak``, the most bytes that one took of what
        Python and numpy allocate; and ``grown``, by how many bytes the process grew in all.

    Raises
    ------
    AssertionError
        With the payload, if the decoder did anything else than accept or reject.
    """
    rng = np.random.default_rng(seed)
    all_targets = targets()
    seen = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        target, other = (all_targets[i] for i in rng.integers(len(all_targets), size=2))
        data = mutate(target.data, other.data, rng)
        measured = number % _MEASURED == 0
        if measured:
            tracemalloc.start()
        try:
            seen["accepted" if check(data, target) else "rejected"] += 1
        except Exception as error:
            raise AssertionError(
                f"seed {seed}, payload {number}, {target.bits} bits, {target.content} of "
                f"{target.spec.shapes}: {data.hex()}"
            ) from error
        finally:
            if measured:
                seen["peak"] = max(seen["peak"], tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
    seen["grown"] = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return seen


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="payloads")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    seen = fuzz(arguments.count, arguments.seed)
    assert seen["peak"] < MOST_BYTES, seen
    assert seen["grown"] < MOST_GROWTH, seen
    print(
        f"{arguments.count} payloads in {time.monotonic() - began:.0f} s: {seen['rejected']} "
        f"rejected, {seen['accepted']} accepted and sane, at most {seen['peak']} bytes for one"
    )


if __name__ == "__main__":
    main()
