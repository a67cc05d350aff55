"""A SuperLink in this process: Flower's own handlers and HTTP grid, without HTTP between them."""

from collections.abc import Callable

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, message_pb2, node_pb2
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

_HANDLERS = {
    "GetNodes": runtime_handlers.get_nodes,
    "PushMessages": runtime_handlers.push_messages,
    "PullMessages": runtime_handlers.pull_messages,
    "PushObject": runtime_handlers.push_object,
    "PullObject": runtime_handlers.pull_object,
    "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
}


class SuperLink:
    """The runtime's and the fleet's handlers over one state.

    Nodes are functions; a node with a message answers when the grid next asks for replies.

    Attributes
    ----------
    grid : HttpGrid
        What a ServerApp is given.
    nodes : dict of int to callable
        By node ID.
    calls : list of str
        What the grid called.
    at_pull : callable
        What happens before replies are asked for; all nodes answer unless it is replaced.
    """

    def __init__(self) -> None:
        manager = NoOpFederationManager()
        store = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
        self.state = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, manager, store).state()
        manager.linkstate = self.state
        self.run_id = self.state.create_run(
            "a/b", "1", "0" * 64, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp"
        )
        run = self.state.get_run_info(run_ids=[self.run_id])[0]
        token = self.state.claim_task(run.primary_task_id)
        self.state.activate_task(run.primary_task_id)
        self.task = self.state.get_task_by_token(token)
        TaskIdentity.run_id = self.run_id
        self.grid = HttpGrid(token=token)
        self.grid._client = _Runtime(self)
        self.grid.set_run(run)
        self.nodes: dict[int, Callable[[Message], Message | None]] = {}
        self.calls: list[str] = []
        self.at_pull: Callable[[], None] = self.serve

    def add(self, answer: Callable[[Message], Message | None]) -> int:
        """Register a node and return its ID."""
        key = f"key {len(self.nodes)}".encode()
        node_id = self.state.create_node(NOOP_FLWR_AID, "none", key, 0)
        self.state.activate_node(node_id, 600)
        self.nodes[node_id] = answer
        return node_id

    def serve(self, but: tuple[int, ...] = ()) -> None:
        """Let every node that has a message answer it."""
        for node_id, answer in self.nodes.items():
            message = None if node_id in but else self.fetch(node_id)
            if message is not None:
                self.send(node_id, answer(message))

    def fetch(self, node_id: int) -> Message | None:
        """Return the next message for a node, as its SuperNode gets it."""
        request = fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=node_id))
        found = fleet_handlers.pull_messages(request, self.state, self.state.object_store)
        if not found.messages_list:
            return None
        message_id = found.messages_list[0].metadata.message_id
        ids = [part.object_id for part in iterate_object_tree(found.message_object_trees[0])]
        contents = {i: self.state.get_object(self.run_id, i) for i in ids}
        message = inflate_object_from_contents(message_id, contents)
        message.metadata.__dict__["_message_id"] = message_id
        return message

    def send(
        self, node_id: int, message: Message | None, upload: bool = True, answers: str = ""
    ) -> Callable[[], None]:
        """Announce a message of a node and upload its objects, or return what uploads them.

        `answers` is the message that it answers by its announcement, whatever itself says.
        """
        if message is None:
            return lambda: None
        node = node_pb2.Node(node_id=node_id)
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        announced = message_to_proto(remove_content_from_message(message))
        if answers:
            announced.metadata.reply_to_message_id = answers
        request = fleet_pb2.PushMessagesRequest(
            node=node, messages_list=[announced], message_object_trees=[get_object_tree(message)]
        )
        pushed = fleet_handlers.push_messages(request, self.state)

        def finish() -> None:
            for object_id in pushed.objects_to_push:
                request = message_pb2.PushObjectRequest(
                    node=node,
                    run_id=self.run_id,
                    object_id=object_id,
                    object_content=objects[object_id].deflate(),
                    session_id=pushed.session_id,
                )
                fleet_handlers.push_object(request, self.state)

        if upload:
            finish()
        return finish


class _Runtime:
    """The grid's client: each call goes straight to its handler."""

    def __init__(self, link: SuperLink) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Callable:
        def call(request):
            link = self._link
            link.calls.append(name)
            if name == "PullMessages":
                link.at_pull()
            return _HANDLERS[name](request, link.state, link.task)

        return call
