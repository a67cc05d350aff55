"""Tasks of one's own through whole runs: real ClientApps and the server's loop, at mixed widths."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from my_tasks import CLASSES, OnDevices, Regression, Signals, signals
from torch import nn

from core.errors import SettingsError
from core.settings import Settings
from prowd.records import read_record
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


@pytest.mark.parametrize(
    ("strategy", "training"),
    [
        ("prowd", "qat"),
        ("prowd", "strict"),
        ("local", "strict"),
        ("flwr:FedAdam", "strict"),
    ],
)
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


def test_devices_report_all_metrics_by_width(run, tmp_path):
    """Beside the headline; one that is infinite is cut, as it could not be sent or averaged."""
    rounds = run(task="my_tasks:Density")
    for entry in rounds:
        found = entry["evaluated_by_clients"]
        assert entry["metrics"].keys() == {"4", "8", "32"}
        for width, metrics in entry["metrics"].items():
            assert metrics.keys() == {"accuracy", "recall-1", "perplexity"}
            assert metrics["accuracy"] == entry["accuracy"][width]
            assert 0 <= metrics["recall-1"] <= 1
            assert metrics["perplexity"] == 1e100
            assert found[f"recall-1/least-{width}"] == metrics["recall-1"]
    [read] = read_record(tmp_path / "run").rounds[-1:]
    assert read.metrics["8"]["recall-1"] == rounds[-1]["metrics"]["8"]["recall-1"]


@pytest.mark.parametrize("training", ["qat", "strict"])
def test_a_network_may_give_more_than_a_tensor_to_its_own_loss(run, training):
    """At all widths, with calibration and ProWD's dequantizer trained."""
    settings = {"low_bit_training": training, "prowd_finetune_every": 1, "prowd_finetune_steps": 1}
    rounds = run(task="my_tasks:Dictionary", strategy="prowd", num_server_rounds=3, **settings)
    assert rounds[-1]["clients"]["aggregated"] == 3
    assert set(rounds[-1]["accuracy"]) == {"4", "8", "32", "average"}
    assert rounds[-1]["loss"]["32"] < rounds[0]["loss"]["32"]


def test_a_network_whose_output_the_loss_does_not_take_is_named_before_training(run):
    line = "^task: loss and metrics of 'my_tasks:TwoTensors' fail on two examples: .*'tuple'"
    with pytest.raises(SettingsError, match=line):
        run(task="my_tasks:TwoTensors")


@pytest.mark.parametrize("name", ["text", "table", "images"])
def test_a_built_in_task_makes_no_test_data_to_say_that_it_has_some(name, monkeypatch):
    task = make_task(Settings(task=name))
    monkeypatch.setattr(type(task), "local_test_data", lambda self, node: pytest.fail("made"))
    assert len(task.examples(Node(0, 10)))


@pytest.mark.parametrize("task", ["Density", "Huge"])
def test_a_loss_of_ones_own_is_any_finite_number(run, task):
    rounds = run(task=f"my_tasks:{task}", learning_rate=1e-12 if task == "Huge" else 0.1)
    for entry in rounds:
        assert entry["clients"]["aggregated"] == 3
        assert entry["left_out_of_evaluation"] == {}
        losses = [entry["train_loss"], *entry["loss"].values()]
        assert all(loss < 0 if task == "Density" else loss > 1e7 for loss in losses)


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
    for width in ("4", "8", "32"):
        found = rounds[-1]["metrics"][width]
        assert found["error"] == rounds[-1]["accuracy"][width]
        # The largest of each batch, on average.
        assert found["worst"] > found["error"]


def test_metrics_add_up_over_batches():
    """A mean of means would count a last, small batch as much as the others."""
    task = Regression(Settings())
    examples = task.as_examples(task.test_data())
    model = task.model(0)
    from task.evaluation import evaluate

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
        ("sound", "task: there is no 'sound'; allowed: images, text, table, package"),
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


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("NoMetrics", "task: metrics of 'my_tasks:NoMetrics' gives none; allowed: one or more"),
        ("Unreduced", r"task: loss of 'my_tasks:Unreduced' gives \[2\]; allowed: a tensor of one"),
        ("FloatLoss", "task: loss of 'my_tasks:FloatLoss' gives float; allowed: a tensor of one"),
        ("NestedFacts", "task: facts of 'my_tasks:NestedFacts' cannot be sent"),
        ("NoTest", "task: test_data of 'my_tasks:NoTest' has no examples; allowed: some, or None"),
        ("OddRange", "task: metric_range of 'my_tasks:OddRange' is 1.0, 0.0; allowed: rising"),
        ("ListInputs", "task: ListInputs.server_inputs gives a list; allowed: a tensor, Inputs"),
    ],
)
def test_what_a_task_returns_wrongly_is_named_before_the_first_round(run, name, line):
    with pytest.raises(SettingsError, match=line):
        run(task=f"my_tasks:{name}")


def test_devices_need_a_share_to_evaluate_on(run):
    with pytest.raises(SettingsError, match="local-test-share: 0, and the server has no test set"):
        run(task="my_tasks:OnDevices", local_test_share=0.0)


def test_a_metric_that_is_not_a_number_ends_nothing(run, tmp_path):
    run(task="my_tasks:Undefined")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["accuracy"]["best"] == {}


