"""Tasks of one's own through whole runs: real ClientApps and the server's loop, at mixed widths."""

import json

import numpy as np
import pytest
import torch
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from my_tasks import CLASSES, Regression, Signals, signals
from torch import nn

from core.errors import SettingsError
from core.settings import Settings
from server_app.app import main
from task import DatasetExamples, Node, Task, TensorExamples
from task.tasks import make_task

WIDTHS = (4, 8, 32)


@pytest.fixture
def run(tmp_path):
    def run(node_configs=None, **settings):
        config = {
            "num-server-rounds": 2,
            "learning-rate": 0.1,
            "batch-size": 8,
            "bit-mix": "4:0.34,8:0.33,32:0.33",
            "node-wait": 1.0,
            "output-dir": str(tmp_path),
            "run-name": "run",
            **{k.replace("_", "-"): v for k, v in settings.items()},
        }
        nodes = {}
        for i, bits in enumerate(WIDTHS):
            node = ClientAppNode(i, len(WIDTHS), config, {"bits": bits})
            if node_configs is not None:
                node.config = node_configs[i]
                node.lose_state()
            nodes[50 + i] = node
        main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
        lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize("training", ["qat", "strict"])
@pytest.mark.parametrize("strategy", ["prowd", "fedavg", "fedcom", "local", "flwr:FedAdam"])
def test_a_task_of_ones_own_is_learned_at_every_width(run, strategy, training):
    rounds = run(
        task="my_tasks:Signals", strategy=strategy, low_bit_training=training, num_server_rounds=8
    )
    assert rounds[-1]["clients"]["aggregated"] == 3
    assert set(rounds[-1]["accuracy"]) == {"4", "8", "32", "average"}
    # Three kinds: a guess has a third.
    least = 0.5 if strategy == "flwr:FedAdam" else 0.8
    assert rounds[-1]["accuracy"]["32"] > least
    assert rounds[-1]["accuracy"]["8"] > least


def test_options_of_a_task_reach_server_and_devices(run, tmp_path):
    run(task="my_tasks:Signals", task_options="width = 5")
    from safetensors.torch import load_file

    assert load_file(tmp_path / "run" / "model.safetensors")["0.weight"].shape == (5, 6, 3)


def test_without_a_test_set_devices_evaluate_on_what_they_do_not_train_on(run):
    rounds = run(task="my_tasks:OnDevices", num_server_rounds=8)
    for entry in rounds:
        assert set(entry["accuracy"]) == {"4", "8", "32", "average"}
        assert entry["left_out_of_evaluation"] == {}
    assert rounds[-1]["accuracy"]["average"] > 0.8


def test_calibrated_rounding_without_inputs_on_the_server_is_refused(run):
    with pytest.raises(SettingsError, match="broadcast: calibrated, and the server has 0 unlabel"):
        run(task="my_tasks:OnDevices", broadcast="calibrated")


def test_prowd_in_strict_training_does_without_inputs_on_the_server(run, tmp_path):
    run(task="my_tasks:OnDevices", low_bit_training="strict")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["chosen"]["broadcast"] == "float32"


def test_a_loss_and_metrics_of_ones_own(run):
    rounds = run(task="my_tasks:Regression", num_server_rounds=6, learning_rate=0.02)
    assert rounds[-1]["accuracy"]["32"] < rounds[0]["accuracy"]["32"]
    assert rounds[-1]["loss"]["32"] < 0.8 * rounds[0]["loss"]["32"]


def test_metrics_add_up_over_batches():
    """A mean of means would count a last, small batch as much as the others."""
    task = Regression(Settings())
    examples = task.as_examples(task.test_data())
    model = task.model(0)
    from task.training import evaluate

    score = evaluate(model, examples)
    inputs, targets = signals(40, 99)
    with torch.no_grad():
        errors = (model(inputs)[:, 0] - targets).abs()
    assert score.metrics["error"] == pytest.approx(float(errors.mean()))
    assert score.accuracy == score.metrics["error"]
    assert score.loss == pytest.approx(float(errors.square().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sound", "task: there is no 'sound'; allowed: images, package.module:Class"),
        ("my_tasks:Absent", "task: my_tasks (.*) has no 'Absent'"),
        ("my_tasks:signals", "task: 'my_tasks:signals' is no subclass of task.Task"),
        ("my_tasks:Unfinished", "task: 'my_tasks:Unfinished' does not define model and train_data"),
        ("my_tasks:NoModel", "task: 'my_tasks:NoModel.model' gives a str; allowed: an nn.Module"),
        ("my_tasks:Unrepeatable", "model: 'my_tasks:Unrepeatable.model' gives other weights"),
        ("my_tasks:Raises", "OSError: the sensor is unplugged"),
    ],
)
def test_a_task_that_cannot_be_learned_ends_the_run_with_one_line(run, tmp_path, name, line):
    with pytest.raises(Exception, match=line) as raised:
        run(task=name)
    assert "\n" not in str(raised.value)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_wrong_options_of_a_task_are_named(run):
    with pytest.raises(SettingsError, match="task-options: width: 'wide' is not allowed"):
        run(task="my_tasks:Signals", task_options="width = 'wide'")
    with pytest.raises(SettingsError, match="task-options: colour: there is no such setting"):
        run(task="my_tasks:Signals", task_options="colour = 3", run_name="other")


