"""Memory, as the tests measure it."""

import tracemalloc
from collections.abc import Callable


def peak_memory(function: Callable[[], object]) -> int:
    """Most bytes that were allocated at once while a function ran."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
