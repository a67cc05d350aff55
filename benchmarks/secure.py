"""Secure aggregation of a million weights against the same round in the clear: bits, time, memory.

Devices answer by the ClientApp's own functions, and the server runs its own round; nothing trains,
and each device has its update at hand. What a small epoch takes is measured beside it. All devices
compute in turn in one process, so that the seconds are those of work, not of a network.
"""

import ctypes
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common import ndarray_to_bytes
from flwr.common.logger import FLOWER_LOGGER
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from torch import Tensor

from benchmarks.grid import AnsweringGrid, run_round, weights_of
from benchmarks.measure import Figure, report
from client_app.secure import (
    answer_masked,
    is_secure,
    open_shares,
    reveal_shares,
    share_secrets,
    show_keys,
)
from exchange.protocol import DECLARATION, REPORT, UPDATE, Declaration, Report, model_in, to_array
from exchange.secure import KEYS, OPEN, REVEAL, SHARES, SumPlan, record_in, scales_in
from exchange.states import to_arrays
from privacy import packed_size
from privacy.sum_grid import LARGEST_WEIGHT, SumGrid, sum_widths
from quant import FLOAT_BITS, Update, UpdateSpec, encode, quantize_state
from strategies import FedAvg, StrategyContext
from task.data.dataset import Images
from task.hyperparameters import LocalTraining
from task.models import build_model
from task.training import train

_LAYERS = 46  # a weight and a bias each: a million values
_WIDTHS, _COUNTS, _REPEATS = (4, FLOAT_BITS), (20, 100), 3
_FLOAT_BITS = 20
_IMAGES = 600
# The third is the goal for what grows with the square of the devices; all that is added is less.
_LARGER, _SLOWER, _MORE = 1.02, 1.5, 1.0
# Flower's SecAgg+ by its defaults: its clipping range, its levels, and its modulus.
_CLIP, _LEVELS, _MODULUS = 8.0, 2**22, 2**32
_M_MMAP_THRESHOLD = -3

State = dict[str, Tensor]


@dataclass
class Seconds:
    """What a round took.

    Attributes
    ----------
    server : float
        All that the server did.
    devices : dict of int to float
        All that each device did, by node.
    """

    server: float = 0.0
    devices: dict[int, float] = field(default_factory=dict)

    @property
    def device(self) -> float:
        """Of one device, on average."""
        return mean(self.devices.values())

    def with_training(self, epoch: float) -> float:
        """Return seconds from the round's begin to its end, with all devices at once."""
        return epoch + self.device + self.server


