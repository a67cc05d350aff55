import numpy as np
import pytest
import torch

from quant import (
    FineTuning,
    GlobalReference,
    ProgressiveDequantizer,
    Rungs,
    StartReference,
    absmax_scale,
    dequantize,
    fine_tune,
    ladder_of,
    mse_scale,
    quantize_nearest,
)

REFERENCES = [GlobalReference, StartReference]
LADDER = (2, 4, 8, 32)
NAMES = ["a.weight", "b.weight"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(seed=0, channels=6):
    source = generator(seed)
    return {
        "a.weight": torch.randn(channels, 3, 3, 3, generator=source) * 0.2,
        "b.weight": torch.randn(channels, 40, generator=source),
    }


def moved(start, seed, size=0.25):
    """Weights of clients that trained: a movement of `size` standard deviations of each tensor."""
    source = generator(seed)
    return {
        name: w + size * w.std() * torch.randn(w.shape, generator=source)
        for name, w in start.items()
    }


def as_sent(state, reference, bits):
    scales = reference.start.scales[bits]
    return {
        n: dequantize(quantize_nearest(w, scales[n], bits), scales[n]) for n, w in state.items()
    }


def l1(dequantized, state, reference, bits):
    """Mean absolute error in steps of the grid."""
    errors = []
    for name, weight in state.items():
        step = reference.start.scales[bits][name].reshape(-1, *[1] * (weight.ndim - 1))
        errors.append(((dequantized[name] - weight) / step).flatten())
    return torch.cat(errors).abs().mean().item()


def dequantizer_for(reference, ladder=LADDER, seed=0):
    return ProgressiveDequantizer(ladder, reference.num_features, NAMES, seed)


@pytest.mark.parametrize(
    ("widths", "ladder"),
    [
        ([4, 32], (4, 8, 16, 32)),
        ([2], (2, 4, 8, 16, 32)),
        ([32], (32,)),
        ([8, 4, 8, 32], (4, 8, 16, 32)),
        ([4, 6, 8], (4, 6, 8, 16, 32)),
        ([16, 2], (2, 4, 8, 16, 32)),
        ([3, 32], (3, 6, 12, 32)),  # 24 bits have no grid
        ([5, 8], (5, 8, 10, 32)),
    ],
)
def test_ladder_by_hand(widths, ladder):
    assert ladder_of(widths) == ladder


@pytest.mark.parametrize("bits", [*range(2, 17), 32])
def test_every_width_has_a_ladder_that_a_model_can_be_put_on(bits):
    ladder = ladder_of([bits, 32])
    assert ladder[0] == bits
    assert ladder[-1] == 32
    assert Rungs.of(weights(), ladder).ladder == ladder


def test_rungs_hold_the_model_at_every_width():
    # Absmax scales above 4 bits, MSE scales up to there; round and clip in float64.
    start = weights()
    rungs = Rungs.of(start, LADDER)
    assert set(rungs.scales) == {2, 4, 8}
    assert set(rungs.values) == {2, 4, 8, 32}
    for bits, fit in [(2, mse_scale), (4, mse_scale), (8, absmax_scale)]:
        limit = 2 ** (bits - 1) - 1
        for name, weight in start.items():
            scale = fit(weight, bits)
            assert torch.equal(rungs.scales[bits][name], scale)
            step = scale.double().reshape(-1, *[1] * (weight.ndim - 1))
            expected = (weight.double() / step).round().clamp(-limit, limit) * step
            torch.testing.assert_close(rungs.values[bits][name], expected.float())
    assert all(torch.equal(rungs.values[32][name], start[name]) for name in start)


@pytest.mark.parametrize("ladder", [(4, 8), (8, 4, 32), (4, 4, 32), (1, 32), (4, 24, 32)])
def test_ladders_that_do_not_rise_to_32_are_refused(ladder):
    with pytest.raises(ValueError, match=r"rises to 32|2 to 16"):
        Rungs.of(weights(), ladder)


def test_channels_cut_the_model_down():
    rungs = Rungs.of(weights(), LADDER)
    rows = {"a.weight": torch.tensor([4, 1]), "b.weight": torch.tensor([0])}
    cut = rungs.channels(rows)
    for bits in LADDER:
        assert torch.equal(cut.values[bits]["a.weight"], rungs.values[bits]["a.weight"][[4, 1]])
        assert torch.equal(cut.values[bits]["b.weight"], rungs.values[bits]["b.weight"][:1])
    assert torch.equal(cut.scales[2]["a.weight"], rungs.scales[2]["a.weight"][[4, 1]])


@pytest.mark.parametrize("bits", LADDER)
def test_untrained_dequantizer_without_a_start_returns_the_values(bits):
    start = weights()
    reference = GlobalReference(Rungs.of(start, LADDER))
    q = moved(start, 1)
    dequantized = dequantizer_for(reference)(q, bits, reference)
    assert all(torch.equal(dequantized[name], q[name]) for name in q)


@pytest.mark.parametrize("bits", LADDER)
def test_untrained_dequantizer_with_a_start_adds_its_rounding_error(bits):
    # The bases of all rungs telescope: q + (w_prev - Q(w_prev)), Q worked out in numpy.
    start = weights()
    reference = StartReference(Rungs.of(start, LADDER))
    q = as_sent(moved(start, 1), reference, bits) if bits < 32 else moved(start, 1)
    dequantized = dequantizer_for(reference)(q, bits, reference)
    for name, weight in start.items():
        rounded = weight.double().numpy()
        if bits < 32:
            step = reference.start.scales[bits][name].double().numpy()
            step = step.reshape(-1, *[1] * (weight.ndim - 1))
            limit = 2 ** (bits - 1) - 1
            rounded = np.clip(np.rint(rounded / step), -limit, limit) * step
        expected = q[name].double().numpy() + (weight.double().numpy() - rounded)
        np.testing.assert_allclose(dequantized[name].detach().numpy(), expected, atol=1e-6)


def test_a_client_that_did_not_move_is_dequantized_to_its_start():
    start = weights()
    reference = StartReference(Rungs.of(start, LADDER))
    dequantized = dequantizer_for(reference)(as_sent(start, reference, 2), 2, reference)
    for name, weight in start.items():
        torch.testing.assert_close(dequantized[name], weight, rtol=0, atol=1e-6)


def test_a_dequantization_by_hand():
    # One channel on the ladder 2, 32 whose grid has step 1; start 0.8, 0.3, 0 -> 1, 0, 0.
    # Bases: 0 + (0.8 - 1), 1 + (0.3 - 0), -1 + 0; a constant block adds 0.5 steps of 1.
    start = Rungs(
        (2, 32),
        {2: {"w": torch.tensor([1.0])}},
        {2: {"w": torch.tensor([[1.0, 0, 0]])}, 32: {"w": torch.tensor([[0.8, 0.3, 0]])}},
    )
    q = {"w": torch.tensor([[0.0, 1, -1]])}
    for kind, expected in [(StartReference, [0.3, 1.8, -0.5]), (GlobalReference, [0.5, 1.5, -0.5])]:
        dequantizer = ProgressiveDequantizer((2, 32), kind.num_features, ["w"], 0)
        with torch.no_grad():
            dequantizer.blocks["2"][-1].bias.fill_(0.5)
        dequantized = dequantizer(q, 2, kind(start))["w"]
        torch.testing.assert_close(dequantized, torch.tensor([expected]))


def test_features_by_hand():
    # 3 bits (largest code 3), step 0.25: q = 0.75, -0.5 and -0.75 are codes 3, -2 and -3;
    # log2(0.25) / 8. The start is 0.5, -0.5 and 0.75 on the grid, 0.6, -0.7 and 1.5 above: moved by
    # 1, 0 and -6 steps (at most 4 are shown); place in the cell 0.4, -0.8 and 3 steps (at most 1).
    start = Rungs(
        (3, 32),
        {3: {"w": torch.tensor([0.25])}},
        {3: {"w": torch.tensor([[0.5, -0.5, 0.75]])}, 32: {"w": torch.tensor([[0.6, -0.7, 1.5]])}},
    )
    q = torch.tensor([[0.75, -0.5, -0.75]])
    expected = torch.tensor(
        [
            [1, 1, -0.25, 0.5, 1, 0.4],
            [-2 / 3, 2 / 3, -0.25, 0.5, 0, -0.8],
            [-1, 1, -0.25, 0.5, -4, 1],
        ]
    )
    torch.testing.assert_close(StartReference(start).features(q, "w", 3, 32, 0.5), expected)
    torch.testing.assert_close(GlobalReference(start).features(q, "w", 3, 32, 0.5), expected[:, :4])


def test_first_layers_depend_on_the_seed_and_torchs_own_stays():
    reference = StartReference(Rungs.of(weights(), LADDER))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (dequantizer_for(reference, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    first, again, another = (d.blocks["2"][0].weight for d in (one, same, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, another)
    assert not torch.equal(first, one.blocks["4"][0].weight)


def parameters_of(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def trained(reference, high, config, high_bits=32, predict=None, seed=0):
    dequantizer = dequantizer_for(reference, reference.start.ladder)
    losses = fine_tune(dequantizer, high, high_bits, reference, config, predict, generator(seed))
    return dequantizer, losses


@pytest.mark.parametrize("bits", [2, 4])
def test_fine_tuning_lowers_the_error_on_held_out_weights(bits):
    # Trained on one draw of start and movement, measured on another of the same distribution.
    ladder = (bits, 8, 32)
    start, held_out = weights(0, channels=32), weights(9, channels=32)
    reference = StartReference(Rungs.of(start, ladder))
    elsewhere = StartReference(Rungs.of(held_out, ladder))
    config = FineTuning(steps=150, learning_rate=1e-2, distill_weight=0.0)
    dequantizer, _ = trained(reference, moved(start, 1), config)
    target = moved(held_out, 2)
    sent = as_sent(target, elsewhere, bits)
    with torch.no_grad():
        before = dequantizer_for(elsewhere, ladder)(sent, bits, elsewhere)
        after = dequantizer(sent, bits, elsewhere)
    assert l1(after, target, elsewhere, bits) < 0.8 * l1(before, target, elsewhere, bits)


def test_fine_tuning_lowers_its_own_loss():
    start = weights(channels=16)
    high = moved(start, 1)
    reference = StartReference(Rungs.of(start, LADDER))
    dequantizer = dequantizer_for(reference)
    config = FineTuning(steps=30, learning_rate=1e-2)

    def tune():
        return fine_tune(dequantizer, high, 32, reference, config, None, generator())

    first, second = tune(), tune()
    assert second.reconstruction < 0.95 * first.reconstruction
    assert first.distill is None


def test_first_loss_is_the_l1_of_every_rung():
    # One step on untrained blocks: each base against the next rung, in steps of the lowest grid.
    start = weights()
    high = moved(start, 1)
    reference = StartReference(Rungs.of(start, (2, 4, 32)))
    _, losses = trained(reference, high, FineTuning(steps=1))
    values = reference.start.values
    sent = {bits: as_sent(high, reference, bits) for bits in (2, 4)} | {32: high}
    expected = 0.0
    for low, above in [(2, 4), (4, 32)]:
        base = {n: sent[low][n] + values[above][n] - values[low][n] for n in high}
        expected += l1(base, sent[above], reference, 2)
    assert losses.reconstruction == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("kind", REFERENCES)
def test_same_seed_same_dequantizer(kind, stochastic):
    start = weights()
    reference = kind(Rungs.of(start, LADDER))
    config = FineTuning(steps=5, stochastic=stochastic, group_size=2)

    def state(seed):
        tuned, _ = trained(reference, moved(start, 1), config, seed=seed)
        return parameters_of(tuned)

    assert torch.equal(state(1), state(1))
    if stochastic and kind is StartReference:
        assert not torch.equal(state(1), state(2))


@pytest.mark.parametrize(("high_bits", "same"), [(2, "248"), (4, "48"), (8, "8"), (32, "")])
@pytest.mark.parametrize("distilled", [False, True])
def test_rungs_above_the_high_bit_clients_stay_as_they_are(high_bits, same, distilled):
    start = weights()
    reference = StartReference(Rungs.of(start, LADDER))
    high = moved(start, 1)
    high = high if high_bits == 32 else as_sent(high, reference, high_bits)
    config = FineTuning(steps=5, learning_rate=1e-2, distill_weight=1.0)
    predict = logits if distilled else None
    tuned, _ = trained(reference, high, config, high_bits, predict)
    fresh = dequantizer_for(reference)
    unchanged = {
        bits
        for bits, block in tuned.blocks.items()
        if torch.equal(parameters_of(block), parameters_of(fresh.blocks[bits]))
    }
    assert unchanged == set(same)


def logits(state):
    """A small network on a fixed buffer: a linear layer per tensor, their outputs added."""
    total = 0
    for name, weight in state.items():
        source = generator(len(name) + weight[0].numel())
        total = total + torch.randn(30, weight[0].numel(), generator=source) @ weight.flatten(1).T
    return total.tanh()


def similarity(dequantizer, high, reference):
    with torch.no_grad():
        dequantized = dequantizer(as_sent(high, reference, 2), 2, reference)
        return torch.cosine_similarity(logits(dequantized), logits(high), dim=1).mean().item()


def test_distillation_raises_the_similarity():
    start = weights()
    high = moved(start, 1)
    reference = StartReference(Rungs.of(start, LADDER))
    results = {}
    for weight in (0.0, 20.0):
        config = FineTuning(steps=60, learning_rate=5e-3, distill_weight=weight)
        tuned, losses = trained(reference, high, config, predict=logits)
        results[weight] = similarity(tuned, high, reference), losses
    untrained = similarity(dequantizer_for(reference), high, reference)
    assert results[20.0][0] > results[0.0][0] + 0.005
    assert results[20.0][0] > untrained + 0.01
    assert results[0.0][1].distill is None
    assert -1 <= results[20.0][1].distill < -untrained + 0.01


def test_distillation_without_a_step_reports_the_similarity_of_the_untrained_dequantizer():
    start = weights()
    high = moved(start, 1)
    reference = StartReference(Rungs.of(start, LADDER))
    _, losses = trained(reference, high, FineTuning(steps=1), predict=logits)
    untrained = similarity(dequantizer_for(reference), high, reference)
    assert losses.distill == pytest.approx(-untrained, rel=1e-5)
