"""ProWD's alignment and its normalization per width; the model as low-bit clients are sent it."""

import numpy as np
import pytest
import torch
from federation import ScriptedClient, assert_same_update, federation, run_round, with_w
from flwr.app import Array, ArrayRecord, ConfigRecord
from specs import difference_of, spec_of_state, to_bits

from exchange.protocol import INSTRUCTION, MODEL, Instruction
from quant import (
    QuantizedTensor,
    Update,
    decode,
    fit_scale,
    largest_code,
    quantize_nearest,
)
from strategies import STRATEGIES, FedAvg, ProWD, ProWDOptions

# No masks, no fine-tuning: what is left is the alignment.
ALONE = {"finetune_every": 0, "mask_at_least": 1.0, "align": "on", "own_normalization": False}


def start_model(seed=0, shape=(12, 40)):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.linspace(0.5, 2, shape[0])[:, None]
    return {"w": weight, "b": torch.zeros(shape[0])}


def on_grid(weight, bits):
    scale = fit_scale(weight, bits)
    return quantize_nearest(weight, scale, bits), scale


def moves(shape=(12, 40), seed=1):
    """Movements by whole codes, -1, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator)


def inward(codes, bits):
    """A drift by whole codes: the outermost levels come in by two, those next to them by one."""
    limit = largest_code(bits)
    return -codes.sign() * ((codes.abs() == limit) * 2 + (codes.abs() == limit - 1) * 1)


class Absent(ScriptedClient):
    """A client that answers training in the given rounds only."""

    def __init__(self, *args, rounds, **kwargs):
        super().__init__(*args, **kwargs)
        self.rounds = rounds

    def __call__(self, message):
        if message.metadata.message_type == "train":
            instruction = Instruction.from_record(message.content[INSTRUCTION])
            if instruction.server_round not in self.rounds:
                return None
        return super().__call__(message)


def moving_by_codes(bits, by):
    """Training that moves the received model's codes by ``by(codes)``."""

    def train(received):
        codes, scale = on_grid(received["w"], bits)
        moved = (codes + by(codes)).to(torch.int16)
        return Update(bits, "weights", {"w": QuantizedTensor(moved, scale)}, {"b": received["b"]})

    return train


# --- alignment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dequantize", ["group", "client"])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_drift_of_the_levels_is_taken_out(bits, dequantize):
    """With it the round ends as if there had been none; without alignment it does not."""
    start = start_model()
    codes, scale = on_grid(start["w"], bits)
    # Codes that a movement may take beyond the grid's end stand still: in all clients.
    move = moves() * (codes.abs() < largest_code(bits))
    target = move * scale[:, None]

    def result(drift, align):
        low = moving_by_codes(bits, lambda c: move + (inward(c, bits) if drift else 0))
        clients = [
            ScriptedClient(0, 3, bits, low, 30),
            ScriptedClient(1, 3, bits, low, 10),
            ScriptedClient(2, 3, 32, lambda s: {"w": s["w"] + target, "b": s["b"]}, 10),
        ]
        options = ProWDOptions(**{**ALONE, "align": align}, dequantize=dequantize)
        return run_round(ProWD(options, with_w()), federation(clients, start), start)["w"]

    undisturbed = result(drift=False, align="off")
    torch.testing.assert_close(undisturbed, start["w"] + target)
    torch.testing.assert_close(result(drift=True, align="on"), undisturbed)
    assert (result(drift=True, align="off") - undisturbed).abs().max() > 0.3 * scale.min()
    torch.testing.assert_close(result(drift=False, align="on"), undisturbed)


@pytest.mark.parametrize("bits", [3, 4])
def test_rows_that_no_low_bit_client_trained_stay_and_do_not_dilute_the_drift(bits):
    """Words of an embedding that only Float32 clients have, or nobody."""
    start = start_model()
    codes, scale = on_grid(start["w"], bits)
    move = moves() * (codes.abs() < largest_code(bits))
    move[:8] = 0
    target = move * scale[:, None]
    target[:4] = 0.25
    drift = inward(codes, bits)
    drift[:8] = 0

    def result(by):
        low = moving_by_codes(bits, lambda c: by)
        clients = [
            *(ScriptedClient(i, 4, bits, low, 7) for i in range(3)),
            ScriptedClient(3, 4, 32, lambda s: {"w": s["w"] + target, "b": s["b"]}, 7),
        ]
        options = ProWDOptions(**ALONE)
        return run_round(ProWD(options, with_w()), federation(clients, start), start)["w"]

    aligned = result(move + drift)
    torch.testing.assert_close(aligned[8:], (start["w"] + target)[8:])
    torch.testing.assert_close(aligned[4:8], start["w"][4:8])
    torch.testing.assert_close(aligned[:4], start["w"][:4] + 0.25 / 4)