def test_the_best_of_an_error_is_the_smallest(run, tmp_path):
    rounds = run(task="my_tasks:Regression", num_server_rounds=4, learning_rate=0.02)
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["accuracy"]["best"]
    assert best["32"] == min(entry["accuracy"]["32"] for entry in rounds)


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


def test_one_node_with_data_of_its_own_does_not_turn_the_others_out(run, tmp_path, caplog):
    configs = [own(tmp_path, 0, 4)]
    configs += [{"partition-id": i, "num-partitions": 2, "bits": 32} for i in range(2)]
    rounds = run(configs, task="my_tasks:Signals", min_nodes=2)
    assert rounds[-1]["clients"]["sampled"] == 2
    assert "it has data of its own (data-path); the others hold partitions" in caplog.text


def test_where_all_are_refused_the_reason_is_theirs(run):
    with pytest.raises(Exception, match="data-path is 'here'; it must be an absolute path"):
        run([{"data-path": "here", "bits": 8}] * 3, task="my_tasks:Signals")


def test_a_device_whose_data_grow_stays_and_weighs_what_it_declared(run, tmp_path, monkeypatch):
    configs = [own(tmp_path, i, bits) for i, bits in enumerate(WIDTHS)]
    from client_app import app as client

    real = client.train

    def train(*args, **kwargs):
        torch.save(signals(60, 10), tmp_path / "site0" / "signals.pt")
        return real(*args, **kwargs)

    monkeypatch.setattr(client, "train", train)
    rounds = run(configs, task="my_tasks:Signals", min_nodes=3, num_server_rounds=3)
    assert [entry["clients"]["aggregated"] for entry in rounds] == [3, 3, 3]


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, lambda count: count),
        ({"max_examples": 20}, lambda count: min(count, 20)),
        ({"weighting": "uniform"}, lambda count: 1),
    ],
)
def test_what_a_device_counts_for(run, tmp_path, monkeypatch, settings, weights):
    """The new bias of the head, which is float32 at every width, is the weighted mean."""
    counts = (12, 50, 50)
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
    task = OnDevices(Settings())
    trained = [len(task.examples(Node(data_path=config["data-path"]))) for config in configs]
    assert min(trained) < 12
    assert max(trained) > 20
    assert [count for count, _ in seen[0]] == [weights(count) for count in trained]


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


def values_of(examples):
    return set(examples.inputs(np.arange(len(examples))).flatten().tolist())


class Growing(Counting):
    """More from day to day."""

    count = 100

    def train_data(self, node):
        return torch.arange(float(self.count))[:, None], torch.arange(self.count) % CLASSES


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_what_is_held_out_is_never_trained_on_also_when_data_grows(share):
    task = Growing(Settings(local_test_share=share))
    held, trained = values_of(task.local_test_examples(Node())), values_of(task.examples(Node()))
    assert held | trained == set(range(100))
    assert not held & trained
    assert abs(len(held) - 100 * share) < 15
    task.count = 140
    assert held <= values_of(task.local_test_examples(Node()))
    assert trained <= values_of(task.examples(Node()))


@pytest.mark.parametrize("count", [2, 3])
def test_of_a_few_examples_one_is_held_out_and_one_trained_on(count):
    task = Growing(Settings(local_test_share=0.2))
    task.count = count
    assert len(task.local_test_examples(Node())) == 1
    assert len(task.examples(Node())) == count - 1


def test_sorted_data_are_calibrated_on_all_of_their_kinds():
    """Files of a folder come class by class; the first hundred would be of one."""
    task = Growing(Settings())
    task.count = 1000
    first = task.examples(Node(data_path="/x")).inputs(np.arange(50))
    assert first.min() < 200
    assert first.max() > 800


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ((torch.zeros(6, 1), torch.zeros(2)), "gives tensors of 6 and 2 examples; allowed: inputs"),
        ((torch.zeros(6, 1),), "gives tensors of 6 examples; allowed: inputs and as many targets"),
        (None, "gives a NoneType as data; allowed: two tensors, or a torch Dataset with a length"),
        (iter([]), "gives a list_iterator as data"),
    ],
)
def test_data_of_a_wrong_kind_are_named(data, line):
    with pytest.raises(SettingsError, match=f"task: Counting {line}"):
        Counting(Settings()).as_examples(data)


def test_a_list_of_two_tensors_is_a_pair():
    examples = Counting(Settings()).as_examples([torch.zeros(6, 1), torch.zeros(6)])
    assert isinstance(examples, TensorExamples)


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


@pytest.mark.parametrize("task", ["text", "table"])
def test_the_validation_part_is_no_clients_nor_of_the_test_set(task):
    def rows(data):
        return Counter(tuple(row.tolist()) for row in data)

    settings = {"task": task, "validation_samples": 60, "seed": 3}
    chosen = make_task(Settings(**settings))
    held = rows(chosen.test_data()[0])
    clients = rows(torch.cat([chosen.train_data(Node(i, 3))[0] for i in range(3)]))
    without = make_task(Settings(task=task, seed=3))
    assert held.total() == 60
    assert held + clients == rows(without.train_data(Node(0, 1))[0])
    assert rows(chosen.server_inputs()) <= clients
    with pytest.raises(SettingsError, match=r"validation-samples: 9999; there are \d+ training"):
        make_task(Settings(**{**settings, "validation_samples": 9999})).test_data()
