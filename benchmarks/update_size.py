"""Bytes of a client's update against ``k / 32`` of the float32 update."""

from benchmarks.measure import Figure, report
from quant import UpdateSpec, encode_update, payload_size, quantize_state
from task.models import build_model
from task.training import model_state

_MODELS = (("resnet18", 3, 32), ("resnet20", 3, 32), ("resnet8", 1, 28), ("cnn", 1, 28))
_WIDTHS = (2, 3, 4, 8, 16)
_LARGE, _GOAL = 1_000_000, 1.05


def main() -> None:
    """Print the table and, as the last line, JSON."""
    figures = []
    print("| model | values | " + " | ".join(f"{k}-bit" for k in _WIDTHS) + " |")
    print("| --- " * (2 + len(_WIDTHS)) + "|")
    for name, channels, size in _MODELS:
        state = model_state(build_model(name, channels, size, 10, seed=0))
        count = sum(t.numel() for t in state.values())
        full = payload_size(UpdateSpec.of(state), 32)
        cells = []
        for bits in _WIDTHS:
            ratio = len(encode_update(quantize_state(state, bits))) / (full * bits / 32)
            cells.append(f"{ratio:.3f}")
            if count > _LARGE:
                figures.append(Figure(f"{name}, {bits}-bit, of {bits}/32", ratio, _GOAL))
        print(f"| {name} | {count:,} | " + " | ".join(cells) + " |")
    print()
    report("bytes", figures)
