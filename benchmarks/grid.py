"""A Flower grid whose clients answer at once with a given reply."""

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import FLOWER_LOGGER
from flwr.serverapp import Grid
from torch import Tensor

from exchange.protocol import DECLARATION, REPORT, UPDATE, Declaration, Report, to_array
from exchange.undocumented import NodeInfo, Run, be_in_a_run, give_id
from quant import encode, quantize_fitted
from strategies import MixedPrecisionStrategy

be_in_a_run()
# Standard deviation of a weight's movement, in those of its layer.
_MOVED = 0.08


class AnsweringGrid(Grid):
    """Nodes that declare themselves and answer every other message by one function.

    Parameters
    ----------
    declarations : mapping of int to Declaration
        By node ID.
    answer : callable
        From the node's declaration to the content of its reply.
    """

    def __init__(
        self,
        declarations: Mapping[int, Declaration],
        answer: Callable[[Declaration], RecordDict],
    ) -> None:
        self._declarations = declarations
        self._answer = answer
        self._pushed: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """All of them, always."""
        return list(self._declarations)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All of them, always."""
        return [NodeInfo(node_id=node_id) for node_id in self._declarations]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until their replies are pulled."""
        pushed = {}
        for message in messages:
            give_id(message, str(uuid.uuid4()))
            pushed[message.metadata.message_id] = message
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer, one at a time."""
        for message_id in message_ids:
            message = self._pushed.pop(message_id)
            client = self._declarations[message.metadata.dst_node_id]
            if message.metadata.message_type == "query":
                content = RecordDict({DECLARATION: ConfigRecord(client.to_record())})
            else:
                content = self._answer(client)
            yield Message(content, reply_to=message)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Answer as they are sent."""
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: object) -> None:
        """Flower's own; not needed here."""
        raise NotImplementedError

    @property
    def run(self) -> Run:
        """Flower's own; not needed here."""
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        """Flower's own; not needed here."""
        raise NotImplementedError


def reporting_grid(
    model: Mapping[str, Tensor], widths: list[int], coded: bool, from_start: bool = False
) -> AnsweringGrid:
    """Return a grid whose clients answer the first round with the model that they were sent, moved.

    Parameters
    ----------
    model : mapping of str to Tensor
        Float32.
    widths : list of int
        Bit-width of each client.
    coded : bool
        Whether their codes are entropy-coded.
    from_start : bool
        Whether they were sent codes, which theirs are then coded from.
    """
    moved = _moved(model)
    payloads = {
        bits: encode(
            quantize_fitted(moved, bits, weights_of(moved)),
            coded=coded,
            start=quantize_fitted(model, bits, weights_of(model)) if from_start else None,
            stamp=1,
        )
        for bits in set(widths)
    }
    numbers = Report(server_round=1, num_examples=10, loss=1.0, accuracy=0.5, seconds=1.0)

    def answer(client: Declaration) -> RecordDict:
        # A copy for each, as from the network.
        payload = bytes(bytearray(payloads[client.bits]))
        update = ArrayRecord({UPDATE: to_array(payload)})
        return RecordDict({UPDATE: update, REPORT: MetricRecord(numbers.to_record())})

    declarations = {i + 1: Declaration(i, len(widths), b, 10, "") for i, b in enumerate(widths)}
    return AnsweringGrid(declarations, answer)


def weights_of(model: Mapping[str, Tensor]) -> list[str]:
    """Return which tensors of these models, all of Conv2d and Linear layers, are quantized."""
    return [name for name, tensor in model.items() if tensor.ndim >= 2]


def _moved(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move every weight by some hundredths, so that eight bits take 3.5 from their start.

    That is what they take after training (docs/performance.md).
    """
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + _MOVED * float(tensor.std()) * torch.randn(tensor.shape, generator=generator)
        if name in weights_of(model)
        else tensor
        for name, tensor in model.items()
    }


def quietly() -> None:
    """Let Flower log warnings only: a line for each node would hide the figures."""
    FLOWER_LOGGER.setLevel(logging.WARNING)


def run_round(strategy: MixedPrecisionStrategy, arrays: ArrayRecord, grid: AnsweringGrid) -> None:
    """Run the server's part of the first round, from the model that is sent to the next one."""
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    strategy.aggregate_train(1, grid.send_and_receive(messages))
