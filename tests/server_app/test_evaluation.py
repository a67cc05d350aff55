"""The model at each width on the server, and that clients compute with the very same."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from federation import ClientAppNode, InProcessGrid, assert_same_update, in_an_actor
from flwr.app import Context, RecordDict
from specs import to_bits
from torch import nn
from torch.nn import functional as F

import client_app.app as client_app
from core.errors import SettingsError
from core.settings import Settings
from exchange.protocol import INSTRUCTION, MODEL, Instruction
from quant import (
    QuantizedTensor,
    Update,
    decode,
    federated_state,
    fit_scale,
    quantized_layers,
    set_scales,
    spec_of,
    weight_scales,
)
from server_app.app import main
from server_app.build import choose_strategy, read_settings
from server_app.evaluation import CalibratedRounding, Evaluator, make_predict
from strategies import STRATEGIES, ProWD, StrategyContext
from task.at_width import at_width
from task.calibration import calibrate_activations, calibrate_normalization, round_weights
from task.data.dataset import Images
from task.data.to_input import to_input
from task.evaluation import evaluate
from task.models import build_model

FLOAT_STATISTICS = Settings(calibrate_normalization=False)


def images(count=40, seed=0, size=8):
    rng = np.random.default_rng(seed)
    # Smooth: neighbouring pixels say much the same.
    noise = rng.integers(-40, 41, (count, 1, size, size))
    slope = rng.integers(0, 256, (count, 1, 1, 1)) + 10 * np.arange(size)
    pixels = np.clip(slope + noise, 0, 255).astype(np.uint8)
    return Images(pixels, rng.integers(0, 10, count))


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)
    )


def state_of(model):
    return {n: t.clone() for n, t in federated_state(model).items()}


def shifted(update, seed=0):
    """The same model with codes that no rounding to nearest gives."""
    generator = torch.Generator().manual_seed(seed)
    quantized = {}
    for name, tensor in update.quantized.items():
        step = torch.randint(-1, 2, tensor.codes.shape, generator=generator)
        limit = 2 ** (update.bits - 1) - 1
        codes = (tensor.codes + step).clamp(-limit, limit).to(torch.int16)
        quantized[name] = QuantizedTensor(codes, 1.3 * tensor.scale)
    return replace(update, quantized=quantized)


# --- Evaluator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_a_network_computes_with_the_codes_and_scales_it_is_given(bits):
    update = shifted(to_bits(state_of(small()), bits))
    evaluator = Evaluator(FLOAT_STATISTICS, small(1), images(), images())
    network = evaluator.network(update)
    layers = dict(quantized_layers(network))
    assert set(layers) == {"0", "4"}
    for name, layer in layers.items():
        sent = update.quantized[f"{name}.weight"]
        assert (layer.config.weight_bits, layer.config.activation_bits) == (bits, bits)
        assert torch.equal(layer.weight_scale, sent.scale)
        # What it computes with, after its own rounding, is what was sent.
        assert torch.equal(layer.quantized_weight(), sent.dequantize())
    for name, tensor in update.floats.items():
        assert torch.equal(network.state_dict()[name], tensor)


def test_a_float32_model_is_not_quantized():
    update = to_bits(state_of(small()), 32)
    network = Evaluator(FLOAT_STATISTICS, small(1), images(), images()).network(update)
    assert not list(quantized_layers(network))
    assert all(torch.equal(t, network.state_dict()[n]) for n, t in update.floats.items())


def test_activations_are_at_the_width_of_the_settings():
    settings = Settings(calibrate_normalization=False, activation_bits=6)
    network = Evaluator(settings, small(), images(), images()).network(
        to_bits(state_of(small()), 3)
    )
    assert {layer.config.activation_bits for _, layer in quantized_layers(network)} == {6}


@pytest.mark.parametrize("bits", [3, 32])
def test_statistics_are_those_of_the_buffer_if_asked_for(bits):
    model, buffer = small(), images(30, seed=5)
    model[1].running_mean.fill_(9)
    update = to_bits(state_of(model), bits)
    kept = Evaluator(FLOAT_STATISTICS, model, images(), buffer).network(update)
    assert kept[1].running_mean.tolist() == [9] * 4
    found = Evaluator(Settings(), model, images(), buffer).network(update)
    expected = copy.deepcopy(kept)
    calibrate_normalization(expected, buffer)
    assert torch.equal(found[1].running_mean, expected[1].running_mean)
    assert torch.equal(found[1].running_var, expected[1].running_var)
    assert found[1].running_mean.abs().max() < 9


def test_grids_of_activations_are_fitted_to_the_buffer():
    buffer, update = images(30, seed=5), to_bits(state_of(small()), 3)
    network = Evaluator(Settings(), small(), images(), buffer).network(update)
    fitted = [layer.input_grid for _, layer in quantized_layers(network)]
    calibrate_activations(network, buffer)
    assert fitted == [layer.input_grid for _, layer in quantized_layers(network)]
    assert None not in fitted
    network = Evaluator(FLOAT_STATISTICS, small(), images(), buffer[:0]).network(update)
    assert {layer.input_grid for _, layer in quantized_layers(network)} == {None}


def test_a_score_is_that_of_the_network_and_leaves_no_trace():
    model, held_out = small(), images(60, seed=1)
    before = state_of(model)
    evaluator = Evaluator(Settings(), model, held_out, images())
    update = to_bits(state_of(small(2)), 4)
    first = evaluator.score(update)
    assert first == evaluate(evaluator.network(update), held_out)
    assert first.num_examples == 60
    other = evaluator.score(shifted(update))
    assert other.loss != first.loss
    assert evaluator.score(update) == first
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())


# --- CalibratedRounding --------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_those_of_rounding_the_network_for_the_buffer(bits):
    model, buffer = small(), images(50)
    state = state_of(small(3))
    update = CalibratedRounding(Settings(), model, buffer)(state, bits)
    plain = small(3)
    network = at_width(plain, Settings(), bits)
    calibrate_activations(network, buffer)
    expected = round_weights(network, buffer)
    nearest = to_bits(state, bits)
    assert (update.bits, update.content) == (bits, "weights")
    assert update.quantized.keys() == expected.keys() == nearest.quantized.keys()
    for name, tensor in update.quantized.items():
        assert torch.equal(tensor.codes, expected[name].codes)
        assert torch.equal(tensor.scale, fit_scale(state[name], bits))
        assert not torch.equal(tensor.codes, nearest.quantized[name].codes)
    # Nothing else changes, the statistics of the buffer included.
    assert update.floats.keys() == nearest.floats.keys()
    assert all(torch.equal(t, state[n]) for n, t in update.floats.items())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in state_of(small()).items())


@pytest.mark.parametrize("step", [0.0, 2.0**-5])
def test_a_layer_that_no_image_reaches_is_rounded_to_nearest(step):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(64, 10), nn.Linear(5, 4)

        def forward(self, x):
            return self.used(x.flatten(1))

    torch.manual_seed(0)
    model = Net()
    settings = Settings(low_bit_training="strict", weight_step=step)
    update = CalibratedRounding(settings, model, images())(state_of(model), 4)
    scales = {"used.weight": torch.full((10,), step), "spare.weight": torch.full((4,), step)}
    nearest = to_bits(state_of(model), 4, scales if step else None).quantized
    # In fixed point all layers have the one step.
    for name, tensor in update.quantized.items():
        assert torch.equal(tensor.scale, nearest[name].scale)
    assert torch.equal(update.quantized["spare.weight"].codes, nearest["spare.weight"].codes)
    assert not torch.equal(update.quantized["used.weight"].codes, nearest["used.weight"].codes)


def test_the_last_model_of_each_width_is_kept_and_no_other(monkeypatch):
    calls = []

    def counted(model, pixels):
        calls.append(1)
        return round_weights(model, pixels)

    monkeypatch.setattr("server_app.evaluation.round_weights", counted)
    rounding = CalibratedRounding(Settings(), small(), images())
    state = state_of(small(3))
    first = rounding(state, 4)
    again = rounding({n: t.clone() for n, t in state.items()}, 4)
    assert_same_update(again, first)
    assert len(calls) == 1
    eight = rounding(state, 8)
    assert eight.bits == 8
    assert len(calls) == 2
    assert_same_update(rounding(state, 4), first)
    assert len(calls) == 2
    # One value of one tensor, also one that is not quantized, makes another model.
    for name in ("1.bias", "1.running_mean", "4.weight"):
        other = {n: t.clone() for n, t in state.items()}
        other[name].flatten()[0] += 0.5
        update = rounding(other, 4)
        assert_same_update(update, CalibratedRounding(Settings(), small(), images())(other, 4))
        if name != "4.weight":
            assert update.floats[name][0] == other[name][0]
    assert len(calls) == 2 + 2 * 3
    assert_same_update(rounding(state, 4), first)
    assert_same_update(rounding(state, 8), eight)
    assert len(calls) == 2 + 2 * 3 + 1


def test_outputs_on_the_buffer_stay_nearer_than_with_nearest_rounding():
    model, buffer = build_model("resnet8", 1, 8, 10, 0), images(64)
    settings = Settings(activation_bits=32)
    evaluator = Evaluator(settings, model, images(), buffer)
    state = state_of(model)
    rounding = CalibratedRounding(settings, model, buffer)

    def logits(update):
        with torch.no_grad():
            return evaluator.network(update).eval()(to_input(buffer.pixels))

    truth = logits(to_bits(state, 32))
    for bits in (2, 4):
        errors = [
            float((logits(update) - truth).square().mean())
            for update in (rounding(state, bits), to_bits(state, bits))
        ]
        assert errors[0] < 0.8 * errors[1]


# --- broadcast, from the settings ----------------------------------------------------------------

NAMES = [f"{name}:FedAvg" if k.suffix else name for name, k in STRATEGIES.items()]


def built(**settings):
    given = {k.replace("_", "-"): v for k, v in settings.items()}
    return choose_strategy(*read_settings(given)).make()


@pytest.mark.parametrize("training", ["strict", "qat"])
@pytest.mark.parametrize("name", NAMES)
def test_auto_is_calibrated_for_prowd_in_strict_training_and_float32_for_others(name, training):
    expected = "calibrated" if (name, training) == ("prowd", "strict") else "float32"
    assert built(strategy=name, low_bit_training=training).context.broadcast == expected


@pytest.mark.parametrize(
    ("buffer", "expected"), [(0, "float32"), (1, "float32"), (2, "calibrated")]
)
def test_auto_needs_a_buffer(buffer, expected):
    settings = {"calibrate_normalization": False, "server_buffer": buffer}
    assert built(low_bit_training="strict", **settings).context.broadcast == expected


@pytest.mark.parametrize("broadcast", ["float32", "nearest", "calibrated"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_for_is_used_by_every_strategy(name, broadcast):
    for training in ("strict", "qat"):
        settings = {"strategy": name, "broadcast": broadcast, "low_bit_training": training}
        if name == "fedcomgate" and broadcast != "float32":
            with pytest.raises(SettingsError, match=f"broadcast: '{broadcast}' with fedcomgate"):
                built(**settings)
            continue
        strategy = built(**settings)
        assert strategy.context.broadcast == broadcast


@pytest.mark.parametrize("buffer", [0, 1])
@pytest.mark.parametrize("name", ["prowd", "fedavg", "local", "flwr:FedAvg"])
def test_calibrated_without_a_buffer_is_refused_in_one_line(name, buffer):
    settings = {"calibrate_normalization": False, "server_buffer": buffer, "strategy": name}
    with pytest.raises(SettingsError) as error:
        built(broadcast="calibrated", **settings)
    assert str(error.value).startswith(f"server-buffer: {buffer} ")
    assert "broadcast=calibrated" in str(error.value)
    assert "allowed: 2 or more" in str(error.value)
    assert "\n" not in str(error.value)
    assert built(broadcast="nearest", **settings).context.broadcast == "nearest"


def test_an_unknown_broadcast_is_refused_in_one_line():
    with pytest.raises(SettingsError) as error:
        built(broadcast="float16")
    assert str(error.value).startswith("broadcast: 'float16' is not allowed")
    assert "\n" not in str(error.value)


# --- the real app --------------------------------------------------------------------------------

SPEC = spec_of(build_model("resnet8", 1, 8, 10, seed=0))


def run(tmp_path, monkeypatch, **settings):
    """Run the real app; return the grid and what was evaluated, in order."""
    config = {
        "num-server-rounds": 2,
        "samples-per-client": 16,
        "server-buffer": 32,
        "model": "resnet8",
        "prowd-finetune-every": 0,
        "bit-mix": "2:0.3,4:0.3,32:0.4",
        "low-bit-training": "strict",
        "output-dir": str(tmp_path),
        "run-name": "run",
        **settings,
    }
    evaluated: list[tuple[Update, dict, dict]] = []
    network = Evaluator.network

    def noting(self, model):
        made = network(self, model)
        weights = {f"{n}.weight": q.quantized_weight() for n, q in quantized_layers(made)}
        evaluated.append((model, weights, weight_scales(made)))
        return made

    monkeypatch.setattr(Evaluator, "network", noting)
    grid = InProcessGrid({10 + i: ClientAppNode(i, 3, config) for i in range(3)})
    main(grid, Context(1, 0, {}, RecordDict(), config))
    return grid, evaluated


@pytest.mark.parametrize(
    ("strategy", "broadcast", "training"),
    [
        ("prowd", "auto", "strict"),
        ("grouped-avg", "calibrated", "qat"),
    ],
)
def test_clients_start_on_exactly_the_codes_that_were_evaluated(
    tmp_path, monkeypatch, strategy, broadcast, training
):
    settings = {"strategy": strategy, "broadcast": broadcast, "low-bit-training": training}
    grid, evaluated = run(tmp_path, monkeypatch, **settings)
    # Three widths after each of two rounds, and the model that is written in the end.
    assert [model.bits for model, _, _ in evaluated] == [2, 4, 32, 2, 4, 32, 32]
    models = {model.bits: (model, weights, scales) for model, weights, scales in evaluated[:3]}
    trained = [m for m in grid.sent if m.metadata.message_type == "train"]
    assert len(trained) == 6
    # The first model is the seed's.
    first = to_bits(federated_state(build_model("resnet8", 1, 8, 10, 0)), 2).quantized
    sent = decode(trained[2].content[MODEL][MODEL].data, SPEC, 2).quantized
    for name, tensor in sent.items():
        assert torch.equal(tensor.scale, first[name].scale)
        assert torch.equal(tensor.codes, first[name].codes) == (broadcast == "nearest")
    for message in trained[3:]:
        instruction = Instruction.from_record(message.content[INSTRUCTION])
        node = grid.nodes[message.metadata.dst_node_id]
        bits = (2, 4, 32)[node.config["partition-id"]]
        assert (instruction.server_round, instruction.downlink_bits) == (2, bits)
        sent = decode(message.content[MODEL][MODEL].data, SPEC, bits)
        model, weights, scales = models[bits]
        assert_same_update(sent, model)
        if bits == 32:
            continue
        # And what the client then computes with is what the server evaluated with.
        with in_an_actor():
            job = client_app._read_job(message, node.context)
        network = at_width(job.model, job.settings, bits)
        set_scales(network, job.scales)
        for name, layer in quantized_layers(network):
            assert torch.equal(layer.quantized_weight(), weights[f"{name}.weight"])
            assert torch.equal(layer.weight_scale, scales[f"{name}.weight"])


def test_local_clients_begin_on_codes_and_are_sent_nothing_more(tmp_path, monkeypatch):
    grid, evaluated = run(tmp_path, monkeypatch, strategy="local", broadcast="calibrated")
    assert evaluated == []
    carrying = [m for m in grid.sent if MODEL in m.content]
    widths = [
        Instruction.from_record(m.content[INSTRUCTION]).downlink_bits
        for m in carrying
        if m.metadata.message_type == "train"
    ]
    assert widths == [32, 4, 2]
    assert len(carrying) == 3


class Noisy(nn.Module):
    """Draws random numbers in evaluation too, as Monte Carlo dropout does."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(1), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(F.dropout(self.norm(x).flatten(1), 0.5, training=True))


