import gzip
import hashlib
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import task.data
from task.data import Images, load_dataset
from task.errors import SettingsError
from task.settings import DATASETS, Settings

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def message_of(**settings):
    with pytest.raises(SettingsError) as caught:
        load_dataset(Settings(**settings))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_images_are_picked_by_index():
    images = Images(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.arange(5) * 10)
    picked = images[np.array([3, 0])]
    assert len(images) == 5
    assert picked.pixels.ravel().tolist() == [3, 0]
    assert picked.labels.tolist() == [30, 0]


def test_digits_have_the_known_shape():
    dataset = load_dataset(Settings())
    assert (dataset.num_classes, dataset.channels, dataset.size) == (10, 1, 8)
    assert dataset.train.pixels.shape == (1437, 1, 8, 8)
    assert dataset.test.pixels.shape == (360, 1, 8, 8)
    for part in (dataset.train, dataset.test):
        assert part.pixels.dtype == np.uint8
        assert part.labels.dtype == np.int64


def test_digits_are_all_of_scikit_learns_stretched_to_bytes():
    dataset = load_dataset(Settings())
    # scikit-learn's digits hold 0 to 16; 255 / 16 = 15.9375, and 8 gives 127.5, to even 128.
    stretched = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    digits = load_digits()
    expected = sorted(
        (label, [stretched[value] for value in image.ravel().astype(int)])
        for label, image in zip(digits.target.tolist(), digits.images, strict=True)
    )
    got = sorted(
        (label, pixels.ravel().tolist())
        for part in (dataset.train, dataset.test)
        for label, pixels in zip(part.labels.tolist(), part.pixels, strict=True)
    )
    assert got == expected


def test_digits_are_split_by_class():
    dataset = load_dataset(Settings())
    total = np.bincount(load_digits().target)
    train, test = np.bincount(dataset.train.labels), np.bincount(dataset.test.labels)
    assert np.array_equal(train + test, total)
    # Each class is tested on its share of the 360, to the whole image.
    assert (np.abs(test - total * 360 / 1797) < 1).all()


def test_digits_are_split_alike_every_time():
    first = load_dataset(Settings())
    task.data._load.cache_clear()
    again = load_dataset(Settings(seed=9))
    assert again is not first
    assert np.array_equal(again.test.pixels, first.test.pixels)
    assert np.array_equal(again.train.labels, first.train.labels)


def test_second_call_is_free():
    assert load_dataset(Settings()) is load_dataset(Settings(seed=1, batch_size=7))


@pytest.mark.parametrize("size", [4, 16, 32])
def test_image_size_resizes_as_pillow_does(size):
    plain, dataset = load_dataset(Settings()), load_dataset(Settings(image_size=size))
    for part, before in ((dataset.train, plain.train), (dataset.test, plain.test)):
        assert part.pixels.shape == (len(before), 1, size, size)
        assert part.pixels.dtype == np.uint8
        assert np.array_equal(part.labels, before.labels)
    for index in range(20):
        image = Image.fromarray(plain.train.pixels[index, 0])
        expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), int)
        # The two round their fixed-point sums on their own.
        assert np.abs(dataset.train.pixels[index, 0] - expected).max() <= 1


def test_image_size_of_the_images_changes_nothing():
    dataset = load_dataset(Settings(image_size=8))
    assert np.array_equal(dataset.train.pixels, load_dataset(Settings()).train.pixels)


@pytest.mark.parametrize("dataset", DATASETS)
def test_missing_folder_is_refused(tmp_path, dataset):
    missing = tmp_path / "none"
    message = message_of(dataset=dataset, data_dir=str(missing))
    assert message == f"data-dir: there is no folder {missing}"


def test_image_folder_needs_a_folder():
    assert message_of(dataset="image-folder").startswith("data-dir: image-folder needs the folder")


@pytest.mark.parametrize("dataset", ["fashion-mnist", "cifar10", "cifar100"])
def test_empty_folder_is_refused(tmp_path, dataset):
    message = message_of(dataset=dataset, data_dir=str(tmp_path))
    assert message.startswith("data-dir: ")
    assert str(tmp_path) in message
    assert list(tmp_path.iterdir()) == []  # Nothing was downloaded into the user's folder.


def idx(array, shape=None):
    """An idx file: two zeros, 8 for bytes, dimensions, big-endian sizes, the bytes."""
    shape = array.shape if shape is None else shape
    sizes = b"".join(n.to_bytes(4, "big") for n in shape)
    return bytes([0, 0, 8, len(shape)]) + sizes + array.tobytes()