def test_what_weights_of_one_level_do_unlike_each_other_is_kept():
    """By hand: one channel, 2 bits, half the weight for low-bit examples."""
    start = {"w": torch.tensor([[2.0, 2.0, -2.0, 0.0]]), "b": torch.zeros(1)}
    codes, scale = on_grid(start["w"], 2)
    assert codes.tolist() == [[1, 1, -1, 0]]
    assert scale.tolist() == [2.0]
    # In codes, the first goes to 0 and the second stays: mean -1/2 on level 1. Float32 moves by
    # 0.2 and 0.4, in steps 0.1 and 0.2: mean 0.15. The drift of that level is 0.65 steps = 1.3;
    # that of level -1, where one moves by 1 and the other by 0, -1 step; of level 0, 0.3 steps.
    low = moving_by_codes(2, lambda c: torch.tensor([[-1, 0, 1, 0]]))
    high = {"w": start["w"] + torch.tensor([[0.2, 0.4, 0.0, 0.6]]), "b": start["b"]}
    clients = [ScriptedClient(0, 2, 2, low), ScriptedClient(1, 2, 32, lambda _: high)]
    strategy = ProWD(ProWDOptions(**ALONE, low_bit_weight=0.5), with_w())
    new = run_round(strategy, federation(clients, start), start)
    aligned = torch.tensor([[-0.7, 1.3, 0.0, 0.6]])
    moved = (0.5 * aligned + (high["w"] - start["w"])) / 1.5
    torch.testing.assert_close(new["w"], start["w"] + moved)


def aligned_in_numpy(moved, target, start, bits):
    """Loop over levels; `moved`, `target` in float64, all of the levels of `bits` <= 4."""
    codes, scale = (t.double().numpy() for t in on_grid(start, bits))
    difference, steps = target - moved, np.broadcast_to(scale[:, None], moved.shape)
    aligned = moved.copy()
    for level in range(-largest_code(bits), largest_code(bits) + 1):
        here = codes == level
        if here.any():
            aligned += here * (difference[here].mean() / steps[here].mean()) * scale[:, None]
    return aligned


def test_a_group_is_aligned_with_all_groups_above_it():
    """Widths 2, 4 and 32: the 2-bit group's target is the 4-bit group, aligned, and float32."""
    start = start_model()
    examples = {2: 20, 4: 30, 32: 10}
    by = {2: moves(seed=2), 4: moves(seed=3)}
    high = 0.2 * torch.randn(start["w"].shape, generator=torch.Generator().manual_seed(4)) + 0.05
    clients = [
        ScriptedClient(0, 3, 2, moving_by_codes(2, lambda c: by[2] * (c == 0)), examples[2]),
        ScriptedClient(1, 3, 4, moving_by_codes(4, lambda c: by[4] * (c.abs() < 7)), examples[4]),
        ScriptedClient(2, 3, 32, lambda s: {**s, "w": s["w"] + high}, examples[32]),
    ]
    strategy = ProWD(ProWDOptions(**ALONE, low_bit_weight=0.4), with_w())
    new = run_round(strategy, federation(clients, start), start)

    moved = {32: high.double().numpy()}
    for bits, may_move in ((2, lambda c: c == 0), (4, lambda c: c.abs() < 7)):
        codes, scale = on_grid(start["w"], bits)
        moved[bits] = (by[bits] * may_move(codes) * scale[:, None]).double().numpy()
    shares = {2: 0.4 * 20, 4: 0.4 * 30, 32: 10}
    moved[4] = aligned_in_numpy(moved[4], moved[32], start["w"], 4)
    above = (shares[4] * moved[4] + shares[32] * moved[32]) / (shares[4] + shares[32])
    only_high = aligned_in_numpy(moved[2], moved[32], start["w"], 2)
    moved[2] = aligned_in_numpy(moved[2], above, start["w"], 2)
    assert np.abs(moved[2] - only_high).max() > 1e-3  # the pool is not float32 alone
    total = sum(shares[b] * moved[b] for b in shares) / sum(shares.values())
    np.testing.assert_allclose(new["w"].double() - start["w"].double(), total, atol=1e-5)


