"""The table task: CSV and Parquet, the columns and classes of the server, and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict

from core.errors import SettingsError
from core.settings import Settings
from server_app.app import main
from task import Node
from task.tasks import make_task

FACTS = {"columns": ["height", "weight"], "classes": ["cat", "dog"]}


def frame(count=60, seed=0, kinds=("cat", "dog")):
    """Dogs are larger."""
    rng = np.random.default_rng(seed)
    labels = [kinds[i % len(kinds)] for i in range(count)]
    size = np.array([1.0 if label == "dog" else 0.0 for label in labels])
    return pd.DataFrame(
        {
            "weight": 1000 * (size + 0.2 * rng.normal(size=count)),
            "label": labels,
            "height": size + 0.2 * rng.normal(size=count),
        }
    )


def read(path, facts=FACTS, **settings):
    task = make_task(Settings(task="table", **settings), facts)
    return task.train_data(Node(data_path=str(path)))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_and_classes_are_in_the_servers_order(tmp_path, kind):
    table = frame(6, kinds=("dog", "cat"))
    path = tmp_path / f"a.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    inputs, targets = read(path)
    np.testing.assert_allclose(inputs.numpy(), table[["height", "weight"]], rtol=1e-6)
    assert targets.tolist() == [1, 0] * 3


def write(tmp_path, table):
    path = tmp_path / "table.csv"
    table.to_csv(path, index=False)
    return path


def test_a_device_may_lack_classes(tmp_path):
    _, targets = read(write(tmp_path, frame(4, kinds=("dog",))))
    assert targets.tolist() == [1] * 4


def broken(column, row, value):
    table = frame(6).astype({column: object})
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (frame().drop(columns="weight"), "task: the table has no column weight; allowed: "),
        (frame().drop(columns="label"), "has no column 'label' (task-options: label); its columns"),
        (
            frame(kinds=("cat", "cow")),
            "classes that the server does not have: cow",
        ),
        (frame(1), "has 1 rows; allowed: 2 or more"),
        (broken("height", 2, np.nan), "row 3 of the table has nan in column 'height'"),
        (broken("weight", 4, np.inf), "row 5 of the table has inf in column 'weight'"),
        (broken("label", 3, None), "has no 'label' in row 4"),
        (
            broken("height", 1, "tall"),
            "row 2 of the table has 'tall' in column 'height' (1 rows",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_line(tmp_path, table, line):
    with pytest.raises(SettingsError) as raised:
        read(write(tmp_path, table))
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "is no table (EmptyDataError"),
        ("höhe;länge".encode("utf-16"), "is no table (UnicodeDecodeError"),
        (b'a,b\n"1,2\n', "is no table (ParserError"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path, data, line):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(SettingsError) as raised:
        read(tmp_path / "a.csv")
    assert str(raised.value).startswith(f"data-path: {tmp_path}/a.csv ")
    assert line in str(raised.value)


def test_a_folder_may_hold_the_one_table(tmp_path):
    with pytest.raises(SettingsError, match=r"^data-path: .* holds 0 files \*.csv and \*.parquet;"):
        read(tmp_path)
    write(tmp_path, frame(6))
    (tmp_path / "notes.txt").touch()
    assert len(read(tmp_path)[1]) == 6
    frame(6).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(
        SettingsError, match=r"^data-path: .* holds 2 files .*; allowed: one, or the"
    ):
        read(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"data-path: .*b.csv cannot be read: No such file"):
        read(tmp_path / "b.csv")


def run(tmp_path, config, node_configs=None):
    config = {
        "task": "table",
        "num-server-rounds": 3,
        "learning-rate": 0.1,
        "batch-size": 8,
        "node-wait": 1.0,
        "min-nodes": 3,
        "bit-mix": "4:0.34,8:0.33,32:0.33",
        "output-dir": str(tmp_path),
        "run-name": "run",
        **config,
    }
    nodes = {}
    for i in range(3):
        nodes[50 + i] = node = ClientAppNode(i, 3, config)
        if node_configs:
            node.config = node_configs[i]
            node.lose_state()
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_common_rows_are_partitioned_and_learned(tmp_path):
    rounds = run(tmp_path, {})
    assert rounds[-1]["accuracy"]["average"] > 0.8


@pytest.mark.parametrize("on_server", [True, False])
def test_devices_with_tables_of_their_own(tmp_path, on_server):
    """One of them lacks a class; without a table the server is told columns and classes."""
    configs = []
    for i, (bits, kinds) in enumerate([(4, ("cat", "dog")), (8, ("dog",)), (32, ("cat", "dog"))]):
        path = tmp_path / f"{i}.csv"
        frame(60, i, kinds).to_csv(path, index=False)
        configs.append({"data-path": str(path), "bits": bits})
    settings = {"task-options": "columns = ['height', 'weight'], classes = ['cat', 'dog']"}
    if on_server:
        frame(50, 9).to_csv(tmp_path / "server.csv", index=False)
        settings = {"data-dir": str(tmp_path / "server.csv")}
    rounds = run(tmp_path, settings, configs)
    assert rounds[-1]["clients"]["aggregated"] == 3
    assert rounds[-1]["accuracy"]["average"] > 0.8


def test_a_table_sorted_by_class_is_learned_as_one_that_is_not(tmp_path):
    """The server calibrates on rows from all over, not on the first ones."""
    table = frame(600, 9).sort_values("label")
    table.to_csv(tmp_path / "server.csv", index=False)
    rounds = run(tmp_path, {"data-dir": str(tmp_path / "server.csv"), "num-server-rounds": 2})
    assert rounds[-1]["accuracy"]["average"] > 0.9


def test_a_server_without_a_table_must_name_columns_and_classes(tmp_path):
    with pytest.raises(SettingsError, match="task-options: 0 columns and 2 classes; allowed: one"):
        run(tmp_path, {"task-options": "classes = ['cat', 'dog']"})