def spoilt(data):
    """gzip data with a deflate block of the reserved third kind."""
    return data[:10] + b"\x07" + data[11:]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(idx(noise(0, 6, 28, 28))),
        gzip.compress(idx(noise(0, 6, 28, 28), (60_000, 28, 28))),
        gzip.compress(idx(noise(0, 60_000))),
        gzip.compress(b""),
        gzip.compress(idx(noise(0, 6, 28, 28)))[:-20],
        idx(noise(0, 6, 28, 28)),
        b"",
        spoilt(gzip.compress(idx(noise(0, 6, 28, 28)))),
    ],
    ids=["few", "short", "labels", "nothing", "truncated", "unzipped", "empty", "spoilt"],
)
def test_fashion_mnist_of_wrong_shape_is_refused(tmp_path, content):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    message = message_of(dataset="fashion-mnist", data_dir=str(tmp_path))
    assert message.startswith(f"data-dir: {path} ")


def test_fashion_mnist_in_torchvisions_layout(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {"train": noise(1, 6, 28, 28), "t10k": noise(2, 3, 28, 28)}
    labels = {"train": [3, 1, 4, 1, 5, 9], "t10k": [2, 6, 5]}
    for part in arrays:
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(arrays[part]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array(labels[part], np.uint8)))
    dataset = load_dataset(Settings(dataset="fashion-mnist", data_dir=str(tmp_path)))
    assert (dataset.num_classes, dataset.channels, dataset.size) == (10, 1, 28)
    assert np.array_equal(dataset.train.pixels[:, 0], arrays["train"])
    assert np.array_equal(dataset.test.pixels[:, 0], arrays["t10k"])
    assert dataset.train.labels.tolist() == labels["train"]
    assert dataset.test.labels.dtype == np.int64


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    dataset = load_dataset(Settings(dataset="fashion-mnist"))
    assert (dataset.num_classes, dataset.channels, dataset.size) == (10, 1, 28)
    assert dataset.train.pixels.shape == (60_000, 1, 28, 28)
    assert dataset.test.pixels.shape == (10_000, 1, 28, 28)
    # Its README: as many of every class; the first test images are boot, pullover, trousers twice.
    assert np.bincount(dataset.train.labels).tolist() == [6_000] * 10
    assert np.bincount(dataset.test.labels).tolist() == [1_000] * 10
    assert dataset.train.labels[:4].tolist() == [9, 0, 0, 3]
    assert dataset.test.labels[:5].tolist() == [9, 2, 1, 1, 6]
    # Its published mean and deviation, 0.2860 and 0.3530 of full scale.
    assert dataset.train.pixels.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert dataset.train.pixels.std() / 255 == pytest.approx(0.3530, abs=5e-5)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_becomes_a_tensor_without_a_warning():
    # torch warns of arrays that cannot be written to; evaluation takes slices, not copies.
    dataset = load_dataset(Settings(dataset="fashion-mnist"))
    warned = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.from_numpy(dataset.test.pixels[:500])
    finally:
        torch.set_warn_always(warned)


def cifar_folder(root, monkeypatch):
    """Two tiny batches in CIFAR-10's format; torchvision is told their checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {
        "data_batch_1": {"data": noise(1, 4, 3072), "labels": [7, 0, 9, 2]},
        "test_batch": {"data": noise(2, 2, 3072), "labels": [5, 5]},
        "batches.meta": {"label_names": list("abcdefghij")},
    }
    sums = {}
    for name, content in batches.items():
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {**cifar.meta, "filename": "batches.meta", "md5": sums["batches.meta"]}
    monkeypatch.setattr(cifar, "meta", meta)
    return batches


def test_cifar10_pixels_are_channels_first(tmp_path, monkeypatch):
    batches = cifar_folder(tmp_path, monkeypatch)
    dataset = load_dataset(Settings(dataset="cifar10", data_dir=str(tmp_path)))
    assert (dataset.num_classes, dataset.channels, dataset.size) == (10, 3, 32)
    # A row of the format is 1024 red, 1024 green and 1024 blue bytes, each row by row.
    assert np.array_equal(dataset.train.pixels.reshape(4, 3072), batches["data_batch_1"]["data"])
    assert np.array_equal(dataset.test.pixels.reshape(2, 3072), batches["test_batch"]["data"])
    assert dataset.train.labels.tolist() == [7, 0, 9, 2]
    assert dataset.test.labels.dtype == np.int64


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_fake_cifar_is_refused(tmp_path, dataset):
    for folder in ("cifar-10-batches-py", "cifar-100-python"):
        (tmp_path / folder).mkdir()
        for name in ("data_batch_1", "test_batch", "train", "test", "batches.meta", "meta"):
            (tmp_path / folder / name).write_bytes(pickle.dumps({"data": [], "labels": []}))
    message = message_of(dataset=dataset, data_dir=str(tmp_path))
    assert message.startswith(f"data-dir: {dataset.upper()} could not be found in {tmp_path}: ")