def test_without_a_higher_group_the_drift_seen_last_is_taken_out():
    start = start_model()
    low = ScriptedClient(0, 2, 4, moving_by_codes(4, lambda c: inward(c, 4)))
    high = Absent(1, 2, 32, lambda s: s, rounds=(2, 4))
    grid = federation([low, high], start)
    strategy = ProWD(ProWDOptions(**ALONE), with_w())

    # Nothing was seen yet: the drift goes into the model.
    codes, scale = on_grid(start["w"], 4)
    first = run_round(strategy, grid, start, 1)
    torch.testing.assert_close(first["w"], start["w"] + inward(codes, 4) * scale[:, None])
    assert not torch.equal(first["w"], start["w"])
    # Seen and taken out.
    second = run_round(strategy, grid, first, 2)
    torch.testing.assert_close(second["w"], first["w"])
    # Kept: the same drift by level, though other weights are on the levels of a new model.
    other = start_model(seed=8)
    third = run_round(strategy, grid, other, 3)
    assert strategy.round_log.aggregated == [0]
    torch.testing.assert_close(third["w"], other["w"])
    # Seen anew, another drift replaces it.
    low.train = moving_by_codes(4, lambda c: 2 * inward(c, 4))
    torch.testing.assert_close(run_round(strategy, grid, other, 4)["w"], other["w"])
    torch.testing.assert_close(run_round(strategy, grid, start, 5)["w"], start["w"])


def test_the_drift_is_kept_by_width():
    """A 4-bit group that is the highest of its round does not lose the drift of the 2-bit group."""
    start = start_model()
    two = ScriptedClient(0, 3, 2, moving_by_codes(2, lambda c: -c))
    four = Absent(1, 3, 4, moving_by_codes(4, lambda c: moves() * (c.abs() < 7)), rounds=(2,))
    high = Absent(2, 3, 32, lambda s: s, rounds=(1,))
    grid = federation([two, four, high], start)
    strategy = ProWD(ProWDOptions(**ALONE, low_bit_weight=0.3), with_w())
    torch.testing.assert_close(run_round(strategy, grid, start, 1)["w"], start["w"])
    codes, scale = on_grid(start["w"], 4)
    moved = moves() * (codes.abs() < 7) * scale[:, None]
    aligned = aligned_in_numpy(
        -(to_bits(start, 2).dequantize()["w"].double().numpy()),
        moved.double().numpy(),
        start["w"],
        2,
    )
    second = run_round(strategy, grid, start, 2)["w"].double() - start["w"].double()
    # Ten examples each; a low-bit example weighs 0.3.
    np.testing.assert_allclose(second, (0.3 * aligned + moved.double().numpy()) / 1.3, atol=1e-5)


def test_alignment_is_measured_from_what_the_clients_were_sent():
    """Codes that the server rounded otherwise are what the movement and the levels start from."""
    start = start_model()

    def floor(state, bits):
        scale = fit_scale(state["w"], bits)
        limit = largest_code(bits)
        codes = (state["w"] / scale[:, None]).floor().clamp(-limit, limit).to(torch.int16)
        return Update(bits, "weights", {"w": QuantizedTensor(codes, scale)}, {"b": state["b"]})

    sent = floor(start, 3).quantized["w"]

    def low(received):
        torch.testing.assert_close(received["w"], sent.dequantize(), rtol=0, atol=0)
        moved = (sent.codes + inward(sent.codes, 3)).to(torch.int16)
        return Update(3, "weights", {"w": QuantizedTensor(moved, sent.scale)}, {"b": received["b"]})

    clients = [ScriptedClient(0, 2, 3, low), ScriptedClient(1, 2, 32, lambda s: s)]
    context = with_w(broadcast="calibrated", round_calibrated=floor)
    strategy = ProWD(ProWDOptions(**ALONE), context)
    new = run_round(strategy, federation(clients, start), start)
    torch.testing.assert_close(new["w"], start["w"])


