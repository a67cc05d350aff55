"""The cells of the matrix: a strategy, a broadcast, a low-bit training and the clients' widths."""

from collections import Counter
from dataclasses import dataclass
from itertools import product

from matrix.tiny import INTEGER_ON_GRID, ON_GRID

from strategies import STRATEGIES

MIXED, LOW, FLOAT32, FEW = (2, 4, 4, 8, 32), (2, 8, 8), (32, 32, 32), (2, 8, 32)
WIDTH_NAMES = {MIXED: "mixed", LOW: "low", FLOAT32: "float32", FEW: "few"}
BROADCASTS = ("float32", "nearest", "calibrated")
TRAININGS = ("qat", "strict", "integer")
LEARNING_RATE, SERVER_STEP = 0.02, 0.9
# Every strategy with whatever makes it keep something from round to round.
OWN_SETTINGS: dict[str, dict[str, object]] = {
    "prowd": {
        "prowd-finetune-every": 1,
        "prowd-finetune-steps": 1,
        "prowd-server-momentum": 0.5,
    },
    "prowd-paper": {"prowd-paper-finetune-every": 1, "prowd-paper-finetune-steps": 1},
    "fedavg": {},
    "fedprox": {"fedprox-mu": 0.1},
    "fedpaq": {},
    "fedcom": {"fedcom-server-learning-rate": SERVER_STEP},
    "fedcomgate": {"fedcomgate-server-learning-rate": SERVER_STEP},
    "grouped-avg": {},
    "grouped-avg-asymmetric": {},
    "local": {},
    "flwr:FedAvg": {},
    "flwr:FedAdam": {"flwr-arguments": "eta = 0.01"},
    "flwr:FedAvgM": {"flwr-arguments": "server_momentum = 0.5, server_learning_rate = 0.9"},
}
assert {name.partition(":")[0] for name in OWN_SETTINGS} == set(STRATEGIES)
# Those that take the difference of what they hold, unless told otherwise.
DIFFERENCES = ("fedpaq", "fedcom", "fedcomgate")
# Those that do something of their own with what is uploaded, and one of each other kind.
OF_UPLOADS = ("prowd", "prowd-paper", "fedavg", "fedcom", "fedcomgate", "grouped-avg")
# One of each kind: what it keeps, where, and who is sent what.
OF_KINDS = ("prowd", "prowd-paper", "fedcom", "grouped-avg", "local", "flwr:FedAdam")
# Images of each client: of different numbers, so that a mean without weights is another one, and
# so that some take three steps and others two.
EXAMPLES = (9, 14, 8, 12, 10, 11)
# The last is the one in which it is killed.
ROUNDS = 2


