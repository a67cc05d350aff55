"""docs/privacy.md: its commands run, and its figures are those of a run."""

import json
import re
import tomllib

import pytest
from documents import PROJECT, section
from federation import ClientAppNode, SimulatedGrid
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args

from core.errors import SettingsError
from core.settings import Settings
from exchange.secure_groups import SecureSettings
from privacy.accounting import Mechanism, epsilon_after
from privacy.complaints import out_by_complaints
from privacy.sum_grid import sum_widths
from quant import UpdateSpec
from server_app.app import main
from strategies import STRATEGIES, StrategyContext

PAGE = (PROJECT / "docs" / "privacy.md").read_text()
DEFAULTS = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def run_of(heading, folder):
    """Run the command of a section, with a smaller model; return its configuration."""
    example = section("privacy.md", heading)
    [command] = example.commands
    federation = parse_config_args([command[command.index("--federation-config") + 1]])
    clients = federation["num-supernodes"]
    assert example.run_config.keys() <= DEFAULTS.keys()
    config = {**DEFAULTS, **example.run_config, "output-dir": str(folder), "run-name": "run"}
    config["model"] = "toy:net"
    nodes = {50 + i: ClientAppNode(i, clients, config) for i in range(clients)}
    main(SimulatedGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    return config


@pytest.fixture(scope="module")
def rounds(tmp_path_factory):
    """The record of the first command."""
    folder = tmp_path_factory.mktemp("privacy")
    run_of("Turn it on", folder)
    lines = (folder / "run" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_command_sums_the_updates_of_both_widths(rounds):
    assert len(rounds) == 2
    for entry in rounds:
        assert entry["clients"] == {"sampled": 8, "aggregated": 8, "rejected": 0, "failed": 0}


def test_the_record_is_the_one_that_is_shown(rounds):
    [shown] = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    assert [entry["secure"] for entry in rounds] == [json.loads(f"{{{shown}}}")["secure"]] * 2


def test_settings_and_their_defaults_are_those_of_the_table():
    rows = re.findall(r"^\| `(secure-[a-z-]+)` \| `?([^ `]+)`? \|", PAGE, re.M)
    known = {k: v for k, v in Settings().to_settings().items() if k.startswith("secure-")}
    assert {key: json.loads(value) for key, value in rows} == known


def test_bits_of_twenty_devices():
    spec = UpdateSpec({"w": (2, 3)}, {"w"})
    assert [sum_widths(spec, 4, 20, 20 * w)[0][1] for w in (1, 255)] == [9, 9 + 8]
    assert [sum_widths(spec, 32, 20, 20 * w)[1][1] for w in (1, 255)] == [25, 33]
    assert "of 4 bits and equal weights 9 bits" in PAGE
    assert "weight takes 25 bits then, and 33 with weights by examples" in PAGE


@pytest.mark.parametrize(("devices", "liars"), [(20, 6), (5, 1), (4, 1), (3, 1)])
def test_how_many_that_lie_put_an_honest_device_out(devices, liars):
    assert "of 20 devices at 0.66, it takes six that lie" in PAGE
    assert "of five or fewer one is enough" in PAGE
    threshold = SecureSettings(0.66, 3, 20).least(devices)
    for count in (liars - 1, liars):
        said = {number: [devices - 1] if number < count else [] for number in range(devices)}
        assert bool(out_by_complaints(said, threshold)) == (count == liars)
    assert not out_by_complaints({0: [5], **{number: [] for number in range(1, 6)}}, 4)


@pytest.mark.parametrize("name", ["fedcomgate", "prowd-paper", "local"])
def test_what_is_refused_is_said_so(name):
    kind, context = STRATEGIES[name], StrategyContext(quantized=["w"], secure_aggregation=True)
    with pytest.raises(SettingsError, match=r"^secure-aggregation: true with ") as refused:
        kind.check_all(kind.Options(), context)
    rows = [row for row in PAGE.splitlines() if row.startswith("|") and f"`{name}`" in row]
    assert any("refused" in row for row in rows)
    if name == "fedcomgate":
        assert f"prowd: {refused.value}" in PAGE.replace("\n", " ")


def test_noise_of_the_devices_has_the_epsilon_that_is_stated(tmp_path):
    config = run_of("Differential privacy", tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    noise = Mechanism(config["dp-noise-multiplier"], discrete=True)
    wanted = epsilon_after(noise, config["num-server-rounds"], summary["privacy"]["delta"])
    assert summary["privacy"]["epsilon"] == pytest.approx(wanted, rel=1e-3)