@pytest.mark.parametrize("own_normalization", [True, False])
@pytest.mark.parametrize("broadcast", ["float32", "nearest"])
def test_with_float32_clients_alone_it_is_fedavg(own_normalization, broadcast):
    start = start_model()
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(start["w"].shape, generator=generator) for _ in range(3)]

    def run(strategy):
        clients = [
            ScriptedClient(
                i, 3, 32, lambda s, i=i: {"w": s["w"] + steps[i], "b": s["b"] + i}, 5 + i
            )
            for i in range(3)
        ]
        grid = federation(clients, start)
        return run_round(strategy, grid, run_round(strategy, grid, start, 1), 2)

    options = ProWDOptions(align="on", own_normalization=own_normalization)
    prowd, average = (
        run(ProWD(options, with_w(broadcast=broadcast))),
        run(FedAvg(context=with_w())),
    )
    assert float(average["b"][0]) == pytest.approx(2 * (0 * 5 + 1 * 6 + 2 * 7) / 18)
    for name in start:
        torch.testing.assert_close(prowd[name], average[name], rtol=1e-5, atol=1e-5)


def test_a_channel_of_zeros_does_not_ruin_the_model():
    start = {"w": torch.tensor([[3.5, 0.1, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]]), "b": torch.zeros(2)}
    clients = [
        ScriptedClient(0, 2, 4, lambda s: to_bits(s, 4)),
        ScriptedClient(1, 2, 32, lambda s: {n: t + 0.01 for n, t in s.items()}),
    ]
    new = run_round(
        ProWD(ProWDOptions(**ALONE), with_w()),
        federation(clients, start),
        start,
    )
    assert (new["w"] - start["w"]).abs().max() < 1


# --- normalization of its own --------------------------------------------------------------------

NORMALIZED = {
    "w": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "b": torch.zeros(4),
    "n.running_mean": torch.zeros(4),
    "n.running_var": torch.ones(4),
}
ONE_DIMENSIONAL = ("b", "n.running_mean", "n.running_var")
OWN = {"finetune_every": 0, "mask_at_least": 1.0, "own_normalization": True}


def adding(value):
    """Training that adds to what is not quantized, and moves the weights a little."""
    return lambda s: {n: t + (value if t.ndim == 1 else 0.01 * value) for n, t in s.items()}


def received_by(grid, kind="train"):
    """What each partition got in the last messages of a kind, decoded: update by partition."""
    spec = spec_of_state(NORMALIZED)
    found = {}
    for message in grid.sent:
        if message.metadata.message_type != kind or MODEL not in message.content:
            continue
        instruction = Instruction.from_record(message.content[INSTRUCTION])
        data = message.content[MODEL][MODEL].data
        client = grid.nodes[message.metadata.dst_node_id]
        found[client.declaration.partition_id] = decode(data, spec, instruction.downlink_bits)
    return found


def ask_to_evaluate(strategy, grid, state, server_round):
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in state.items()})
    messages = strategy.configure_evaluate(server_round, arrays, ConfigRecord(), grid)
    grid.push_messages(messages)


@pytest.mark.parametrize("broadcast", ["float32", "nearest"])
def test_each_width_gets_its_own_normalization_and_the_common_weights(broadcast):
    clients = [
        ScriptedClient(0, 5, 4, adding(1.0), 10),
        ScriptedClient(1, 5, 4, adding(2.0), 30),
        ScriptedClient(2, 5, 8, adding(5.0)),
        ScriptedClient(3, 5, 32, adding(6.0), 10),
        ScriptedClient(4, 5, 32, adding(8.0), 10),
    ]
    grid = federation(clients, NORMALIZED)
    strategy = ProWD(
        ProWDOptions(**OWN),
        with_w(broadcast=broadcast, fraction_evaluate=1.0),
    )
    new = run_round(strategy, grid, NORMALIZED, 1)
    # Weighted by examples: (1 * 10 + 2 * 30) / 40; 5; (6 + 8) / 2. The widest's is the global.
    added = {4: 1.75, 8: 5.0, 32: 7.0}
    for name in ONE_DIMENSIONAL:
        torch.testing.assert_close(new[name], NORMALIZED[name] + added[32])

    ask_to_evaluate(strategy, grid, new, 1)
    evaluated = received_by(grid, "evaluate")
    newer = run_round(strategy, grid, new, 2)
    got = received_by(grid)
    assert sorted(got) == sorted(evaluated) == [0, 1, 2, 3, 4]
    for partition, update in [*got.items(), *evaluated.items()]:
        bits = clients[partition].bits
        for name in ONE_DIMENSIONAL:
            torch.testing.assert_close(update.floats[name], NORMALIZED[name] + added[bits])
        narrow = broadcast == "nearest" and bits < 32
        assert update.bits == (bits if narrow else 32)
        expected = to_bits(new, update.bits).dequantize()["w"]
        assert torch.equal(update.dequantize()["w"], expected)
    # And continues from there: twice what was added.
    for name in ONE_DIMENSIONAL:
        torch.testing.assert_close(newer[name], NORMALIZED[name] + 2 * added[32])
        own = strategy.state_for(4, newer)[name]
        torch.testing.assert_close(own, NORMALIZED[name] + 2 * added[4])
    assert torch.equal(strategy.state_for(8, newer)["w"], newer["w"])
    # What is evaluated at a width is that, too.
    model = strategy.model_for(8, newer)
    torch.testing.assert_close(model.floats["b"], NORMALIZED["b"] + 2 * added[8])