@dataclass(frozen=True)
class Cell:
    """A federation that is run, killed, resumed and looked at.

    Attributes
    ----------
    strategy, broadcast, training : str
        As the settings ``strategy``, ``broadcast`` and ``low-bit-training``.
    widths : tuple of int
        Bit-width of each client.
    upload : str
        As the setting.
    """

    strategy: str
    broadcast: str = "float32"
    training: str = "qat"
    widths: tuple[int, ...] = MIXED
    upload: str = "auto"

    def __str__(self) -> str:
        name = f"{self.strategy.replace(':', '.')}-{self.broadcast}-{self.training}"
        name += "" if self.upload == "auto" else f"-{self.upload}"
        widths = WIDTH_NAMES.get(self.widths, "x".join(map(str, self.widths)))
        return name if self.widths == MIXED else f"{name}-{widths}"

    @property
    def refused(self) -> str:
        """What the error begins with that refuses this cell before training; empty if it runs."""
        if self.in_integers and self.broadcast == "calibrated":
            return "broadcast:"
        coded = self.broadcast != "float32" and min(self.widths) < 32
        # The corrections are taken from differences of codes, whose rounding does not sum to zero.
        return "broadcast:" if self.strategy == "fedcomgate" and coded else ""

    @property
    def examples(self) -> tuple[int, ...]:
        """Number of images of each client."""
        return EXAMPLES[: len(self.widths)]

    @property
    def evaluates_on_server(self) -> bool:
        """Whether there is a global model."""
        return self.strategy != "local"

    @property
    def in_integers(self) -> bool:
        """Whether low-bit clients train in integers, which takes a model of its own."""
        return self.training == "integer"

    @property
    def of_uploads(self) -> bool:
        """Whether its strategy stands for what strategies do with an upload."""
        return self.strategy in OF_UPLOADS

    @property
    def starts_otherwise(self) -> bool:
        """Whether this broadcast is seen with this strategy in integer training."""
        return self.broadcast == "float32" or self.strategy == "prowd"

    @property
    def on_grid(self) -> tuple[str, ...]:
        """Names of the weights that low-bit clients quantize."""
        return INTEGER_ON_GRID if self.in_integers else ON_GRID

    @property
    def moves_latent_weights(self) -> bool:
        """Whether ProWD asks for the difference of latent weights."""
        asked = self.strategy == "prowd" and self.upload in ("auto", "stored")
        return asked and self.training == "qat"

    def downlink_bits(self, partition: int) -> int:
        """Width of the payload in which a client gets the model."""
        return 32 if self.broadcast == "float32" else self.widths[partition]

    def uplink_bits(self, partition: int) -> int:
        """Width of what a client sends."""
        own = self.widths[partition]
        differs = self.strategy in DIFFERENCES or self.moves_latent_weights
        if own == 32 or differs or self.training == "strict":
            return own
        if self.upload == "stored":
            return own if self.in_integers else 32
        return 2 if self.in_integers else own

    def settings(self) -> dict[str, object]:
        """Return the run configuration but for paths."""
        shares = {b: n / len(self.widths) for b, n in Counter(self.widths).items()}
        return {
            "strategy": self.strategy,
            "broadcast": self.broadcast,
            "low-bit-training": self.training,
            "upload": self.upload,
            "bit-mix": ",".join(f"{bits}:{share:.9f}" for bits, share in shares.items()),
            "model": "matrix.tiny:" + ("integer_network" if self.in_integers else "network"),
            "partitioner": "file",
            "batch-size": 6,
            "learning-rate": LEARNING_RATE,
            "server-buffer": 16,
            "validation-samples": 24,
            "evaluate-every": 2,
            "node-wait": 1.0,
            **OWN_SETTINGS[self.strategy],
        }


def all_cells() -> list[Cell]:
    """Every strategy with every broadcast and training, on mixed widths and on low-bit ones."""
    crossed = product(OWN_SETTINGS, BROADCASTS, TRAININGS)
    cells = [Cell(*axes, MIXED) for axes in crossed]
    # Integer training is one more kind of upload; whatever the broadcast, it starts on its own
    # grid, which is seen with one strategy.
    cells = [c for c in cells if not c.in_integers or (c.of_uploads and c.starts_otherwise)]
    # Without a Float32 client no client trains otherwise, and no model travels otherwise: the
    # new case is that the widest of the models is one of codes.
    cells += [Cell(strategy, "calibrated", "strict", LOW) for strategy in OF_KINDS]
    cells += [Cell(strategy, widths=FLOAT32) for strategy in OWN_SETTINGS]
    for strategy, training in product(OF_UPLOADS, ("qat", "integer")):
        if strategy == "grouped-avg":
            # It averages each width as FedAvg does.
            continue
        latent = (strategy, training) == ("prowd", "qat")
        other = "forward" if strategy in DIFFERENCES or latent else "stored"
        cells += [Cell(strategy, training=training, upload=u) for u in ("dithered", other)]
    cells.append(Cell("prowd", "calibrated", "qat", LOW, "dithered"))
    return cells


CELLS = [cell for cell in all_cells() if not cell.refused]
REFUSED = [cell for cell in all_cells() if cell.refused]
