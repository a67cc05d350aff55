"""What low-bit clients upload, through a whole run: the record, the bytes, and idle settings."""

import json

import pytest
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict

from core.errors import SettingsError
from core.settings import Settings
from server_app.app import main
from server_app.idle import idle_settings
from strategies import FedAvg, FedCOM, ProWD, ProWDOptions, StrategyContext

BASE = {
    "model": "toy:net",
    "num-server-rounds": 2,
    "samples-per-client": 64,
    "bit-mix": "4:0.5,32:0.5",
    "evaluate-every": 2,
}


@pytest.fixture
def run(tmp_path):
    def run(**settings):
        config = {**BASE, **{k.replace("_", "-"): v for k, v in settings.items()}}
        name = "-".join(map(str, settings.values()))
        config |= {"output-dir": str(tmp_path), "run-name": name}
        nodes = {50 + i: ClientAppNode(i, 4, config) for i in range(4)}
        main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
        lines = (tmp_path / name / "rounds.jsonl").read_text().splitlines()
        config = json.loads((tmp_path / name / "config.json").read_text())
        return config, [json.loads(line) for line in lines]

    return run


@pytest.mark.parametrize(
    ("strategy", "upload"), [("fedavg", "forward"), ("fedcom", "stored"), ("prowd", "stored")]
)
def test_the_record_says_what_auto_stood_for(run, strategy, upload):
    config, _ = run(strategy=strategy)
    assert config["settings"]["upload"] == "auto"
    assert config["chosen"]["upload"] == upload
    assert config["chosen"]["broadcast"] == "float32"
    if strategy == "prowd":
        assert config["chosen"]["prowd-align"] == "off"


def test_an_upload_costs_what_its_form_takes(run):
    """Latent weights are float32; the others are codes, and few of them moved in a round."""
    up = {}
    for upload in ("forward", "dithered", "stored"):
        _, rounds = run(strategy="fedavg", upload=upload)
        up[upload] = [entry["uplink_bytes"]["4"] for entry in rounds]
        assert all(entry["clients"]["aggregated"] == 4 for entry in rounds)
    assert min(up["stored"]) > 3 * max(*up["forward"], *up["dithered"])
    assert up["stored"] == [up["stored"][0]] * 2


def test_auto_is_no_upload_of_the_library():
    with pytest.raises(SettingsError, match="upload: 'auto' is not allowed: it should be forward"):
        StrategyContext(upload="auto")
    assert FedAvg().upload == "forward"
    assert FedCOM().upload == "stored"
    assert FedCOM(context=StrategyContext(upload="dithered")).upload == "dithered"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"low-bit-training": "strict"}, "low-bit-training=strict"),
        ({"bit-mix": "32:1.0"}, "bit-mix=32:1.0"),
        ({"strategy": "local"}, "strategy=local"),
    ],
)
def test_an_upload_that_has_no_effect_is_reported(settings, why):
    lines = idle_settings({**Settings().to_settings(), "upload": "dithered", **settings})
    assert f"upload: 'dithered' has no effect with {why}" in lines


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"task": "text", "model": "cnn"}, "model: 'cnn' has no effect with task=text"),
        ({"task": "table", "image-size": 8}, "image-size: 8 has no effect with task=table"),
        ({"classes": "a,b"}, "classes: 'a,b' has no effect with dataset=digits"),
        (
            {"dataset": "image-folder", "data-dir": "/x", "image-channels": 1},
            "image-channels: 1 has no effect with data-dir=/x",
        ),
    ],
)
def test_what_a_task_does_not_look_at_is_reported(settings, line):
    assert line in idle_settings({**Settings().to_settings(), **settings})


def test_what_a_task_of_ones_own_looks_at_is_not_known():
    given = {**Settings().to_settings(), "task": "my_tasks:Signals", "model": "cnn"}
    assert not [line for line in idle_settings(given) if line.startswith("model")]


@pytest.mark.parametrize(("training", "aligns"), [("qat", "off"), ("strict", "on")])
def test_alignment_is_on_by_itself_where_it_was_seen_to_gain(training, aligns):
    context = StrategyContext(low_bit_training=training)
    assert ProWD(context=context).chosen()["prowd-align"] == aligns
    for asked in ("on", "off"):
        strategy = ProWD(ProWDOptions(align=asked), context)
        assert strategy.chosen()["prowd-align"] == asked
