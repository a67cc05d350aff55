"""What a run survives: one run through the rehearsed federation, in which nearly all goes wrong.

Round 2: one ClientApp raises, one site's SuperNode is killed while its ClientApp trains, one site's
link is cut. Round 3: one ClientApp's process dies, one answers after the round's timeout. Round 4:
everybody is back, and the SuperLink is killed.
"""

import re
import shutil

import pytest
from containers import wait_until

INT4, INT8_A, INT8_B, FLOAT32 = range(4)

# What the test's copy of the app does with a training message, by round and partition.
FAULTS = {2: {INT8_A: "raise"}, 3: {INT8_A: "die", INT4: "sleep"}}
FAULTY_APP = """
import os, time
from flwr.clientapp import ClientApp
from client_app.app import app as real_app
from task.protocol import INSTRUCTION

FAULTS, TIMEOUT = {faults!r}, {timeout!r}
app = ClientApp()


@app.query()
def query(message, context):
    return real_app(message, context)


@app.train()
def train(message, context):
    server_round = message.content[INSTRUCTION]["server_round"]
    fault = FAULTS.get(server_round, {{}}).get(context.node_config["partition-id"])
    if fault == "raise":
        raise RuntimeError("the accelerator is on fire")
    if fault == "die":
        os._exit(1)
    if fault == "sleep":
        time.sleep(TIMEOUT)  # The round began earlier than this.
    return real_app(message, context)
"""


@pytest.fixture(scope="module")
def round_timeout(resumed):
    """Seconds that no sound client needs on this machine; two are more than Flower's lapse.

    In round 4 one has its late answer to round 3 to finish, and the SuperLink is gone for a while.
    """
    return max(40.0, 2.5 * resumed.rounds[0]["seconds"]["train"])


@pytest.fixture(scope="module")
def faulty_run(rehearsal, round_timeout):
    """The run, at its end."""
    app = rehearsal.results("faulty-app")
    copy_app(rehearsal.app, app, FAULTY_APP.format(faults=FAULTS, timeout=round_timeout))
    run_id = rehearsal.start_run(
        "faulty",
        f"/srv/prowd/prowd-runs/{app.name}",
        num_server_rounds=4,
        round_timeout=round_timeout,
        # So that the bytes tell what came.
        lossless_coding=False,
    )
    rehearsal.begin_round(run_id, "int8-b", 2)
    rehearsal.set_link("int8-b", "uplink-int8-b", "down")
    rehearsal.begin_round(run_id, "float32", 2)
    rehearsal.services["float32"].kill()
    wait_until(lambda: len(rehearsal.rounds("faulty")) == 2, 3 * round_timeout, "round 2 ends")
    rehearsal.set_link("int8-b", "uplink-int8-b", "up")
    rehearsal.begin_round(run_id, "int4", 4)
    rehearsal.services["superlink"].kill()
    return rehearsal.wait_for_run("faulty", run_id, 5 * round_timeout)


def copy_app(source, folder, client_app):
    """Write a copy of the app with another ClientApp."""
    folders = ["client_app", "quant", "server_app", "strategies", "task"]
    for name in folders:
        shutil.copytree(source / name, folder / name)
    for name in ("LICENSE", "README.md"):
        shutil.copy(source / name, folder / name)
    settings = (source / "pyproject.toml").read_text()
    settings = settings.replace('"client_app.app:app"', '"faulty:app"')
    settings = settings.replace('"client_app/**/*.py",', '"client_app/**/*.py", "faulty.py",')
    (folder / "pyproject.toml").write_text(settings)
    (folder / "faulty.py").write_text(client_app)


def test_the_run_ends_completed_with_all_its_rounds(rehearsal, faulty_run):
    assert faulty_run == "finished:completed"
    assert rehearsal.summary("faulty")["status"] == "completed"
    assert [entry["round"] for entry in rehearsal.rounds("faulty")] == [1, 2, 3, 4]


def test_what_failed_is_left_out_and_recorded(rehearsal, faulty_run):
    _, second, third, _ = rehearsal.rounds("faulty")
    assert second["clients"] == {"sampled": 4, "aggregated": 1, "rejected": 0, "failed": 3}
    assert second["left_out"].keys() == {str(INT8_A), str(INT8_B), str(FLOAT32)}
    assert "the accelerator is on fire" in second["left_out"][str(INT8_A)]
    assert third["clients"]["failed"] == len(third["left_out"])
    # Whichever comes first: the round's timeout, or that Flower gives the node or the app up.
    for reason in (
        second["left_out"][str(INT8_B)],
        second["left_out"][str(FLOAT32)],
        third["left_out"][str(INT8_A)],
    ):
        assert re.search("no reply in time|Node Unavailable|stopped responding", reason)
    assert third["left_out"][str(INT4)] == "no reply in time"


def test_only_what_came_in_time_is_in_the_model(rehearsal, faulty_run):
    """The one good reply of round 2, of a known size; the late one of round 3 never, also not in
    round 4, when it came."""
    first, second, third, fourth = rehearsal.rounds("faulty")
    assert second["uplink_bytes"] == {"4": first["uplink_bytes"]["4"]}
    assert "4" not in third["uplink_bytes"]
    assert fourth["uplink_bytes"] == first["uplink_bytes"]


def test_all_come_back_by_themselves(rehearsal, faulty_run):
    """The killed SuperNode was refused until its old connection lapsed, and tried again."""
    fourth = rehearsal.rounds("faulty")[3]
    assert fourth["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
    assert len(rehearsal.services["float32"].exits) > 1


def test_the_superlink_was_killed_in_the_last_round(rehearsal, faulty_run):
    assert len(rehearsal.services["superlink"].exits) == 1
