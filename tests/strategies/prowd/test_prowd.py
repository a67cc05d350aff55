"""ProWD against numbers worked by hand; its forms one setting apart."""

import pytest
import torch
from federation import ScriptedClient, federation, run_round, with_w
from specs import spec_of_state, to_bits

from core.errors import SettingsError
from quant import QuantizedTensor, Update, fit_scale, quantize_nearest
from strategies import FedAvg, ProWD, ProWDOptions

# One channel whose 4-bit grid is 0.5 * [-7..7]: already on the grid but for the second entry, which
# rounds to 0 and leaves 0.1 behind.
START = {"w": torch.tensor([[3.5, 0.1, -1.0, 0.5]]), "b": torch.tensor([0.0])}
UNTRAINED = {
    "finetune_every": 0,
    "mask_at_least": 1.0,
    "low_bit_weight": 1.0,
    "align": "off",
    "own_normalization": False,
}


def start_scale():
    scale = fit_scale(START["w"], 4)
    codes = quantize_nearest(START["w"], scale, 4)
    assert codes.tolist() == [[7, 0, -2, 1]]
    return scale, codes


def clients_that_move(low_codes_move, high_move, low_examples=10):
    """A 4-bit client that moves by whole codes, a float32 client that moves by `high_move`."""
    scale, codes = start_scale()
    moved = codes + torch.tensor([low_codes_move], dtype=torch.int16)
    low = Update(4, "weights", {"w": QuantizedTensor(moved, scale)}, {"b": torch.tensor([1.0])})
    high = {"w": START["w"] + torch.tensor([high_move]), "b": torch.tensor([3.0])}
    clients = [
        ScriptedClient(0, 2, 4, lambda _: low, low_examples),
        ScriptedClient(1, 2, 32, lambda _: high),
    ]
    return clients, scale


def test_client_start_reference_takes_the_rounding_error_of_the_start_out():
    clients, scale = clients_that_move([0, 1, -1, 0], [0.0, 0.2, 0.4, 0.0])
    strategy = ProWD(ProWDOptions(**UNTRAINED), with_w())
    new = run_round(strategy, federation(clients, START), START)
    step = float(scale[0])
    # By hand: the low-bit client moved by [0, 1, -1, 0] steps, the other by its floats; the mean
    # of the two movements is added to the start.
    expected = START["w"] + torch.tensor([[0, (step + 0.2) / 2, (-step + 0.4) / 2, 0]])
    torch.testing.assert_close(new["w"], expected)
    assert new["b"].tolist() == [2.0]


def test_global_reference_keeps_it():
    clients, scale = clients_that_move([0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0])
    strategy = ProWD(ProWDOptions(reference="global", **UNTRAINED), with_w())
    new = run_round(strategy, federation(clients, START), START)
    dequantized = torch.tensor([[7.0, 0.0, -2.0, 1.0]]) * scale
    torch.testing.assert_close(new["w"], (dequantized + START["w"]) / 2)
    assert abs(float(new["w"][0, 1]) - 0.05) < 1e-6  # half of the 0.1 is lost


def test_low_bit_weight_scales_the_low_group_only():
    clients, scale = clients_that_move([1 - 1, 1, 0, 0], [0.0, 0.0, 0.0, 0.0], low_examples=30)
    strategy = ProWD(ProWDOptions(**{**UNTRAINED, "low_bit_weight": 0.5}), with_w())
    new = run_round(strategy, federation(clients, START), START)
    # Shares: 30 * 0.5 = 15 against 10. Second entry moves by one step in the low group alone.
    assert float(new["w"][0, 1]) == pytest.approx(0.1 + float(scale[0]) * 15 / 25, abs=1e-6)
    assert float(new["b"][0]) == pytest.approx((15 * 1.0 + 10 * 3.0) / 25, abs=1e-6)


def test_masked_coordinates_are_left_to_the_high_group():
    # The low group agrees on entry 1 and disagrees on entry 2: the best mask keeps entry 1 alone
    # (entries 0 and 3 do not move and do not count).
    clients, scale = clients_that_move([0, 1, -1, 0], [0.0, 0.5, 0.5, 0.0])
    options = {**UNTRAINED, "mask_at_least": 0.0}
    new = run_round(ProWD(ProWDOptions(**options), with_w()), federation(clients, START), START)
    step = float(scale[0])
    expected = START["w"] + torch.tensor([[0, (step + 0.5) / 2, 0.5, 0]])
    torch.testing.assert_close(new["w"], expected)