def test_without_it_all_get_the_same():
    clients = [ScriptedClient(0, 2, 4, adding(1.0)), ScriptedClient(1, 2, 32, adding(2.0))]
    grid = federation(clients, NORMALIZED)
    strategy = ProWD(
        ProWDOptions(**{**OWN, "own_normalization": False}, low_bit_weight=0.3),
        with_w(),
    )
    new = run_round(strategy, grid, NORMALIZED, 1)
    run_round(strategy, grid, new, 2)
    got = received_by(grid)
    # Ten examples each; a low-bit example weighs 0.3: (0.3 * 1 + 2) / 1.3.
    torch.testing.assert_close(new["b"], torch.full((4,), 2.3 / 1.3))
    for update in got.values():
        assert all(torch.equal(update.floats[n], new[n]) for n in ONE_DIMENSIONAL)


def test_low_bit_normalization_does_not_reach_the_global_model_nor_the_other_way_round():
    results = []
    for low in (1.0, 50.0):
        clients = [ScriptedClient(0, 2, 4, adding(low)), ScriptedClient(1, 2, 32, adding(2.0))]
        new = run_round(
            ProWD(ProWDOptions(**OWN), with_w()),
            federation(clients, NORMALIZED),
            NORMALIZED,
        )
        results.append(new)
    assert all(torch.equal(results[0][n], results[1][n]) for n in ONE_DIMENSIONAL)
    assert not torch.equal(results[0]["w"], results[1]["w"])


def test_a_round_without_the_widest_leaves_the_global_normalization():
    low = ScriptedClient(0, 2, 4, adding(1.0))
    high = Absent(1, 2, 32, adding(2.0), rounds=(2,))
    grid = federation([low, high], NORMALIZED)
    strategy = ProWD(ProWDOptions(**OWN), with_w())
    first = run_round(strategy, grid, NORMALIZED, 1)
    assert strategy.round_log.aggregated == [0]
    assert all(torch.equal(first[n], NORMALIZED[n]) for n in ONE_DIMENSIONAL)
    assert not torch.equal(first["w"], NORMALIZED["w"])
    second = run_round(strategy, grid, first, 2)
    got = received_by(grid)
    # The low-bit client's own continued nevertheless.
    torch.testing.assert_close(got[0].floats["b"], torch.full((4,), 1.0))
    assert torch.equal(got[1].floats["b"], NORMALIZED["b"])
    torch.testing.assert_close(second["b"], torch.full((4,), 2.0))
    third = run_round(strategy, grid, second, 3)
    assert all(torch.equal(third[n], second[n]) for n in ONE_DIMENSIONAL)
    torch.testing.assert_close(strategy.state_for(4, third)["b"], torch.full((4,), 3.0))


def test_a_width_that_is_absent_keeps_its_normalization():
    low = Absent(0, 2, 4, adding(1.0), rounds=(1,))
    high = ScriptedClient(1, 2, 32, adding(2.0))
    grid = federation([low, high], NORMALIZED)
    strategy = ProWD(ProWDOptions(**OWN), with_w())
    state = NORMALIZED
    for server_round in (1, 2, 3):
        state = run_round(strategy, grid, state, server_round)
    torch.testing.assert_close(received_by(grid)[0].floats["b"], torch.full((4,), 1.0))
    torch.testing.assert_close(state["b"], torch.full((4,), 6.0))