class Fleet(AnsweringGrid):
    """Devices of one width, each with its update at hand.

    Parameters
    ----------
    model : mapping of str to Tensor
        What the round begins with; every device moves it a little, all alike.
    bits, count : int
        Width and number of devices.
    drops : bool
        Whether one of them fails when it is asked for its masked update.
    around : callable
        Gets a device's work, and does it: where it is measured.
    """

    def __init__(
        self,
        model: State,
        bits: int,
        count: int,
        drops: bool = False,
        around: Callable[[Callable[[], Message]], Message] = lambda work: work(),
    ) -> None:
        declarations = {i + 1: Declaration(i, count, bits, 10, "") for i in range(count)}
        super().__init__(declarations, lambda client: RecordDict())
        self.spec = UpdateSpec.of(model, weights_of(model))
        self.seconds: dict[int, float] = {}
        self.drops = drops
        self._bits, self._around = bits, around
        self._contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in declarations}
        generator = torch.Generator().manual_seed(1)
        self._moved = {
            n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in model.items()
        }
        self._update: Update | None = None

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Let the devices answer, one at a time."""
        for message_id in message_ids:
            message = self._pushed.pop(message_id)
            node = message.metadata.dst_node_id
            began = time.perf_counter()
            reply = self._around(partial(self._reply, message))
            self.seconds[node] = self.seconds.get(node, 0.0) + time.perf_counter() - began
            yield reply

    def _reply(self, message: Message) -> Message:
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        steps = {KEYS: show_keys, SHARES: share_secrets, OPEN: open_shares, REVEAL: reveal_shares}
        if kind in steps:
            return steps[kind](message, self._contexts[node])
        if kind == "query":
            record = ConfigRecord(self._declarations[node].to_record())
            return Message(RecordDict({DECLARATION: record}), reply_to=message)
        if self.drops and node == 1:
            return Message(Error(code=2, reason="out of power"), reply_to=message)
        return self._trained(message, self._contexts[node])

    def _trained(self, message: Message, context: Context) -> Message:
        sent = model_in(message, self.spec)
        assert sent is not None, "the model is sent in every round"
        received = sent.dequantize()
        numbers = Report(server_round=1, num_examples=10, loss=1.0, accuracy=0.5, seconds=1.0)
        if not is_secure(message):
            assert self._update is not None, "made by the secure round before"
            content = RecordDict({REPORT: MetricRecord(numbers.to_record())})
            content[UPDATE] = ArrayRecord({UPDATE: to_array(encode(self._update, stamp=1))})
            return Message(content, reply_to=message)
        plan = SumPlan.from_record(record_in(message))
        scales = scales_in(message, self.spec.shapes)
        if self._update is None:
            self._update = quantize_state(self._moved, self._bits, scales)
        grid = SumGrid(self.spec, plan.bits, scales, received, plan.float_bits)
        return answer_masked(message, context, numbers, self._update, grid, seed=context.node_id)


def main() -> None:
    """Print the tables, the figures and, as the last line, JSON."""
    # That one drops out is no news.
    FLOWER_LOGGER.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    model = _model()
    figures = _bytes(model) + _rounds(model)
    _memory(model)
    print()
    report("secure", figures)


def _model() -> State:
    generator = torch.Generator().manual_seed(0)
    model = {}
    for layer in range(_LAYERS):
        model[f"{layer}.weight"] = torch.randn(48, 50, 3, 3, generator=generator)
        model[f"{layer}.bias"] = torch.randn(48, generator=generator)
    return model


def _bytes(model: State) -> list[Figure]:
    """Bits a weight of masked updates, by devices and weights, and Flower's."""
    spec = UpdateSpec.of(model, weights_of(model))
    values = sum(tensor.numel() for tensor in model.values())
    figures = []
    print("| devices | weights | width | m | bits a weight | plain | SecAgg+ modulus, sent |")
    print("| --- " * 7 + "|")
    theirs = f"32, {8 * flowers_bytes(model) / values:.1f}"
    for count, weight, bits in product(_COUNTS, (1, LARGEST_WEIGHT), _WIDTHS):
        parts = sum_widths(spec, bits, _FLOAT_BITS, count * weight)
        m = parts[bits == FLOAT_BITS][1]
        masked = sum(packed_size(number, width) for number, width in parts)
        plain, weighting = plain_bytes(model, bits), "equal" if weight == 1 else "8 bits"
        of_masked, of_plain = (f"{8 * size / values:.2f}" for size in (masked, plain))
        print(f"| {count} | {weighting} | {bits} | {m} | {of_masked} | {of_plain} | {theirs} |")
        label = f"bytes, {bits}-bit, {count} devices, weights {weighting}, of m/k plain"
        figures.append(Figure(label, masked / (plain * m / bits), _LARGER))
    return figures


def plain_bytes(model: State, bits: int) -> int:
    """Return the bytes of a packed update in the clear."""
    scales = {n: model[n].abs().flatten(1).amax(1) for n in weights_of(model)}
    return len(encode(quantize_state(model, bits, scales if bits != FLOAT_BITS else {})))


def flowers_bytes(model: State) -> int:
    """Return what a device of Flower's SecAgg+ sends of this model, by Flower's own functions."""
    arrays = [tensor.numpy().astype(np.float64) for tensor in model.values()]
    mask = pseudo_rand_gen(b"seed", _MODULUS, [array.shape for array in arrays])
    masked = parameters_mod(parameters_addition(quantize(arrays, _CLIP, _LEVELS), mask), _MODULUS)
    return sum(len(ndarray_to_bytes(array)) for array in masked)


def one_round(fleet: Fleet, arrays: ArrayRecord, secure: bool) -> Seconds:
    """Run a round of FedAvg, in the clear or with secure aggregation."""
    context = StrategyContext(
        quantized=fleet.spec.quantized(2), secure_aggregation=secure, secure_float_bits=_FLOAT_BITS
    )
    strategy, fleet.seconds = FedAvg(context=context), {}
    began = time.perf_counter()
    run_round(strategy, arrays, fleet)
    total = time.perf_counter() - began
    left_out = strategy.round_log.left_out
    assert len(left_out) == fleet.drops, left_out
    return Seconds(total - sum(fleet.seconds.values()), fleet.seconds)


