"""Flower's command waits for a local SuperLink on a loaded machine."""

from types import SimpleNamespace

import pytest
from flwr.cli import local_superlink

from prowd.compare import patient_flwr


@pytest.fixture
def local(monkeypatch):
    """Flower's module, as it was again afterwards."""
    for name in patient_flwr._SECONDS:
        monkeypatch.setattr(local_superlink, name, getattr(local_superlink, name))
    return local_superlink


def test_a_superlink_that_takes_two_minutes_is_waited_for(local, monkeypatch, tmp_path):
    """Flower alone kills it after 15 seconds."""
    clock, killed = [0.0], []
    process = SimpleNamespace(poll=lambda: None, kill=lambda: killed.append(clock[0]))
    time = SimpleNamespace(
        monotonic=lambda: clock[0], sleep=lambda seconds: clock.append(clock.pop() + seconds)
    )
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(local, "time", time)
    monkeypatch.setattr(local.subprocess, "Popen", lambda *_, **__: process)
    health = SimpleNamespace(get=lambda *_, **__: SimpleNamespace(is_success=clock[0] > 120))
    monkeypatch.setattr(local.httpx, "get", health.get)
    with pytest.raises(Exception, match="within 15s"):
        local._start_local_superlink()
    [ended] = killed
    clock[0] = 0.0
    patient_flwr.be_patient()
    local._start_local_superlink()
    assert killed == [ended]


def test_a_flower_that_waits_otherwise_is_named(local, monkeypatch):
    monkeypatch.setattr(local, "_is_local_superlink_started", lambda: True)
    with pytest.raises(RuntimeError, match=r"no longer waits .* by CONTROL_API_PROBE_TIMEOUT"):
        patient_flwr.be_patient()
