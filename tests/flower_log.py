"""What Flower's logger prints, as its users read it: its filters are on, tracebacks are shown."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_FLOWER = logging.getLogger("flwr")


class FlowerLog(logging.Handler):
    """What is logged by the server, and apart from it by clients, which are other processes.

    Attributes
    ----------
    of_server, of_clients : list of str
        One text a record, from INFO up, with its level and its traceback.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        self.of_server: list[str] = []
        self.of_clients: list[str] = []
        self._sink = self.of_server

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        text.encode()  # As a terminal, a file and Flower's SuperLink need it.
        self._sink.append(text)

    @contextmanager
    def of_a_client(self) -> Iterator[None]:
        """Whatever is logged here is a client's."""
        self._sink = self.of_clients
        try:
            yield
        finally:
            self._sink = self.of_server

    def ends(self) -> list[str]:
        """Return the server's lines that say why something ended, without `prowd:`."""
        return _ends(self.of_server)

    def ends_of_clients(self) -> list[str]:
        """Return those of the clients."""
        return _ends(self.of_clients)


def _ends(texts: list[str]) -> list[str]:
    start = "ERROR prowd: "
    return [text.removeprefix(start) for text in texts if text.startswith(start)]


@contextmanager
def flower_log() -> Iterator[FlowerLog]:
    """Listen in place of all who listen to Flower's logger: pytest cannot show every text."""
    listener, before = FlowerLog(), (_FLOWER.handlers[:], _FLOWER.propagate)
    _FLOWER.handlers[:], _FLOWER.propagate = [listener], False
    try:
        yield listener
    finally:
        _FLOWER.handlers[:], _FLOWER.propagate = before