def _rounds(model: State) -> list[Figure]:
    arrays, figures = to_arrays(model), []
    epochs = {bits: epoch_seconds(bits) for bits in _WIDTHS}
    for bits, seconds in epochs.items():
        print(f"\nAn epoch of {_IMAGES} images, resnet20, {bits}-bit: {seconds:.2f} s", end="")
    print("\n\n| devices | width | drops | a device | in the clear | server | in the clear |")
    print("| --- " * 7 + "|")
    for count, bits, drops in product(_COUNTS, _WIDTHS, (False, True)):
        turns = _turns(model, arrays, bits, count, drops)
        secure, clear = (_median([turn[kind] for turn in turns]) for kind in (0, 1))
        four = (secure.device, clear.device, secure.server, clear.server)
        cells = [str(count), str(bits), str(int(drops)), *(f"{s:.3f}" for s in four)]
        print(f"| {' | '.join(cells)} |")
        label = f"{bits}-bit, {count} devices" + (", one drops" if drops else "")
        figures.append(_ratio(f"round with training, {label}", turns, epochs[bits]))
        if count == _COUNTS[-1]:
            more = [s.device - c.device for s, c in turns]
            figures.append(Figure(f"seconds more of a device, {label}", median(more), _MORE))
    return figures


def _turns(
    model: State, arrays: ArrayRecord, bits: int, count: int, drops: bool
) -> list[tuple[Seconds, Seconds]]:
    """Run rounds with secure aggregation and in the clear in turns."""
    fleet = Fleet(model, bits, count, drops)
    first = one_round(fleet, arrays, True), one_round(fleet, arrays, False)
    if count > _COUNTS[0]:
        return [first]
    return [
        (one_round(fleet, arrays, True), one_round(fleet, arrays, False)) for _ in range(_REPEATS)
    ]


def _median(turns: list[Seconds]) -> Seconds:
    return Seconds(median(t.server for t in turns), {0: median(t.device for t in turns)})


def _ratio(label: str, turns: list[tuple[Seconds, Seconds]], epoch: float) -> Figure:
    ratios = [s.with_training(epoch) / c.with_training(epoch) for s, c in turns]
    return Figure(label, median(ratios), _SLOWER, max(ratios) - min(ratios), len(ratios))


def epoch_seconds(bits: int, images: int = _IMAGES) -> float:
    """Return the seconds of a device's small epoch."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3, 32, 32)).astype(np.uint8)
    data = Images(pixels, rng.integers(0, 10, images))
    network = build_model("resnet20", 3, 32, 10, seed=0)
    began = time.perf_counter()
    train(network, data, LocalTraining(bits), seed=0)
    return time.perf_counter() - began


def _memory(model: State) -> None:
    """Peaks beside what was held before the round, in models of float32; none has a goal."""
    size = sum(4 * tensor.numel() for tensor in model.values())
    print(f"\n| devices | width | round | a device's peak | server's | models of {size:,} bytes |")
    print("| --- " * 6 + "|")
    for count, bits, secure in product(_COUNTS, _WIDTHS, (True, False)):
        # A process each, with memory of its own.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            device, server = pool.apply(peaks, (model, bits, count, secure))
        name = "secure" if secure else "in the clear"
        numbers = f"{device / 2**20:.1f} MiB | {server / 2**20:.1f} MiB"
        models = f"{device / size:.1f}, {server / size:.1f}"
        print(f"| {count} | {bits} | {name} | {numbers} | {models} |")


def peaks(model: State, bits: int, count: int, secure: bool) -> tuple[int, int]:
    """Return what a device holds at most while it answers, and the server between its answers."""
    # Large blocks go back to the system when they are free: what is held is what is resident.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(1)
    device, server, base = [0], [0], [0]

    def around(work: Callable[[], Message]) -> Message:
        server.append(_resident("VmHWM") - base[0])
        before = _peak_begins()
        reply = work()
        device.append(_resident("VmHWM") - before)
        _peak_begins()
        return reply

    fleet = Fleet(model, bits, count, around=around)
    arrays = to_arrays(model)
    one_round(fleet, arrays, True)  # the update is made, and all is imported
    if not secure:
        one_round(fleet, arrays, False)
    device.clear()
    server.clear()
    base[0] = _peak_begins()
    one_round(fleet, arrays, secure)
    server.append(_resident("VmHWM") - base[0])
    return max(device), max(server)


def _peak_begins() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