def test_without_float32_clients_the_widest_group_gives_the_global_normalization():
    clients = [ScriptedClient(0, 2, 2, adding(1.0)), ScriptedClient(1, 2, 8, adding(2.0))]
    grid = federation(clients, NORMALIZED)
    strategy = ProWD(ProWDOptions(**OWN), with_w())
    new = run_round(strategy, grid, NORMALIZED, 1)
    torch.testing.assert_close(new["b"], torch.full((4,), 2.0))
    run_round(strategy, grid, new, 2)
    got = received_by(grid)
    assert [float(got[i].floats["b"][0]) for i in (0, 1)] == [1.0, 2.0]


# --- broadcast -----------------------------------------------------------------------------------


def ceiling(state, bits):
    """A rounding that is not to nearest, in place of the server's calibrated one."""
    nearest = to_bits(state, bits)
    quantized = {}
    for name, tensor in nearest.quantized.items():
        limit = largest_code(bits)
        codes = (state[name] / tensor.scale[:, None]).ceil().clamp(-limit, limit)
        quantized[name] = QuantizedTensor(codes.to(torch.int16), tensor.scale)
    return Update(bits, "weights", quantized, nearest.floats)


def rounded(state, bits, broadcast):
    return ceiling(state, bits) if broadcast == "calibrated" else to_bits(state, bits)


class Obedient(ScriptedClient):
    """Sends what it is asked for, at the bits that it is asked for."""

    def __init__(self, partition, of, bits, step):
        super().__init__(partition, of, bits, self.move)
        self.step = step
        self.got = []

    def move(self, received):
        instruction = self.instructions[-1]
        self.got.append(received)
        if instruction.uplink == "difference":
            bits = instruction.uplink_bits or self.bits
            moved = {n: torch.full_like(t, self.step) for n, t in received.items()}
            return difference_of(moved, bits, torch.Generator().manual_seed(0))
        return to_bits({n: t + self.step for n, t in received.items()}, self.bits)


BROADCASTING = [f"{name}:FedAdam" if k.suffix else name for name, k in STRATEGIES.items()]


def make(name, broadcast):
    kind, _, inner = name.partition(":")
    context = with_w(broadcast=broadcast, round_calibrated=ceiling)
    return STRATEGIES[kind].named(inner)(context=context)


PLAIN = {"w": NORMALIZED["w"], "b": torch.zeros(4)}


def plain_grid():
    widths = (2, 4, 16, 32, 4)
    clients = [Obedient(i, len(widths), bits, 0.1 * (i + 1)) for i, bits in enumerate(widths)]
    return clients, federation(clients, PLAIN)


def sent_codes(grid):
    """Payloads of the last training messages by partition, and the width each was packed at."""
    found = {}
    for message in grid.sent:
        if message.metadata.message_type == "train" and MODEL in message.content:
            instruction = Instruction.from_record(message.content[INSTRUCTION])
            client = grid.nodes[message.metadata.dst_node_id]
            data = message.content[MODEL][MODEL].data
            update = decode(data, spec_of_state(PLAIN), instruction.downlink_bits)
            found[client.declaration.partition_id] = (instruction.server_round, update)
    return found


@pytest.mark.parametrize("broadcast", ["nearest", "calibrated"])
# FedCOMGATE's corrections need the exact model.
@pytest.mark.parametrize("name", [name for name in BROADCASTING if name != "fedcomgate"])
def test_low_bit_clients_get_codes_of_their_own_width(name, broadcast):
    clients, grid = plain_grid()
    strategy = make(name, broadcast)
    new = run_round(strategy, grid, PLAIN, 1)
    for partition, (_, update) in sent_codes(grid).items():
        bits = clients[partition].bits
        expected = to_bits(PLAIN, 32) if bits == 32 else rounded(PLAIN, bits, broadcast)
        assert_same_update(update, expected)
    assert len(sent_codes(grid)) == 5
    if name == "local":
        # Nothing more is sent, and there is no model to evaluate.
        run_round(strategy, grid, PLAIN, 2)
        assert {at for at, _ in sent_codes(grid).values()} == {1}
        return

    # What is evaluated after the round is what is sent in the next.
    own = {bits: strategy.state_for(bits, new) for bits in strategy.nodes.widths()}
    evaluated = {bits: strategy.model_for(bits, new) for bits in own}
    run_round(strategy, grid, new, 2)
    for partition, (sent_in, update) in sent_codes(grid).items():
        bits = clients[partition].bits
        assert sent_in == 2
        assert_same_update(update, evaluated[bits])
        as_it_is = to_bits(own[bits], 32)
        assert_same_update(update, as_it_is if bits == 32 else rounded(own[bits], bits, broadcast))
        received = clients[partition].got[-1]
        assert all(torch.equal(t, received[n]) for n, t in update.dequantize().items())
    moved_apart = not torch.equal(own[2]["w"], own[32]["w"])
    assert moved_apart == (name.startswith("grouped-avg"))


