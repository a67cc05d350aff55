"""docs/privacy.md: the command of differential privacy runs, and states its epsilon."""

import json

import pytest
from documents import section
from federation import ClientAppNode, SimulatedGrid
from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args

from privacy.accounting import Mechanism, epsilon_after
from server_app.app import main


def test_the_command_has_noise_of_the_devices_and_states_its_epsilon(tmp_path):
    example = section("privacy.md", "Differential privacy")
    [command] = example.commands
    federation = parse_config_args([command[command.index("--federation-config") + 1]])
    clients = federation["num-supernodes"]
    config = {**example.run_config, "output-dir": str(tmp_path), "run-name": "run"}
    config["model"] = "toy:net"
    nodes = {50 + i: ClientAppNode(i, clients, config) for i in range(clients)}
    main(SimulatedGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    noise = Mechanism(config["dp-noise-multiplier"], discrete=True)
    wanted = epsilon_after(noise, config["num-server-rounds"], summary["privacy"]["delta"])
    assert summary["privacy"]["epsilon"] == pytest.approx(wanted, rel=1e-3)
