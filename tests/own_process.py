"""Python in a process of its own, for what depends on its start or its output."""

import subprocess
import sys


def python(*words, cwd, stdout=subprocess.PIPE, **more):
    """Run it to its end; what it said is text."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **more,
    )