def test_a_device_that_cannot_take_part_says_why_and_the_others_go_on(run, caplog):
    rounds = run(task="my_tasks:Refuses")
    assert rounds[-1]["clients"]["sampled"] == 2
    assert "sensor: it has recorded nothing yet" in caplog.text


def test_a_device_with_another_model_is_left_out_with_a_line(run):
    with pytest.raises(
        Exception, match=r"first round: model: .* on this device is not the server's"
    ):
        run(task="my_tasks:OtherShape")


# --- data of the device's own --------------------------------------------------------------------


def own(tmp_path, i, bits, count=40):
    folder = tmp_path / f"site{i}"
    folder.mkdir()
    torch.save(signals(count, 10 + i), folder / "signals.pt")
    return {"data-path": str(folder), "bits": bits}


def test_devices_learn_from_data_that_only_they_have(run, tmp_path):
    configs = [own(tmp_path, i, bits) for i, bits in enumerate(WIDTHS)]
    rounds = run(configs, task="my_tasks:Signals", num_server_rounds=8, min_nodes=3)
    assert rounds[0]["clients"] == {"sampled": 3, "aggregated": 3, "rejected": 0, "failed": 0}
    assert rounds[-1]["accuracy"]["average"] > 0.8


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"data-path": "relative"}, "node-config: data-path is 'relative'; it must be an absolute"),
        ({"data-path": 3}, "node-config: data-path is 3; it must be an absolute path"),
        (
            {"data-path": "/x", "partition-id": 0},
            "data-path '/x' beside partition-id; allowed: ",
        ),
        ({}, "node-config: partition-id is None"),
    ],
)
def test_a_node_that_names_its_data_wrongly_is_refused(run, tmp_path, caplog, config, line):
    good = [own(tmp_path, i, bits) for i, bits in enumerate(WIDTHS[1:])]
    rounds = run([{"bits": 4, **config}, *good], task="my_tasks:Signals", min_nodes=2)
    assert rounds[-1]["clients"]["aggregated"] == 2
    assert line in caplog.text


def test_a_node_with_a_partition_does_not_join_those_with_data_of_their_own(run, tmp_path, caplog):
    configs = [own(tmp_path, i, bits) for i, bits in enumerate(WIDTHS[:2])]
    configs.append({"partition-id": 0, "num-partitions": 1, "bits": 32})
    rounds = run(configs, task="my_tasks:Signals", min_nodes=2)
    assert rounds[-1]["clients"]["sampled"] == 2
    assert "partition 0 of 1; the others have data of their own" in caplog.text


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, (10, 40, 40)),
        ({"max_examples": 20}, (10, 20, 20)),
        ({"weighting": "uniform"}, (1, 1, 1)),
    ],
)
def test_what_a_device_counts_for(run, tmp_path, monkeypatch, settings, weights):
    """The new bias of the head, which is float32 at every width, is the weighted mean."""
    counts = (12, 50, 50)  # A fifth is held out.
    configs = [own(tmp_path, i, b, n) for i, (b, n) in enumerate(zip(WIDTHS, counts, strict=True))]
    seen = []
    import strategies.fedavg

    real = strategies.fedavg.FedAvg.combine

    def combine(self, server_round, start, updates):
        kept = list(updates)
        seen.append([(u.report.num_examples, u.update.floats["3.bias"]) for u in kept])
        return real(self, server_round, start, iter(kept))

    monkeypatch.setattr(strategies.fedavg.FedAvg, "combine", combine)
    run(configs, task="my_tasks:OnDevices", strategy="fedavg", min_nodes=3, **settings)
    assert tuple(count for count, _ in seen[0]) == weights


def test_the_order_of_nodes_that_have_their_own_data_does_not_matter(run, tmp_path):
    configs = [own(tmp_path, i, bits) for i, bits in enumerate(WIDTHS)]
    one = run(configs, task="my_tasks:Signals", min_nodes=3)
    again = run(configs, task="my_tasks:Signals", min_nodes=3, run_name="again", seed=0)
    assert [e["accuracy"] for e in one] == [e["accuracy"] for e in again[: len(one)]]


# --- the interface -------------------------------------------------------------------------------


class Counting(Task):
    """Ten numbers."""

    def model(self, seed):
        return nn.Linear(1, CLASSES)

    def train_data(self, node):
        return torch.arange(10.0)[:, None], torch.arange(10) % CLASSES


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.2, 2), (0.5, 5)])
def test_what_is_held_out_is_never_trained_on(share, held):
    task = Counting(Settings(local_test_share=share))
    parts = task.examples(Node(0, 1)), task.local_test_examples(Node(0, 1))
    values = [p.inputs(np.arange(len(p))).flatten().tolist() for p in parts]
    assert len(values[1]) == held
    assert sorted(values[0] + values[1]) == list(range(10))
    assert [len(task.examples(Node(0, 1))) for _ in range(2)] == [10 - held] * 2


def test_tensors_and_datasets_are_both_examples():
    task = Signals(Settings())
    assert isinstance(task.examples(Node(0, 2)), TensorExamples)
    pairs = Regression(Settings()).examples(Node(0, 2))
    assert isinstance(pairs, DatasetExamples)
    inputs, targets = pairs.batch(np.array([1, 3]))
    assert torch.equal(inputs, torch.stack([pairs.data[int(i)][0] for i in pairs.index[[1, 3]]]))
    assert targets.shape == (2,)


def test_the_built_in_task_is_made_by_name():
    assert type(make_task(Settings())).__name__ == "ImageTask"
