"""The text task: windows of bytes, a small GPT, and what is refused by name."""

import json

import pytest
import torch
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict

from core.errors import SettingsError
from core.settings import Settings
from server_app.app import main
from task import Node
from task.tasks import make_task
from task.text import TextTask

TEXT = "".join(f"{n} bottles of beer on the wall, {n} bottles of beer. " for n in range(99, 0, -1))


def text_task(**settings):
    return make_task(Settings(task="text", **settings))


def test_targets_are_the_next_bytes(tmp_path):
    (tmp_path / "song.txt").write_text(TEXT)
    task = text_task(data_dir=str(tmp_path), task_options="context = 16")
    inputs, targets = task.test_data()
    # Every tenth window of 17 bytes is the server's.
    window = TEXT.encode()[9 * 17 : 10 * 17]
    assert bytes(inputs[0].tolist()) == window[:-1]
    assert bytes(targets[0].tolist()) == window[1:]


def test_common_text_is_partitioned_without_the_test_set():
    task = text_task(task_options="context = 64")
    parts = [task.train_data(Node(i, 3))[0] for i in range(3)]
    test = task.test_data()[0]
    rows = [tuple(row.tolist()) for part in (*parts, test) for row in part]
    assert len(rows) == 464_970 // 65 or len(rows) > 1000
    assert abs(len(parts[0]) - len(parts[2])) <= 1
    assert 0.09 < len(test) / len(rows) < 0.11


def test_the_network_does_not_see_the_future():
    model = text_task().model(0).eval()
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (tokens[0, 12] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("context = 1", "task-options: context: 1 is not allowed"),
        ("width = 30", "task-options: width 30 is no multiple of heads 4"),
        ("depth = 'deep'", "task-options: depth: 'deep' is not allowed"),
    ],
)
def test_wrong_options_are_named(options, line):
    with pytest.raises(SettingsError, match=line):
        text_task(task_options=options).model(0)


def test_text_that_cannot_be_learned_is_refused_by_name(tmp_path):
    node = Node(data_path=str(tmp_path))
    with pytest.raises(SettingsError, match=f"data-path: {tmp_path} holds no file"):
        text_task().train_data(node)
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(
        SettingsError, match=r"^data-path: .*short.txt holds 11 bytes of text, which"
    ):
        text_task().train_data(Node(data_path=str(tmp_path / "short.txt")))
    with pytest.raises(SettingsError, match=r"data-path: .*absent.txt cannot be read: No such"):
        text_task().train_data(Node(data_path=str(tmp_path / "absent.txt")))


def test_bytes_of_any_encoding_are_text(tmp_path):
    (tmp_path / "a.txt").write_bytes((TEXT + "Grüße an alle. ").encode("utf-16") * 2)
    inputs, _ = text_task().train_data(Node(data_path=str(tmp_path)))
    assert int(inputs.max()) > 127
    assert isinstance(text_task(), TextTask)


def test_devices_with_text_of_their_own_learn_to_write(tmp_path):
    """A song whose next byte is mostly known; a guess of the commonest byte has 16 %."""
    nodes, config = (
        {},
        {
            "task": "text",
            "task-options": "context = 32, width = 32, depth = 1",
            "data-dir": str(tmp_path / "server"),
            "num-server-rounds": 4,
            "learning-rate": 0.1,
            "batch-size": 8,
            "min-nodes": 2,
            "node-wait": 1.0,
            "output-dir": str(tmp_path),
            "run-name": "run",
        },
    )
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "song.txt").write_text(TEXT)
    for i, bits in enumerate((8, 32)):
        (tmp_path / f"{i}.txt").write_text(TEXT * 2)
        node = ClientAppNode(i, 2, config)
        node.config = {"data-path": str(tmp_path / f"{i}.txt"), "bits": bits}
        node.lose_state()
        nodes[50 + i] = node
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["clients"]["aggregated"] == 2
    assert min(last["accuracy"].values()) > 0.3