@pytest.mark.parametrize("name", BROADCASTING)
def test_in_float32_all_get_the_same_model_but_for_what_is_a_widths_own(name):
    clients, grid = plain_grid()
    strategy = make(name, "float32")
    run_round(strategy, grid, PLAIN, 1)
    got = sent_codes(grid)
    assert len(got) == 5
    for _, update in got.values():
        assert_same_update(update, to_bits(PLAIN, 32))
    assert all(i.downlink_bits == 32 for client in clients for i in client.instructions)


def test_clients_of_one_width_share_one_payload_and_bytes_are_counted():
    _, grid = plain_grid()
    calls = []
    noted = lambda s, bits: calls.append(bits) or ceiling(s, bits)  # noqa: E731
    strategy = FedAvg(context=with_w(broadcast="calibrated", round_calibrated=noted))
    run_round(strategy, grid, PLAIN, 1)
    assert sorted(calls) == [2, 4, 16]
    sizes = {}
    for message in grid.sent:
        if message.metadata.message_type == "train":
            bits = grid.nodes[message.metadata.dst_node_id].bits
            sizes[bits] = sizes.get(bits, 0) + len(message.content[MODEL][MODEL].data)
    assert strategy.round_log.downlink_bytes == sizes
    # 24 codes: 6 bytes at 2 bits, 96 in float32, but for 4 scales.
    assert sizes[32] - sizes[2] == 96 - 6 - 16


@pytest.mark.parametrize("broadcast", ["nearest", "calibrated"])
def test_clients_that_evaluate_get_codes_of_their_own_width(broadcast):
    _, grid = plain_grid()
    strategy = FedAvg(
        context=with_w(broadcast=broadcast, fraction_evaluate=1.0, round_calibrated=ceiling)
    )
    ask_to_evaluate(strategy, grid, PLAIN, 1)
    asked = [m for m in grid.sent if m.metadata.message_type == "evaluate"]
    assert len(asked) == 5
    for message in asked:
        bits = grid.nodes[message.metadata.dst_node_id].bits
        instruction = Instruction.from_record(message.content[INSTRUCTION])
        assert instruction.downlink_bits == bits
        update = decode(message.content[MODEL][MODEL].data, spec_of_state(PLAIN), bits)
        expected = to_bits(PLAIN, 32) if bits == 32 else rounded(PLAIN, bits, broadcast)
        assert_same_update(update, expected)


def test_fixed_point_weights_are_rounded_to_nearest_with_their_one_step():
    _, grid = plain_grid()
    strategy = FedAvg(
        context=with_w(broadcast="nearest", low_bit_training="strict", weight_step=0.25)
    )
    run_round(strategy, grid, PLAIN, 1)
    for partition, (_, update) in sent_codes(grid).items():
        bits = (2, 4, 16, 32, 4)[partition]
        assert update.bits == bits
        if bits == 32:
            assert torch.equal(update.floats["w"], PLAIN["w"])
            continue
        sent = update.quantized["w"]
        limit = largest_code(bits)
        assert sent.scale.tolist() == [0.25] * 4
        expected = (PLAIN["w"] * 4).round().clamp(-limit, limit)
        assert torch.equal(sent.codes.float(), expected)


def test_model_for_takes_the_state_of_the_width():
    class Shifted(FedAvg):
        def state_for(self, bits, state):
            return {n: t + bits for n, t in state.items()}

    seen = []
    noted = lambda s, bits: seen.append((s, bits)) or ceiling(s, bits)  # noqa: E731
    strategy = Shifted(context=with_w(broadcast="calibrated", round_calibrated=noted))
    assert_same_update(
        strategy.model_for(4, PLAIN), ceiling({n: t + 4 for n, t in PLAIN.items()}, 4)
    )
    assert [bits for _, bits in seen] == [4]
    shifted = {n: t + 32 for n, t in PLAIN.items()}
    assert_same_update(strategy.model_for(32, PLAIN), to_bits(shifted, 32))
    assert len(seen) == 1
