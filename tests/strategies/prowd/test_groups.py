"""What a group started from: on the scales of its updates, and with the dither of each client."""

from dataclasses import replace

import pytest
import torch

from core.seeds import Stream, derive_seed
from exchange.protocol import Declaration, Report
from exchange.replies import ClientUpdate
from quant import fit_scales, quantize_difference, quantize_state, ternary_scales, without_noise
from strategies import ProWD, ProWDOptions, StrategyContext

START = {
    "w": torch.randn(4, 9, generator=torch.Generator().manual_seed(0)),
    "b": torch.zeros(4),
}
MOVED = 0.05 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
PLAIN = ProWDOptions(own_normalization=False)


def strategy(training="qat", upload="dithered", options=PLAIN, **given):
    context = StrategyContext(
        quantized=["w"], low_bit_training=training, upload=upload, broadcast="float32", **given
    )
    return ProWD(options, context)


def item(partition, bits, update, dither=0, examples=10):
    client = Declaration(partition, 9, bits, examples, "")
    return ClientUpdate(client, update, Report(1, examples, 0.1, 0.5, 1.0), dither)


def test_movement_of_dithered_clients_is_measured_from_their_own_starts():
    """Each under its own dither, which hides how far the start lies from the grid."""
    state = {**START, "w": START["w"] + MOVED}
    scales = fit_scales(START, ["w"], 3)
    items, expected, total = [], torch.zeros(4, 9), 0
    for partition, examples in ((0, 10), (1, 30)):
        dither = 5 + partition
        update = quantize_state(state, 3, scales, dither=dither)
        began = quantize_state(START, 3, scales, dither=dither)
        moved = update.dequantize()["w"] - began.dequantize()["w"]
        expected += examples * moved
        total += examples
        items.append(item(partition, 3, update, dither, examples))
    got = strategy().combine(1, START, iter(items))
    torch.testing.assert_close(got["w"], START["w"] + expected / total)


def test_many_dithers_give_the_movement_itself():
    """Which rounding to nearest never does: all of these stay within half a step."""
    scales = {"w": torch.full((4,), 0.9)}
    state = {**START, "w": START["w"].clamp(-2, 2) + MOVED}
    start = {**START, "w": START["w"].clamp(-2, 2)}
    items = [item(i, 4, quantize_state(state, 4, scales, dither=i + 1), i + 1) for i in range(800)]
    got = strategy().combine(1, start, iter(items))
    assert (got["w"] - state["w"]).abs().max() < 5 * (0.25 * 0.9**2 / 800) ** 0.5 * 2**0.5
    nearest = [item(i, 4, quantize_state(state, 4, scales)) for i in range(2)]
    seen = strategy(upload="forward").combine(1, start, iter(nearest))
    assert (seen["w"] - state["w"]).abs().max() > 0.3


@pytest.mark.parametrize("upload", ["forward", "dithered"])
def test_a_qat_client_that_did_not_move_is_not_seen_to_move(upload):
    """Though its scales are fitted anew, and are not those of the start."""
    scales = {"w": fit_scales(START, ["w"], 3)["w"] * 1.07}
    dither = 4 if upload == "dithered" else 0
    update = quantize_state(START, 3, scales, dither=dither)
    got = strategy(upload=upload).combine(1, START, iter([item(0, 3, update, dither)]))
    torch.testing.assert_close(got["w"], START["w"])


def noise_of(partition, server_round=1, seed=0):
    """What a client's difference is rounded with."""
    drawn = derive_seed(
        derive_seed(seed, Stream.CLIENT, server_round, partition), Stream.DIFFERENCE
    )
    return torch.Generator().manual_seed(drawn)


def sent_difference(moved, bits, partition):
    return quantize_difference(moved, bits, noise_of(partition), ["w"])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dequantize", ["group", "client"])
def test_a_difference_loses_the_noise_that_the_server_knows(bits, dequantize):
    """Added to the float32 model, and not to its rounded form."""
    moved = {"w": torch.linspace(-0.1, 0.1, 4 * 9).reshape(4, 9), "b": torch.full((4,), 0.25)}
    updates = [sent_difference(moved, bits, partition) for partition in (0, 1, 2)]
    options = ProWDOptions(own_normalization=False, dequantize=dequantize)
    made = strategy(upload="stored", options=options)
    got = made.combine(1, START, (item(i, bits, update) for i, update in enumerate(updates)))
    torch.testing.assert_close(got["b"], START["b"] + 0.25)
    heard = [without_noise(update, noise_of(i))["w"] for i, update in enumerate(updates)]
    torch.testing.assert_close(got["w"], START["w"] + torch.stack(heard).mean(0))


def test_differences_that_start_on_the_servers_grid_move_its_float_weights():
    """What rounding the broadcast lost is no movement."""
    update = sent_difference({"w": torch.zeros(4, 9), "b": torch.zeros(4)}, 3, 0)
    context = replace(strategy(upload="stored").context, broadcast="nearest")
    got = ProWD(PLAIN, context).combine(1, START, iter([item(0, 3, update)]))
    torch.testing.assert_close(got["w"], START["w"])


@pytest.mark.parametrize(
    ("training", "given", "expected"),
    [
        ("qat", {}, ("difference", "stored")),
        ("qat", {"upload": "forward"}, ("weights", "forward")),
        ("qat", {"secure_aggregation": True}, ("weights", "dithered")),
        ("strict", {}, ("weights", "forward")),
        ("integer", {}, ("weights", "dithered")),
        ("integer", {"upload": "stored"}, ("weights", "stored")),
    ],
)
def test_what_low_bit_clients_are_asked_for(training, given, expected):
    made = strategy(training, **{"upload": None, **given})
    asked = made.instruct(1, Declaration(0, 2, 3, 10, ""))
    assert (asked.uplink, made.upload) == expected
    assert made.instruct(1, Declaration(1, 2, 32, 10, "")).uplink == "weights"


@pytest.mark.parametrize("bits", [6, 8])
def test_ternary_weights_are_measured_from_those_of_the_stored_start(bits):
    start = {**START, "w": START["w"].clamp(-0.5, 0.5)}
    stored = (start["w"] * 2 ** (bits - 1)).round() / 2 ** (bits - 1)
    began = (2 * stored).round().clamp(-1, 1) / 2
    ended = {**start, "w": torch.where(began == 0, 0.5, began)}
    update = quantize_state(ended, 2, ternary_scales(ended, ["w"]))
    made = strategy("integer", "forward")
    got = made.combine(1, start, iter([item(0, bits, update)]))
    torch.testing.assert_close(got["w"], start["w"] + ended["w"] - began)
    assert made.dequantizer.ladder == (2, 4, 8, 16, 32)


@pytest.mark.parametrize("upload", ["forward", "dithered"])
def test_a_client_at_a_time_is_the_group_at_once(upload):
    """With untrained blocks; with trained ones each client's own start is a feature."""
    scales = fit_scales(START, ["w"], 3)
    state = {**START, "w": START["w"] + MOVED}
    dithers = (7, 8) if upload == "dithered" else (0, 0)
    items = [
        item(i, 3, quantize_state(state, 3, scales, dither=d), d) for i, d in enumerate(dithers)
    ]
    at_once, one_by_one = (
        strategy(
            upload=upload, options=ProWDOptions(own_normalization=False, dequantize=dequantize)
        ).combine(1, START, iter(items))
        for dequantize in ("group", "client")
    )
    torch.testing.assert_close(at_once["w"], one_by_one["w"])
