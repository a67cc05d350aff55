"""How the training images are partitioned: server's unlabelled buffer, validation part, clients.

The server takes its share of the shuffled images first, and the clients share the rest; a
partition file comes first, and the server takes its share of what the file leaves.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from core.errors import SettingsError
from core.seeds import DataStream, data_generator
from core.settings import Settings
from task.data.dataset import Images, load_dataset
from task.data.partition_file import read_partition_file


@dataclass(frozen=True)
class Partition:
    """Indices into the training images: the server's buffer, and one array for each client."""

    buffer: np.ndarray
    clients: tuple[np.ndarray, ...]


@lru_cache(maxsize=4)
def partition(settings: Settings, num_partitions: int) -> Partition:
    """Partition the training images; the same settings give the same partition everywhere.

    Raises
    ------
    SettingsError
        If there are not enough images for the buffer and every client, or the partition file does
        not name so many clients.
    """
    labels = load_dataset(settings).train.labels
    if settings.partitioner == "file":
        clients = _clients_of_file(settings, len(labels), num_partitions)
    else:
        clients = _drawn_clients(settings, labels, num_partitions)
    buffer = _in_order(settings, len(labels))[: settings.server_buffer]
    return Partition(buffer, _limited(clients, settings.samples_per_client))


def client_images(settings: Settings, partition_id: int, num_partitions: int) -> Images:
    """Return the training images of one client."""
    if not 0 <= partition_id < num_partitions:
        raise SettingsError(
            f"partition-id: {partition_id} of {num_partitions}; allowed: 0 to {num_partitions - 1}"
        )
    return load_dataset(settings).train[partition(settings, num_partitions).clients[partition_id]]


def server_pixels(settings: Settings) -> np.ndarray:
    """Return the server's buffer: images without labels, uint8 ``[n, channels, size, size]``."""
    train = load_dataset(settings).train
    return train[_in_order(settings, len(train))[: settings.server_buffer]].pixels


def evaluation_images(settings: Settings) -> Images:
    """Return the images that models are evaluated on: the test set, or the validation part.

    The validation part is taken from the training images, so that settings can be chosen without
    a look at the test set.
    """
    data = load_dataset(settings)
    if not settings.validation_samples:
        return data.test
    held = settings.server_buffer + settings.validation_samples
    if held >= len(data.train):
        raise SettingsError(
            f"validation-samples: {settings.validation_samples} beside server-buffer "
            f"{settings.server_buffer}; there are {len(data.train)} training images"
        )
    return data.train[_in_order(settings, len(data.train))[settings.server_buffer : held]]


def random_part(
    settings: Settings, count: int, partition_id: int, num_partitions: int, kind: str
) -> np.ndarray:
    """Return the places of one client's examples among `count` common ones, which are no images.

    Raises
    ------
    SettingsError
        If there are not as many as ``samples-per-client``, or none; `kind` is what they are called.
    """
    left = _shuffled(count, settings.seed)[settings.validation_samples :]
    part = np.array_split(left, num_partitions)[partition_id]
    asked = settings.samples_per_client
    if len(part) < max(asked, 1):
        raise SettingsError(
            f"samples-per-client: {asked}, but client {partition_id} has {len(part)} {kind}"
        )
    return part[: asked or None]


def validation_part(settings: Settings, count: int) -> np.ndarray:
    """Return the places of the validation part among `count` common examples, no client's.

    Raises
    ------
    SettingsError
        If it leaves none.
    """
    if settings.validation_samples >= count:
        raise SettingsError(
            f"validation-samples: {settings.validation_samples}; there are {count} training "
            "examples"
        )
    return _shuffled(count, settings.seed)[: settings.validation_samples]


def random_sample(settings: Settings, count: int, most: int) -> np.ndarray:
    """Return the places of some training examples, for the server to calibrate with."""
    drawn = data_generator(settings.seed, DataStream.SERVER_SAMPLE).permutation(count)
    return drawn[~np.isin(drawn, validation_part(settings, count))][:most]


def _drawn_clients(
    settings: Settings, labels: np.ndarray, num_partitions: int
) -> Sequence[np.ndarray]:
    buffer, validation = settings.server_buffer, settings.validation_samples
    if len(labels) - buffer - validation < num_partitions:
        raise SettingsError(
            f"server-buffer: {buffer} and validation-samples {validation} of {len(labels)} "
            f"training images leave too few for {num_partitions} clients"
        )
    left = _in_order(settings, len(labels))[buffer + validation :]
    return [left[row] for row in _draw(labels[left], settings, num_partitions)]


def _clients_of_file(
    settings: Settings, num_images: int, num_partitions: int
) -> Sequence[np.ndarray]:
    clients = read_partition_file(settings.partition_file, num_images)
    if len(clients) != num_partitions:
        raise SettingsError(
            f"partition-file: {settings.partition_file} names {len(clients)} clients; "
            f"there are {num_partitions}"
        )
    return clients


def _limited(clients: Sequence[np.ndarray], samples: int) -> tuple[np.ndarray, ...]:
    """Keep so many images of each client; 0: all."""
    for number, client in enumerate(clients):
        if len(client) < samples:
            raise SettingsError(
                f"samples-per-client: {samples}, but client {number} holds only "
                f"{len(client)} images"
            )
    return tuple(client[: samples or None] for client in clients)


def _in_order(settings: Settings, count: int) -> np.ndarray:
    """Return the training images of which the server takes the first."""
    order = _shuffled(count, settings.seed)
    if settings.partitioner != "file":
        return order
    taken = np.concatenate(read_partition_file(settings.partition_file, count))
    left = order[~np.isin(order, taken)]
    buffer, validation = settings.server_buffer, settings.validation_samples
    if buffer + validation > len(left):
        raise SettingsError(
            f"partition-file: {settings.partition_file} leaves {len(left)} of {count} training "
            f"images to the server; server-buffer {buffer} and validation-samples {validation} "
            "take more"
        )
    return left


def _shuffled(count: int, seed: int) -> np.ndarray:
    return data_generator(seed, DataStream.PARTITION).permutation(count)


def _draw(labels: np.ndarray, settings: Settings, num_partitions: int) -> list[np.ndarray]:
    if settings.partitioner == "iid":
        return np.array_split(np.arange(len(labels)), num_partitions)
    # Importing the partitioners takes two seconds; only the label column passes through them.
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    alpha = settings.dirichlet_alpha
    partitioner = DirichletPartitioner(num_partitions, "label", alpha, seed=settings.seed)
    partitioner.dataset = Dataset.from_dict({"label": labels, "index": np.arange(len(labels))})
    try:
        # It warns of every attempt that it repeats, with a page of figures.
        with warnings.catch_warnings(action="ignore"):
            return [
                np.array(partitioner.load_partition(i).with_format("numpy")["index"])
                for i in range(num_partitions)
            ]
    except ValueError as error:
        raise SettingsError(
            f"dirichlet-alpha: {alpha} leaves a client with fewer than 10 images among "
            f"{num_partitions}: {error}"
        ) from None
