"""What is used of Flower beyond what its guides document, but for what `pulling` wraps.

Any version of Flower may change these names; they are kept in one place, to be looked at for each.
"""

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.constant import FORCE_EXIT_TIMEOUT_SECONDS
from flwr.supercore.exit import add_exit_handler
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

__all__ = [
    "FORCE_EXIT_TIMEOUT_SECONDS",
    "NodeInfo",
    "Run",
    "RunNotRunningException",
    "add_exit_handler",
    "be_in_a_run",
    "give_id",
    "is_simulated",
    "unreadable",
]


def is_simulated(grid: Grid) -> bool:
    """Return whether a grid is that of Flower's simulation, whose nodes all are this machine's.

    It is so from the start, before Ray is there; any other grid is taken for a networked one.
    """
    return isinstance(grid, InMemoryGrid)


def be_in_a_run() -> None:
    """Make this process one of a run: a message can only be made inside one."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def give_id(message: Message, message_id: str) -> None:
    """Give a message the ID that Flower's grids give when they send it."""
    message.metadata.__dict__["_message_id"] = message_id


def unreadable(message: Message, reason: str) -> Message:
    """Return the reply that stands for one which cannot be read."""
    return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason), reply_to=message)
