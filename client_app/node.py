"""What this node is: read from its own configuration, else from the simulated mix."""

from collections.abc import Mapping
from pathlib import Path

from client_app.state_store import state_folder
from core.errors import SettingsError
from core.mix import check_client_bits, widths_of_partitions
from core.settings import Settings
from exchange.protocol import Declaration
from task.interface import Facts, Node
from task.tasks import make_task


def declare(
    node_config: Mapping[str, object],
    run_config: Mapping[str, object],
    simulated: bool,
    facts: Facts | None = None,
) -> Declaration:
    """Describe this node to the server.

    Parameters
    ----------
    node_config : mapping
        ``partition-id`` and ``num-partitions`` of common data or, on a networked device,
        ``data-path`` of its own; and there ``bits``.
    run_config : mapping
        The run's settings.
    simulated : bool
        Whether a node without ``bits`` takes its width from the run's ``bit-mix``.
    facts : mapping, optional
        What the server says of the task.

    Returns
    -------
    Declaration
        With the reason in `refused` if this node cannot take part.
    """
    node = Node(0, 0)
    try:
        node = node_of(node_config)
        state_folder(node_config, "")
        settings = Settings.of_run(run_config)
        bits = width_of(node_config, node, settings, simulated)
        num_examples = len(make_task(settings, facts).examples(node))
    except SettingsError as error:
        return Declaration(node.partition_id, node.num_partitions, 0, 0, str(error))
    return Declaration(node.partition_id, node.num_partitions, bits, num_examples, "")


def width_of(
    node_config: Mapping[str, object], node: Node, settings: Settings, simulated: bool
) -> int:
    """Return a node's bit-width: its own, or in simulation that of the mix.

    Raises
    ------
    SettingsError
        If it declares none, or no bit-width.
    """
    if "bits" in node_config or not simulated:
        return check_client_bits(node_config.get("bits"), "node-config bits")
    return widths_of_partitions(settings.mix, node.num_partitions)[node.partition_id]


def node_of(node_config: Mapping[str, object]) -> Node:
    """Return what a node's own configuration says of its data.

    Raises
    ------
    SettingsError
        If it says neither ``data-path`` nor ``partition-id`` and ``num-partitions``, or both.
    """
    path = node_config.get("data-path")
    if path is None:
        partition_id = _whole_number(node_config, "partition-id")
        num_partitions = _whole_number(node_config, "num-partitions")
        if not 0 <= partition_id < num_partitions:
            raise SettingsError(f"node-config: partition-id {partition_id} of {num_partitions}")
        return Node(partition_id, num_partitions)
    if not isinstance(path, str) or not path or not Path(path).expanduser().is_absolute():
        raise SettingsError(f"node-config: data-path is {path!r}; it must be an absolute path")
    if given := [key for key in ("partition-id", "num-partitions") if key in node_config]:
        raise SettingsError(
            f"node-config: data-path {path!r} beside {given[0]}; allowed: one of the two, data of "
            "the device's own or a part of common data"
        )
    return Node(data_path=path)


def _whole_number(node_config: Mapping[str, object], key: str) -> int:
    value = node_config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SettingsError(f"node-config: {key} is {value!r}; it must be a whole number")
    return value
