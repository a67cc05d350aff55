"""A federation in one process: a Flower grid whose nodes are functions, or the real ClientApp."""

import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import httpx
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid
from specs import spec_of_state, to_bits

from exchange.protocol import (
    DECLARATION,
    INSTRUCTION,
    MODEL,
    REPORT,
    UPDATE,
    Declaration,
    Instruction,
    Report,
)
from exchange.states import to_arrays
from exchange.undocumented import NodeInfo, be_in_a_run, give_id
from quant import STYPE, Update, UpdateSpec, decode, encode
from strategies import StrategyContext

be_in_a_run()

Node = Callable[[Message], Message | None]


def refusal(status):
    """What Flower's grid raises where the SuperLink answers with this status."""
    request = httpx.Request("POST", "http://superlink/v1/runtime/pull-messages")
    return httpx.HTTPStatusError(
        f"{status}", request=request, response=httpx.Response(status, request=request)
    )


class InProcessGrid(Grid):
    """Runs each message's node when its reply is pulled.

    Parameters
    ----------
    nodes : dict of int to callable
        By ID.
    reverse : bool
        Whether the last one that was asked answers first.

    Attributes
    ----------
    activated : dict of int to str
        When a node was last activated; "" for those that it does not hold.
    """

    def __init__(self, nodes: dict[int, Node], reverse: bool = False) -> None:
        self.nodes = nodes
        self.reverse = reverse
        self.activated: dict[int, str] = {}
        self.sent: list[Message] = []
        self._waiting: dict[str, Message] = {}

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [
            NodeInfo(node_id=node_id, last_activated_at=self.activated.get(node_id))
            for node_id in self.get_node_ids()
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            give_id(message, str(uuid.uuid4()))
            self._waiting[message.metadata.message_id] = message
            self.sent.append(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [i for i in list(self._waiting) if i in set(message_ids)]
        replies = []
        for message_id in reversed(asked) if self.reverse else asked:
            message = self._waiting.pop(message_id)
            reply = self.nodes[message.metadata.dst_node_id](message)
            if reply is not None:
                replies.append(reply)
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        return list(self.pull_messages(set(self.push_messages(messages))))


class SimulatedGrid(InProcessGrid, InMemoryGrid):
    """Is, by its type, that of Flower's simulation; all else is taken for a networked one."""


class Recording:
    """A grid of these that keeps what was received too."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = super().pull_messages(message_ids)
        self.received = [*getattr(self, "received", []), *replies]
        return replies


def payloads(messages: Iterable[Message], record: str) -> list[tuple[int, int, bytes]]:
    """Node, bits in the header, and bytes of each training message that carries a payload."""
    found = []
    for message in messages:
        if message.metadata.message_type == "train" and record in message.content:
            data = next(iter(message.content[record].values())).data
            node = message.metadata.dst_node_id if record == MODEL else message.metadata.src_node_id
            found.append((node, data[5], data))
    return found


class LateGrid(InProcessGrid):
    """Counts the looks for nodes; a subclass says who is there, and who has answered, by then."""

    looks = 0

    def is_there(self, node_id: int) -> bool:
        return True

    def has_answered(self, node_id: int) -> bool:
        return True

    def get_node_ids(self) -> Iterable[int]:
        self.looks += 1
        return [node_id for node_id in super().get_node_ids() if self.is_there(node_id)]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = {i: m.metadata.dst_node_id for i, m in self._waiting.items()}
        late = {i for i, node_id in asked.items() if not self.has_answered(node_id)}
        return super().pull_messages(set(message_ids) - late)


class ScriptedClient:
    """A client that answers with an update computed by a function of the model it received.

    Parameters
    ----------
    partition, of, bits : int
        What it declares.
    train : callable
        State dict received to state dict, or `Update`, sent.
    examples : int
        Number of examples that it declares and reports.
    """

    def __init__(self, partition, of, bits, train, examples=10) -> None:
        self.declaration = Declaration(partition, of, bits, examples, "")
        self.train = train
        self.spec: UpdateSpec | None = None
        self.instructions: list[Instruction] = []
        self.reported: dict = {}

    def __call__(self, message: Message) -> Message:
        if message.metadata.message_type == "query":
            record = ConfigRecord(self.declaration.to_record())
            return Message(RecordDict({DECLARATION: record}), reply_to=message)
        instruction = Instruction.from_record(message.content[INSTRUCTION])
        self.instructions.append(instruction)
        received = {}
        if MODEL in message.content:
            data = message.content[MODEL][MODEL].data
            received = decode(data, self.spec, instruction.downlink_bits).dequantize()
        content = RecordDict()
        if instruction.uplink != "nothing":
            sent = self.train(received)
            update = sent if isinstance(sent, Update) else to_bits(sent, self.bits)
            payload = encode(update, stamp=instruction.server_round)
            content[UPDATE] = payload_record(payload)
        reported = {"server_round": instruction.server_round} | self.reported
        content[REPORT] = report(self.declaration.num_examples, **reported)
        return Message(content, reply_to=message)

    @property
    def bits(self) -> int:
        return self.declaration.bits


def assert_same_update(one: Update, other: Update) -> None:
    assert (one.bits, one.content) == (other.bits, other.content)
    assert one.quantized.keys() == other.quantized.keys()
    for name, tensor in one.quantized.items():
        assert torch.equal(tensor.codes, other.quantized[name].codes)
        assert torch.equal(tensor.scale, other.quantized[name].scale)
    assert one.floats.keys() == other.floats.keys()
    assert all(torch.equal(t, other.floats[n]) for n, t in one.floats.items())


def payload_record(payload: bytes) -> ArrayRecord:
    return ArrayRecord({UPDATE: Array("uint8", (len(payload),), STYPE, payload)})


def report(examples: int, **changes) -> MetricRecord:
    values = {"server_round": 1, "num_examples": examples, "loss": 0.5, "accuracy": 0.5}
    values |= {"seconds": 0.1} | changes
    return MetricRecord(Report(**values).to_record())


def federation(clients: list[ScriptedClient], state: dict, **kwargs) -> InProcessGrid:
    """Number the clients 100, 101, ... and tell each the shape of the model."""
    for client in clients:
        client.spec = spec_of_state(state)
    return InProcessGrid({100 + i: c for i, c in enumerate(clients)}, **kwargs)


def with_w(**given) -> StrategyContext:
    """What a strategy is given whose low-bit clients quantize the one tensor "w"."""
    return StrategyContext(quantized=["w"], **{"upload": "forward", **given})


def run_round(strategy, grid, state, server_round=1):
    """One round of training through Flower's interface; returns the new state dict, or None."""
    arrays = to_arrays(state)
    messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    new, _ = strategy.aggregate_train(server_round, replies)
    if new is None:
        return None
    return {n: torch.from_numpy(a.numpy().copy()) for n, a in new.items()}


class ClientAppNode:
    """A simulated node that runs the project's real ClientApp, with a context of its own."""

    def __init__(self, partition, of, run_config, node_config=None) -> None:
        self.config = {"partition-id": partition, "num-partitions": of, **(node_config or {})}
        self.run_config = run_config
        self.lose_state()

    def lose_state(self) -> None:
        """Begin with an empty context, as a restarted SuperNode does."""
        self.context = Context(
            run_id=1,
            node_id=self.config.get("partition-id", 0),
            node_config=self.config,
            state=RecordDict(),
            run_config=self.run_config,
        )

    def __call__(self, message: Message) -> Message:
        from client_app import app as client

        with in_an_actor():
            return client.app(message, self.context)


@contextmanager
def in_an_actor() -> Iterator[None]:
    """Be an actor of Ray's for a while, as simulated clients are: a node's width is of the mix."""
    ray, before = ModuleType("ray"), sys.modules.get("ray")
    ray.__spec__ = ModuleSpec("ray", None)
    ray.is_initialized = lambda: True
    ray.get_runtime_context = lambda: SimpleNamespace(get_actor_id=lambda: "actor")
    sys.modules["ray"] = ray
    try:
        yield
    finally:
        del sys.modules["ray"]
        if before is not None:
            sys.modules["ray"] = before