def test_the_papers_literal_form_divides_by_all_clients():
    clients, scale = clients_that_move([0, 1, -1, 0], [0.0, 0.5, 0.5, 0.0])
    options = ProWDOptions(
        **{**UNTRAINED, "mask_at_least": 0.0},
        reference="global",
        dequantize="client",
        normalization="clients",
        aggregate="weights",
    )
    strategy = ProWD(options, with_w())
    new = run_round(strategy, federation(clients, START), START)
    step = float(scale[0])
    # Low-bit weights: codes [7, 1, -3, 1] * step; their movement from the global model against
    # [0, .5, .5, 0] is best kept at entry 1 only; w = 1/2 (c * w_low + w_high).
    low = torch.tensor([0.0, step, 0.0, 0.0])
    high = START["w"][0] + torch.tensor([0.0, 0.5, 0.5, 0.0])
    torch.testing.assert_close(new["w"][0], (low + high) / 2)
    assert strategy.round_log.own["mask-density-4"] == 0.25
    assert strategy.round_log.own["mask-density-by-layer-4"] == {"w": 0.25}


def test_homogeneous_float32_clients_make_it_fedavg():
    generator = torch.Generator().manual_seed(1)
    sent = [
        {n: torch.randn(t.shape, generator=generator) for n, t in START.items()} for _ in range(4)
    ]
    results = []
    for strategy in (FedAvg(context=with_w()), ProWD(context=with_w())):
        clients = [ScriptedClient(i, 4, 32, lambda _, i=i: sent[i], 5 + i) for i in range(4)]
        results.append(run_round(strategy, federation(clients, START), START))
    for name in START:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-5, atol=1e-6)


def noisy_start(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(16, 24, generator=generator), "b": torch.zeros(16)}


def test_a_trained_dequantizer_brings_qat_weights_nearer_to_the_truth():
    """Low-bit clients hold the very weights that the high-bit ones hold, rounded to nearest."""
    start = noisy_start()
    move = 0.05 * torch.randn(16, 24, generator=torch.Generator().manual_seed(9))
    truth = {"w": start["w"] + move, "b": start["b"]}

    def error(finetune_every):
        options = ProWDOptions(
            **{**UNTRAINED, "finetune_every": finetune_every}, finetune_steps=150
        )
        strategy = ProWD(options, with_w(low_bit_training="qat"))
        clients = [
            ScriptedClient(0, 2, 4, lambda _: to_bits(truth, 4)),
            ScriptedClient(1, 2, 32, lambda _: truth),
        ]
        new = run_round(strategy, federation(clients, start), start)
        if finetune_every:
            assert strategy.round_log.own["reconstruction-loss"] > 0
        # The mean of dequantized and true weights: its distance is half of the dequantized ones'.
        return 2 * float((new["w"] - truth["w"]).abs().mean())

    assert error(1) < 0.7 * error(0)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    start = noisy_start()

    def run(seed):
        strategy = ProWD(
            ProWDOptions(finetune_every=1), with_w(seed=seed, low_bit_training="strict")
        )
        clients = [
            ScriptedClient(0, 2, 4, lambda s: {n: t * 0.9 for n, t in s.items()}),
            ScriptedClient(1, 2, 32, lambda s: {n: t * 0.8 for n, t in s.items()}),
        ]
        return run_round(strategy, federation(clients, start), start)["w"]

    assert torch.equal(run(4), run(4))
    assert not torch.equal(run(4), run(5))


def test_distillation_uses_the_servers_buffer():
    start = noisy_start()
    inputs = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    strategy = ProWD(
        ProWDOptions(finetune_every=1),
        with_w(predict=lambda s: inputs @ s["w"].T + s["b"]),
    )
    clients = [
        ScriptedClient(0, 2, 4, lambda s: {n: t * 0.9 for n, t in s.items()}),
        ScriptedClient(1, 2, 32, lambda s: {n: t * 0.8 for n, t in s.items()}),
    ]
    run_round(strategy, federation(clients, start), start)
    assert -1 <= strategy.round_log.own["distill-loss"] < -0.9


def test_fine_tuning_that_diverges_is_undone(caplog):
    """The blocks are trained in round 1; in round 2 the network's logits are non-finite."""
    start, factor = noisy_start(), [1.0]
    inputs = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    options = ProWDOptions(finetune_every=1)
    strategy = ProWD(options, with_w(predict=lambda s: factor[0] * (inputs @ s["w"].T + s["b"])))
    shrink = lambda s: {n: 0.9 * t for n, t in s.items()}  # noqa: E731
    grid = federation([ScriptedClient(i, 2, b, shrink) for i, b in enumerate((4, 32))], start)
    run_round(strategy, grid, start)
    trained = {n: t.clone() for n, t in strategy.dequantizer.state_dict().items()}
    assert trained["blocks.4.4.weight"].any()
    factor[0] = float("inf")
    new = run_round(strategy, grid, start, 2)
    kept = strategy.dequantizer.state_dict()
    assert all(torch.equal(kept[n], t) for n, t in trained.items())
    assert all(t.isfinite().all() for t in new.values())
    assert "Round 2: fine-tuning diverged and is undone" in caplog.text
    assert strategy.round_log.own["finetuning-undone"] == 1
    assert "distill-loss" not in strategy.round_log.own
    # And it continues from there.
    factor[0] = 1.0
    run_round(strategy, grid, start, 3)
    assert strategy.round_log.own["distill-loss"] < 0


