"""A folder of runs that several files of tests read."""

import os

import pytest
from run_records import write_run

from server_app.record import RunRecord


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of runs: three strategies, seeds, one that failed, one that was killed."""
    folder = tmp_path_factory.mktemp("records") / "digits"
    for seed in (0, 1):
        write_run(folder / f"ProWD-{seed}", "prowd", seed)
        write_run(folder / f"FedAvg-{seed}", "fedavg", seed)
    write_run(folder / "Local-0", "local", 0)
    refused = RunRecord(folder / "refused")
    refused.write_summary("failed", "batch-size: 0 is not allowed <script>alert(1)</script>")
    reason = "RuntimeError: <b>no power</b> & more"
    killed = write_run(folder / "FedAvg-2", "fedavg", 2, 3, ends=None, left_out={"1": reason})
    with open(killed / "rounds.jsonl", "a") as file:
        file.write('{"round": 4, "accuracy": {"3"')
    os.rename(write_run(folder / "gone", "fedavg", 9), folder / "FedAvg-9.broken1")
    return folder