def test_a_model_that_draws_in_evaluation_is_evaluated_under_seed_and_round():
    held_out, buffer = images(200), images(20, seed=1)
    torch.manual_seed(0)
    model = Noisy()
    update = to_bits(state_of(model), 8)

    def score(seed, server_round):
        torch.rand(7)  # Whatever was drawn before.
        evaluator = Evaluator(Settings(seed=seed), model, held_out, buffer)
        return evaluator.score(update, server_round)

    before = torch.get_rng_state()
    evaluate(model, held_out)
    assert torch.equal(torch.get_rng_state(), before)
    assert score(3, 1) == score(3, 1)
    assert len({score(3, 1), score(3, 2), score(4, 1)}) == 3
    codes = []
    for _ in range(2):
        torch.rand(7)
        rounded = CalibratedRounding(Settings(seed=3), model, buffer)(state_of(model), 3)
        codes.append(rounded.quantized["head.weight"].codes)
    assert torch.equal(*codes)


def test_clients_evaluate_a_model_that_draws_under_seed_and_round(tmp_path, monkeypatch):
    seeds = []
    real = client_app.evaluate

    def seen(model, held_out, seed):
        seeds.append(seed)
        return real(model, held_out, seed)

    monkeypatch.setattr(client_app, "evaluate", seen)
    for name in ("one", "other"):
        config = {
            "strategy": "fedavg",
            "model": "toy:net",
            "bit-mix": "8:0.5,32:0.5",
            "samples-per-client": 16,
            "server-buffer": 16,
            "fraction-evaluate": 1.0,
            "num-server-rounds": 2,
            "output-dir": str(tmp_path),
            "run-name": name,
        }
        grid = InProcessGrid({10 + i: ClientAppNode(i, 2, config) for i in range(2)})
        main(grid, Context(1, 0, {}, RecordDict(), config))
    assert seeds[:4] == seeds[4:]
    assert len(set(seeds)) == 4


def test_dropout_of_the_distillation_has_one_mask_in_a_round_and_another_in_the_next():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    predict = make_predict(model, images())
    state = state_of(model)

    def logits(server_round, seed=5):
        torch.rand(7)
        strategy = ProWD(context=StrategyContext(seed=seed, predict=predict))
        return strategy._predicting(server_round, state)({})

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert not torch.equal(logits(1), logits(1, seed=6))
