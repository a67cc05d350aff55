"""What this node is: read from its own configuration, else from the simulated mix."""

from collections.abc import Mapping

from client_app.state_store import state_folder
from core.errors import SettingsError
from core.mix import check_client_bits, widths_of_partitions
from core.settings import Settings
from exchange.protocol import Declaration
from task.data.partition import client_images


def declare(
    node_config: Mapping[str, object], run_config: Mapping[str, object], simulated: bool
) -> Declaration:
    """Describe this node to the server.

    Parameters
    ----------
    node_config : mapping
        ``partition-id``, ``num-partitions`` and, on a networked device, ``bits``.
    run_config : mapping
        The run's settings.
    simulated : bool
        Whether a node without ``bits`` takes its width from the run's ``bit-mix``.

    Returns
    -------
    Declaration
        With the reason in `refused` if this node cannot take part.
    """
    partition_id = num_partitions = 0
    try:
        partition_id = _whole_number(node_config, "partition-id")
        num_partitions = _whole_number(node_config, "num-partitions")
        state_folder(node_config, "")
        settings = Settings.of_run(run_config)
        if not 0 <= partition_id < num_partitions:
            raise SettingsError(f"node-config: partition-id {partition_id} of {num_partitions}")
        if "bits" in node_config or not simulated:
            bits = check_client_bits(node_config.get("bits"), "node-config bits")
        else:
            bits = widths_of_partitions(settings.mix, num_partitions)[partition_id]
        num_examples = len(client_images(settings, partition_id, num_partitions))
    except SettingsError as error:
        return Declaration(partition_id, num_partitions, 0, 0, str(error))
    return Declaration(partition_id, num_partitions, bits, num_examples, "")


def _whole_number(node_config: Mapping[str, object], key: str) -> int:
    value = node_config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SettingsError(f"node-config: {key} is {value!r}; it must be a whole number")
    return value
