import os

import pytest


@pytest.fixture(autouse=True)
def on_one_machine(monkeypatch):
    """Clients share the server's disk, as in simulation; and no power fails, which `fsync` is for.

    Waiting for the disk would take a third of the time.
    """
    monkeypatch.setattr("server_app.run.in_simulation", lambda: True)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
