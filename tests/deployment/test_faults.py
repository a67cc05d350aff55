"""What a run survives: one run through the rehearsed federation, in which nearly all goes wrong.

Round 2: one ClientApp raises, one answers after the round's timeout, and one site's SuperNode is
killed while its ClientApp trains. Round 3: one ClientApp's process dies, and one site's link is
cut. Round 4: everybody is back. Round 5: the SuperLink is killed.
"""

import os
import re
import shutil
import signal

import pytest
from containers import wait_until

INT4, INT8_A, INT8_B, FLOAT32 = range(4)

# What the test's copy of the app does with a training message, by round and partition.
FAULTS = {2: {INT8_A: "raise", INT8_B: "sleep"}, 3: {INT8_A: "die"}}
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
        time.sleep(TIMEOUT + 5)
    return real_app(message, context)
"""


@pytest.fixture(scope="module")
def round_timeout(sound_run):
    """Seconds that no sound client needs on this machine."""
    return max(30.0, 2.5 * sound_run["seconds"]["train"])


@pytest.fixture(scope="module")
def faulty_run(rehearsal, round_timeout):
    """The run, at its end."""
    app = rehearsal.results("faulty-app")
    copy_app(rehearsal.app, app, FAULTY_APP.format(faults=FAULTS, timeout=round_timeout))
    run_id = rehearsal.start_run(
        "faulty",
        f"/srv/prowd/prowd-runs/{app.name}",
        num_server_rounds=5,
        round_timeout=round_timeout,
    )
    services = rehearsal.services
    begin_round(rehearsal, run_id, "float32", 2)
    services["float32"].kill()
    begin_round(rehearsal, run_id, "int8-b", 3)
    rehearsal.set_link("int8-b", "outside", "down")
    wait_until(lambda: len(rehearsal.rounds("faulty")) == 3, 3 * round_timeout, "round 3 ends")
    rehearsal.set_link("int8-b", "outside", "up")
    begin_round(rehearsal, run_id, "int4", 5)
    services["superlink"].kill()
    wait_until(lambda: rehearsal.online() > 0, 60, "the SuperLink is back")
    return run_id, rehearsal.wait_for_run("faulty", run_id, 5 * round_timeout)


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


def begin_round(rehearsal, run_id, site, number):
    """Wait until a site has received its training message of a round, counted by its own log."""
    pattern = re.compile(rf"RUN {run_id}\]\s.*?Receiving: train")
    wait_until(
        lambda: len(pattern.findall(rehearsal.services[site].log)) >= number,
        600,
        f"round {number} at {site}",
    )


def test_the_run_ends_completed_with_all_its_rounds(rehearsal, faulty_run):
    _, status = faulty_run
    assert status == "finished:completed"
    assert rehearsal.summary("faulty")["status"] == "completed"
    assert [entry["round"] for entry in rehearsal.rounds("faulty")] == [1, 2, 3, 4, 5]


def test_what_failed_is_left_out_and_recorded(rehearsal, faulty_run):
    _, second, third, *_ = rehearsal.rounds("faulty")
    assert second["clients"] == {"sampled": 4, "aggregated": 1, "rejected": 0, "failed": 3}
    assert second["left_out"].keys() == {str(INT8_A), str(INT8_B), str(FLOAT32)}
    assert "the accelerator is on fire" in second["left_out"][str(INT8_A)]
    assert second["left_out"][str(INT8_B)] == "no reply in time"
    # Whichever comes first: the round's timeout, or that Flower gives the node up.
    for left_out in (second["left_out"][str(FLOAT32)], third["left_out"][str(INT8_A)]):
        assert re.search("no reply in time|Node Unavailable|stopped responding", left_out)
    assert set(third["left_out"]) >= {str(INT8_A), str(INT8_B)}
    assert third["clients"]["failed"] == len(third["left_out"])
    # Nothing of a client that was left out is counted.
    assert second["uplink_bytes"].keys() == {"4"}
    assert "32" in second["downlink_bytes"]


def test_a_late_answer_is_not_taken_for_a_later_rounds(rehearsal, faulty_run):
    """The late client answered in round 3, when its link was cut: it is in neither round's mean."""
    _, second, third, *_ = rehearsal.rounds("faulty")
    assert second["clients"]["aggregated"] + third["clients"]["aggregated"] <= 3


def test_all_come_back_by_themselves(rehearsal, faulty_run):
    """The killed SuperNode was refused until its old connection lapsed, and tried again."""
    fourth = rehearsal.rounds("faulty")[3]
    assert fourth["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
    assert rehearsal.services["float32"].exits


def test_the_run_goes_on_after_the_superlink_came_back(rehearsal, faulty_run):
    assert len(rehearsal.services["superlink"].exits) == 1
    fifth = rehearsal.rounds("faulty")[4]
    assert fifth["clients"]["sampled"] == 4
    assert fifth["clients"]["aggregated"] >= 1


def test_a_killed_serverapp_is_resumed(rehearsal, round_timeout):
    """After its first round, by `resume`: the record is one, and the last round has all sites."""
    run_id = rehearsal.start_run("killed", num_server_rounds=2)
    begin_round(rehearsal, run_id, "int4", 2)
    [before] = rehearsal.rounds("killed")
    [pid] = rehearsal.services["serverapp"].process_ids("flwr-serverapp")
    os.kill(pid, signal.SIGKILL)
    resume = "/srv/prowd/prowd-runs/killed"
    run_id = rehearsal.start_run("", num_server_rounds=2, resume=resume)
    assert rehearsal.wait_for_run("killed", run_id, 10 * round_timeout) == "finished:completed"
    first, second = rehearsal.rounds("killed")
    assert first == before
    assert second["round"] == 2
    assert second["clients"] == {"sampled": 4, "aggregated": 4, "rejected": 0, "failed": 0}