def test_the_ladder_follows_the_widths_of_the_federation():
    start = noisy_start()
    strategy = ProWD(context=with_w())
    clients = [ScriptedClient(i, 3, b, lambda s: s) for i, b in enumerate((3, 8, 32))]
    run_round(strategy, federation(clients, start), start)
    assert strategy.dequantizer.ladder == (3, 6, 8, 12, 32)


def test_a_ladder_that_grows_keeps_the_blocks_it_has():
    start = noisy_start()
    strategy = ProWD(ProWDOptions(finetune_every=1), with_w(node_wait=0.5))
    shrink = lambda s: {n: 0.9 * t for n, t in s.items()}  # noqa: E731
    grid = federation([ScriptedClient(i, 3, b, shrink) for i, b in enumerate((4, 32))], start)
    run_round(strategy, grid, start, 1)
    assert strategy.dequantizer.ladder == (4, 8, 16, 32)
    trained = {n: t.clone() for n, t in strategy.dequantizer.blocks["4"].state_dict().items()}
    assert trained["4.weight"].any(), "the last layer starts at zero and was trained"
    late = ScriptedClient(2, 3, 2, shrink)
    late.spec = spec_of_state(start)
    grid.nodes[102] = late
    tuned = strategy
    strategy = ProWD(ProWDOptions(finetune_every=0), with_w(node_wait=0.5))
    strategy.restore(*tuned.checkpoint())
    run_round(strategy, grid, start, 2)
    assert strategy.dequantizer.ladder == (2, 4, 8, 16, 32)
    kept = strategy.dequantizer.blocks["4"].state_dict()
    assert all(torch.equal(kept[n], t) for n, t in trained.items())
    # A width that leaves again keeps its rung.
    del grid.nodes[102]
    run_round(strategy, grid, start, 3)
    assert strategy.dequantizer.ladder == (2, 4, 8, 16, 32)


def test_the_papers_one_nth_counts_clients_not_examples():
    clients, _ = clients_that_move([0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0], low_examples=90)
    options = ProWDOptions(**UNTRAINED, normalization="clients")
    new = run_round(ProWD(options, with_w()), federation(clients, START), START)
    # Biases 1 (90 examples) and 3 (10 examples): (1 + 3) / 2.
    assert new["b"].tolist() == [2.0]


@pytest.mark.parametrize("dequantize", ["group", "client"])
def test_fine_tuning_comes_before_dequantization(dequantize):
    """In the very first round the blocks are trained before they are used."""
    start = noisy_start()
    truth = {"w": start["w"] * 1.05, "b": start["b"]}
    options = {**UNTRAINED, "dequantize": dequantize, "finetune_steps": 100}

    def model(every):
        clients = [
            ScriptedClient(0, 2, 4, lambda _: to_bits(truth, 4)),
            ScriptedClient(1, 2, 32, lambda _: truth),
        ]
        strategy = ProWD(ProWDOptions(**{**options, "finetune_every": every}), with_w())
        return run_round(strategy, federation(clients, start), start)["w"]

    assert not torch.equal(model(0), model(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ladder": "8,4,32"}, "prowd-ladder: '8,4,32' is not allowed"),
        ({"ladder": "4,8"}, "and then 32"),
        ({"mask-at-least": 0.9, "mask-at-most": 0.5}, "prowd-mask-at-least: 0.9 is above"),
        ({"low-bit-weight": 0.0}, "prowd-low-bit-weight: 0.0 is not allowed"),
        ({"reference": "elsewhere"}, "'client-start' or 'global'"),
        ({"finetune-every": -1}, "prowd-finetune-every: -1"),
    ],
)
def test_bad_options_are_one_clear_line(options, message):
    with pytest.raises(SettingsError) as error:
        ProWDOptions.read(options, "prowd-")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("own_normalization", [True, False])
def test_the_servers_step_and_momentum_by_hand(own_normalization):
    """Two precise clients move every weight by 1 and every bias by 3, in each round."""
    state = {"w": torch.zeros(1, 4), "b": torch.zeros(1), "running_mean": torch.zeros(1)}

    def train(received):
        return {"w": received["w"] + 1, "b": received["b"] + 3, "running_mean": torch.ones(1)}

    options = ProWDOptions(
        server_learning_rate=1.5, server_momentum=0.5, own_normalization=own_normalization
    )
    strategy = ProWD(options, with_w(norm_bound=0))
    grid = federation([ScriptedClient(i, 2, 32, train) for i in range(2)], state)
    # The velocity is 1, then 1 + 0.5 * 1 = 1.5, then 1.75; each is applied 1.5 times.
    for server_round, (weight, bias) in enumerate([(1.5, 3), (3.75, 6), (6.375, 9)], start=1):
        state = run_round(strategy, grid, state, server_round)
        assert state["w"].tolist() == [[weight] * 4]
        assert state["b"].tolist() == [bias]
        assert state["running_mean"].tolist() == [1]
