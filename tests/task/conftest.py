import pytest
import torch

import task.data.dataset


@pytest.fixture(autouse=True)
def sealed(tmp_path, monkeypatch):
    """One thread, and no test that reads or writes the user's own cache."""
    torch.set_num_threads(1)
    monkeypatch.setattr(task.data.dataset, "CACHE", tmp_path / "cache")
