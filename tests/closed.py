"""What another user's file or folder is to prowd."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def closed_to_us(path: Path) -> Iterator[None]:
    """Close a file or folder; root, who may read all, becomes nobody meanwhile."""
    path.chmod(0)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        path.chmod(0o755)
