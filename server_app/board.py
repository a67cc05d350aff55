"""The figures of the rounds in TensorBoard: scalars, and histograms of weights."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# TensorBoard keeps a scalar as a float32.
_MOST = 3.4e38


class Board:
    """TensorBoard's file of one run.

    Parameters
    ----------
    folder : Path
        Made with the first round.
    resumed_after : int, optional
        Rounds that are done; the reader drops what was shown of later ones, as they come again.
    """

    def __init__(self, folder: Path, resumed_after: int | None) -> None:
        self._folder = folder
        self._again = None if resumed_after is None else resumed_after + 1
        self._writer: Any = None  # Made with the first round.

    def add_round(
        self,
        entry: Mapping[str, Any],
        weights: Mapping[str, Any],
        totals: Mapping[str, float],
    ) -> None:
        """Add every number of a round and its totals, and every histogram of `weights` if any."""
        if self._writer is None:
            # Here, because its import takes seconds that a refused run need not wait for.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._again)
        step = entry["round"]
        for tag, value in (*_leaves(entry), *totals.items()):
            # An integer may be larger than any float.
            if tag != "round" and isinstance(value, (int, float)) and abs(value) <= _MOST:
                self._writer.add_scalar(tag, value, step)
        for tag, counts in _leaves(weights.get("counts", {}), "weights/"):
            histogram = _as_histogram(counts, weights["reach"])
            self._writer.add_histogram_raw(tag, **histogram, global_step=step)
        self._writer.flush()

    def close(self) -> None:
        """Let go of the file."""
        if self._writer is not None:
            # On a full disk it fails once more, which would hide what ended the run.
            with suppress(OSError):
                self._writer.close()


def _leaves(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _as_histogram(counts: list[int], reach: float) -> dict[str, object]:
    """Return TensorBoard's form of the numbers in bins of one width from -reach to reach."""
    width = 2 * reach / len(counts)
    middles = [(i + 0.5) * width - reach for i in range(len(counts))]
    return {
        "min": -reach,
        "max": reach,
        "num": sum(counts),
        "sum": sum(n * x for n, x in zip(counts, middles, strict=True)),
        "sum_squares": sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        "bucket_limits": [x + width / 2 for x in middles],
        "bucket_counts": counts,
    }
