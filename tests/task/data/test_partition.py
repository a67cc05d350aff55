import numpy as np
import pytest
from datasets import Dataset
from flwr_datasets.partitioner import IidPartitioner

from core.errors import SettingsError
from core.settings import Settings
from task.data.dataset import load_dataset
from task.data.partition import (
    client_images,
    evaluation_images,
    partition,
    server_pixels,
)

# 1437 training images of the digits.
TRAIN = 1437
PARTITIONERS = ["iid", "dirichlet"]


def message_of(function, *arguments):
    with pytest.raises(SettingsError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("partitioner", PARTITIONERS)
@pytest.mark.parametrize("clients", [1, 4, 10])
def test_every_image_has_one_holder(partitioner, clients):
    parts = partition(Settings(partitioner=partitioner, server_buffer=100), clients)
    assert len(parts.buffer) == 100
    assert len(parts.clients) == clients
    # Sorted, all indices are 0 to 1436: disjoint, and nothing is left out.
    everything = np.concatenate([parts.buffer, *parts.clients])
    assert np.array_equal(np.sort(everything), np.arange(TRAIN))


def test_iid_parts_are_of_one_size():
    sizes = [len(part) for part in partition(Settings(server_buffer=100), 10).clients]
    assert sorted(sizes) == [133] * 3 + [134] * 7  # 1337 = 3 * 133 + 7 * 134


@pytest.mark.parametrize("clients", [1, 3, 7, 10])
def test_iid_parts_are_those_of_flowers_partitioner(clients):
    parts = partition(Settings(server_buffer=100, validation_samples=37), clients)
    # 1300 images in the order that the seed shuffles them to: the server's come first.
    order = np.random.default_rng([Settings().seed, 1]).permutation(TRAIN)[137:]
    partitioner = IidPartitioner(clients)
    partitioner.dataset = Dataset.from_dict({"index": order})
    for number, part in enumerate(parts.clients):
        assert part.tolist() == partitioner.load_partition(number)["index"][:]


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_same_seed_same_partition_other_seed_another(partitioner):
    def clients_of(seed):
        partition.cache_clear()
        return partition(Settings(partitioner=partitioner, seed=seed), 5)

    first, again, other = clients_of(3), clients_of(3), clients_of(4)
    assert again is not first
    assert np.array_equal(first.buffer, again.buffer)
    assert not np.array_equal(first.buffer, other.buffer)
    for mine, same, different in zip(first.clients, again.clients, other.clients, strict=True):
        assert np.array_equal(mine, same)
        assert not np.array_equal(mine, different)


def test_seed_decides_which_classes_a_dirichlet_client_holds():
    # Were the shares drawn alike, another shuffle would move a few images of a class only.
    labels = load_dataset(Settings()).train.labels

    def counts(seed):
        parts = partition(Settings(partitioner="dirichlet", seed=seed), 5)
        return np.stack([np.bincount(labels[part], minlength=10) for part in parts.clients])

    assert np.abs(counts(3) - counts(4)).sum() > TRAIN / 2


def skew(**settings):
    """Mean total variation distance of a client's classes from those of all."""
    labels = load_dataset(Settings()).train.labels
    parts = partition(Settings(**settings), 8)
    overall = np.bincount(labels, minlength=10) / len(labels)
    shares = [np.bincount(labels[part], minlength=10) / len(part) for part in parts.clients]
    return np.mean([np.abs(share - overall).sum() / 2 for share in shares])


def test_small_alpha_is_more_skewed_than_large_alpha_and_than_iid():
    iid = skew()
    small, large = (skew(partitioner="dirichlet", dirichlet_alpha=a) for a in (0.3, 100.0))
    assert iid < 0.15
    assert large < 0.15
    assert small > 0.35


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_samples_per_client_keeps_some_of_each_clients_own(partitioner):
    whole = partition(Settings(partitioner=partitioner), 4)
    few = partition(Settings(partitioner=partitioner, samples_per_client=20), 4)
    assert np.array_equal(few.buffer, whole.buffer)
    assert [len(part) for part in few.clients] == [20] * 4
    for part, all_of_it in zip(few.clients, whole.clients, strict=True):
        assert len(set(part) & set(all_of_it)) == 20


def test_more_samples_than_a_client_holds_are_refused():
    # (1437 - 256) / 4 = 295.25
    message = message_of(partition, Settings(samples_per_client=296), 4)
    assert message.startswith("samples-per-client: 296, but client ")
    assert message.endswith("holds only 295 images")
    enough = partition(Settings(samples_per_client=295), 4)
    assert [len(part) for part in enough.clients] == [295] * 4


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_buffer_that_leaves_too_few_images_is_refused(partitioner):
    settings = Settings(partitioner=partitioner, server_buffer=1430)
    message = message_of(partition, settings, 8)
    assert message == (
        "server-buffer: 1430 and validation-samples 0 of 1437 training images leave too few for "
        "8 clients"
    )


def test_one_image_each_is_enough():
    parts = partition(Settings(server_buffer=1430), 7)
    assert [len(part) for part in parts.clients] == [1] * 7


@pytest.mark.filterwarnings("error")  # Ten pages of figures were printed, in every process.
def test_dirichlet_partition_that_leaves_a_client_without_images_is_refused():
    settings = Settings(partitioner="dirichlet", dirichlet_alpha=1e-3)
    message = message_of(partition, settings, 60)
    assert message.startswith(
        "dirichlet-alpha: 0.001 leaves a client with fewer than 10 images among 60"
    )


def test_client_images_are_the_rows_of_the_partition():
    settings = Settings(samples_per_client=30)
    train = load_dataset(settings).train
    parts = partition(settings, 3)
    for number in range(3):
        images = client_images(settings, number, 3)
        assert np.array_equal(images.pixels, train.pixels[parts.clients[number]])
        assert np.array_equal(images.labels, train.labels[parts.clients[number]])


@pytest.mark.parametrize("number", [-1, 3, 100])
def test_partition_id_out_of_range_is_refused(number):
    message = message_of(client_images, Settings(), number, 3)
    assert message == f"partition-id: {number} of 3; allowed: 0 to 2"


@pytest.mark.parametrize("clients", [2, 9])
@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_server_holds_the_buffer_whatever_the_number_of_clients(partitioner, clients):
    settings = Settings(partitioner=partitioner, server_buffer=50, seed=2)
    parts = partition(settings, clients)
    pixels = server_pixels(settings)
    assert np.array_equal(pixels, load_dataset(settings).train.pixels[parts.buffer])
    assert set(parts.buffer).isdisjoint(np.concatenate(parts.clients))


def test_without_buffer_clients_hold_everything():
    settings = Settings(server_buffer=0, calibrate_normalization=False)
    assert len(server_pixels(settings)) == 0
    assert sum(len(part) for part in partition(settings, 6).clients) == TRAIN


def test_without_a_validation_part_the_test_set_is_evaluated_on():
    assert evaluation_images(Settings()) is load_dataset(Settings()).test


@pytest.mark.parametrize("partitioner", PARTITIONERS)
def test_validation_part_is_neither_the_buffers_nor_a_clients(partitioner):
    settings = Settings(partitioner=partitioner, server_buffer=50, validation_samples=200, seed=3)
    train = load_dataset(settings).train
    parts = partition(settings, 4)
    taken = np.concatenate([parts.buffer, *parts.clients])
    held = np.setdiff1d(np.arange(TRAIN), taken)
    assert len(held) == 200
    assert len(taken) == TRAIN - 200
    images = evaluation_images(settings)
    expected = sorted(train.pixels[i].tobytes() + bytes([train.labels[i]]) for i in held)
    found = zip(images.pixels, images.labels, strict=True)
    assert sorted(p.tobytes() + bytes([label]) for p, label in found) == expected


def test_validation_part_that_leaves_no_images_is_refused():
    settings = Settings(server_buffer=37, validation_samples=1400)
    message = message_of(evaluation_images, settings)
    assert message == (
        "validation-samples: 1400 beside server-buffer 37; there are 1437 training images"
    )
    assert message_of(partition, settings, 1).startswith("server-buffer: 37 and validation-samples")
