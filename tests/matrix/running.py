"""One cell run by the real ServerApp and ClientApps, and all that passed between them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from federation import ClientAppNode, Node, SimulatedGrid
from flwr.app import Context, Error, Message, RecordDict
from matrix.cells import EXAMPLES, ROUNDS, Cell
from torch import Tensor

from exchange.protocol import INSTRUCTION, MODEL, REPORT, UPDATE, Instruction
from server_app.app import main
from server_app.checkpoint import Checkpoint, read_checkpoint

# Replies that have come of the round in which a run is killed.
_ANSWERED = 2


@dataclass(frozen=True)
class Exchange:
    """A message to a client and its answer.

    Attributes
    ----------
    kind : str
        "train" or "evaluate".
    partition : int
        The client.
    instruction : Instruction
        What it was asked.
    sent, returned : bytes or None
        Payloads of the model and of the update, where there is one.
    num_examples : int
        Images that it reports; 0 if it failed.
    correction : dict of str to ndarray
        The correction that it keeps after this message.
    """

    kind: str
    partition: int
    instruction: Instruction
    sent: bytes | None
    returned: bytes | None
    num_examples: int
    correction: dict[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """A run that came to its end, and what passed in it.

    Attributes
    ----------
    cell : Cell
        What was run.
    folder : Path
        Its record.
    exchanges : list of Exchange
        In the order in which the clients answered.
    starts : dict of int to dict
        The global model that each round began with; after the last round, that of the next.
    states : list of RecordDict
        What each client holds in the end.
    """

    cell: Cell
    folder: Path
    exchanges: list[Exchange]
    starts: dict[int, dict[str, Tensor]]
    states: list[RecordDict]

    def trained(self, server_round: int) -> list[Exchange]:
        """Training of a round, by partition."""
        found = [e for e in self.exchanges if e.kind == "train"]
        found = [e for e in found if e.instruction.server_round == server_round]
        return sorted(found, key=lambda exchange: exchange.partition)

    @property
    def rounds(self) -> list[int]:
        """Rounds of which the exchanges are here: of a resumed run, those after its resume."""
        return sorted(self.starts)[:-1]

    @property
    def entries(self) -> list[dict]:
        """Lines of the record."""
        lines = (self.folder / "rounds.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def summary(self) -> dict:
        """How the run ended."""
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def checkpoint(self) -> Checkpoint:
        """The last one."""
        return read_checkpoint(self.folder)


@dataclass
class Watch:
    """Sees every message and answer, and can make a client fail, or copy what a kill leaves.

    Attributes
    ----------
    fails : tuple of int and int, or None
        This partition answers with an error in this round.
    killed : Path or None
        Where the record is copied in the middle of the last round: what is on the disk then is what
        signal 9 leaves.
    """

    folder: Path
    rounds: int
    fails: tuple[int, int] | None = None
    killed: Path | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    starts: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def around(self, node: ClientAppNode) -> Node:
        """Return a node that does what this one does, and is seen."""

        def answer(message: Message) -> Message:
            if INSTRUCTION not in message.content:
                return node(message)
            partition = node.config["partition-id"]
            instruction = Instruction.from_record(message.content[INSTRUCTION])
            if instruction.server_round not in self.starts:
                self.starts[instruction.server_round] = read_checkpoint(self.folder).model
            if (partition, instruction.server_round) == self.fails:
                error = Error(code=2, reason="RuntimeError: out of power")
                reply = Message(error, reply_to=message)
            else:
                reply = node(message)
            kind = message.metadata.message_type
            self.exchanges.append(_exchange(kind, partition, instruction, message, reply, node))
            self._kill(kind, instruction.server_round)
            return reply

        return answer

    def _kill(self, kind: str, server_round: int) -> None:
        if self.killed is None or (kind, server_round) != ("train", self.rounds):
            return
        answered = [e for e in self.exchanges if e.instruction.server_round == server_round]
        if len(answered) == _ANSWERED:
            shutil.copytree(self.folder, self.killed)


def run(
    cell: Cell,
    folder: Path,
    *,
    rounds: int = ROUNDS,
    resume: bool = False,
    reverse: bool = False,
    killed: Path | None = None,
    fails: tuple[int, int] | None = None,
    on_grid: Callable[[SimulatedGrid], None] = lambda grid: None,
    **settings: object,
) -> Trace:
    """Run a cell with clients that have nothing in memory.

    Parameters
    ----------
    cell : Cell
        What to run.
    folder : Path
        Where its record goes, or lies, if it is resumed.
    rounds : int
        In all.
    resume, reverse : bool
        Whether to resume in `folder`; whether the last client that was asked answers first.
    killed, fails
        As of `Watch`.
    on_grid : callable
        Is given the grid before the run.
    **settings
        Others than the cell's, with underscores.
    """
    config = {**cell.settings(), "num-server-rounds": rounds}
    config |= {"partition-file": str(_write_partition(cell, folder.parent))}
    config |= {"output-dir": str(folder.parent), "run-name": folder.name}
    config |= {"resume": str(folder)} if resume else {}
    config |= {key.replace("_", "-"): value for key, value in settings.items()}
    count = len(cell.widths)
    nodes = [ClientAppNode(i, count, config) for i in range(count)]
    watch = Watch(folder, rounds, fails, killed)
    grid = SimulatedGrid({50 + i: watch.around(n) for i, n in enumerate(nodes)}, reverse)
    on_grid(grid)
    main(grid, Context(1, 0, {}, RecordDict(), config))
    watch.starts[rounds + 1] = read_checkpoint(folder).model
    return Trace(cell, folder, watch.exchanges, watch.starts, [n.context.state for n in nodes])


def _exchange(kind, partition, instruction, message, reply, node) -> Exchange:
    sent = message.content[MODEL][MODEL].data if MODEL in message.content else None
    content = RecordDict() if reply.has_error() else reply.content
    returned = content[UPDATE][UPDATE].data if UPDATE in content else None
    examples = content[REPORT]["num_examples"] if REPORT in content else 0
    kept = node.context.state.array_records.get("tracking-correction", {})
    correction = {name: array.numpy().copy() for name, array in kept.items()}
    return Exchange(kind, partition, instruction, sent, returned, examples, correction)


def _write_partition(cell: Cell, folder: Path) -> Path:
    """Write which images each client holds."""
    ends = np.cumsum(EXAMPLES)
    clients = [list(range(end - n, end)) for n, end in zip(EXAMPLES, ends.tolist(), strict=True)]
    file = folder / "partition.json"
    file.write_text(json.dumps({"clients": clients[: len(cell.widths)]}))
    return file
