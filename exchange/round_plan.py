"""What one round asks of each client, which its reply is held against."""

from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from exchange.norms import norms_from
from exchange.protocol import Declaration, Instruction
from exchange.replies import Packed, open_training_reply
from exchange.states import State
from quant import (
    FLOAT_BITS,
    OpenedUpdate,
    Update,
    UpdateError,
    UpdateSpec,
    is_variance,
    open_update,
    payload_size,
    squares_at_most,
)


@dataclass
class Asked:
    """The messages of one round, and what they ask of whom.

    Attributes
    ----------
    start : dict of str to Tensor
        The float32 model that the round begins with.
    spec : UpdateSpec
        Its tensors.
    clients : dict of int to Declaration
        By node ID.
    instructions, models : dict of int to Instruction, and to Update
        By partition; the model as the client was sent it, where it was sent one.
    messages : list of Message
        One a client, of those that were made so far.
    """

    start: State = field(default_factory=dict)
    spec: UpdateSpec = field(default_factory=lambda: UpdateSpec({}))
    clients: dict[int, Declaration] = field(default_factory=dict)
    instructions: dict[int, Instruction] = field(default_factory=dict)
    models: dict[int, Update] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def uplink_bits(self, client: Declaration) -> int:
        """Return the width of the update that a client was asked for; 0 if for none."""
        instruction = self.instructions[client.partition_id]
        if instruction.uplink == "nothing":
            return 0
        return instruction.uplink_bits or client.bits

    def uplink_size(self, client: Declaration) -> int:
        """Return the most bytes that this update takes."""
        bits = self.uplink_bits(client)
        return payload_size(self.spec, bits) if bits else 0

    @property
    def largest_payload(self) -> int:
        """Bytes of the largest update that a client was asked for."""
        return max((self.uplink_size(client) for client in self.clients.values()), default=0)

    def open(self, client: Declaration, reply: Message, most_steps: int | None) -> Packed:
        """Take apart a reply to one of the messages.

        Parameters
        ----------
        client : Declaration
            Who sent it.
        reply : Message
            With content.
        most_steps : int or None
            Steps that the client can have taken; None if that is not known.

        Raises
        ------
        BadReply
            If it does not hold what was asked for.
        """
        server_round = self.instructions[client.partition_id].server_round
        size = self.uplink_size(client)
        return open_training_reply(reply, client, server_round, size, most_steps)

    def norms_at_most(self, item: Packed) -> dict[str, float]:
        """Bound the norms of an update without unpacking it (`exchange.norms`)."""
        bits = self.uplink_bits(item.client)
        return norms_from(*squares_at_most(item.payload, self.spec, bits) if bits else (0.0, 0.0))

    def open_update(self, item: Packed) -> OpenedUpdate | None:
        """Check a payload up to its values; None if none was asked for.

        Raises
        ------
        UpdateError
            If it is not an update of this model, width, content and round.
        """
        instruction = self.instructions[item.client.partition_id]
        if instruction.uplink == "nothing":
            return None
        bits, stamp = self.uplink_bits(item.client), instruction.server_round
        return open_update(item.payload, self.spec, bits, instruction.uplink, stamp)

    def read_update(
        self,
        item: Packed,
        opened: OpenedUpdate | None,
        unfolded: np.ndarray | None = None,
    ) -> Update:
        """Read and check the values; an update of none if none was asked for.

        Parameters
        ----------
        item : Packed
            The reply.
        opened : OpenedUpdate or None
            Its payload, from `open_update`.
        unfolded : ndarray, optional
            What the payload unfolded to, if it did already.

        Raises
        ------
        UpdateError
            If they are not those of an update, or lead to no model.
        """
        if opened is None:
            return Update(FLOAT_BITS, "weights", {}, {})
        partition = item.client.partition_id
        instruction, sent = self.instructions[partition], self.models.get(partition)
        from_codes = instruction.starts_from_codes(opened.layout.bits)
        unfolded = opened.unfold() if unfolded is None else unfolded
        update = opened.read(unfolded, start=sent if from_codes else None)
        if sent is not None and update.content == "difference":
            _check_variances(update, sent)
        return update


def _check_variances(difference: Update, sent: Update) -> None:
    """Refuse a difference that nobody can have trained: it ends below a variance of zero."""
    for name, moved in difference.floats.items():
        if is_variance(name) and (sent.floats[name] + moved < 0).any():
            raise UpdateError(f"{name} is a variance and would become negative")
