import gzip
import hashlib
import pickle
import pwd
import warnings
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import task.data.dataset
from core.errors import SettingsError
from core.settings import Dataset, Settings
from task.data.dataset import Images, describe, held_out, load_dataset

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
    task.data.dataset._load.cache_clear()
    again = load_dataset(Settings(seed=9))
    assert again is not first
    assert np.array_equal(again.test.pixels, first.test.pixels)
    assert np.array_equal(again.train.labels, first.train.labels)


def test_classes_absent_from_the_validation_part_are_named():
    dataset = load_dataset(Settings())
    few = dataset.train[np.flatnonzero(dataset.train.labels != 7)]
    assert [line for _, line in describe(dataset, few)] == [
        "the evaluation images hold none of the classes 7"
    ]
    assert list(describe(dataset, dataset.test)) == []


# Images of each class, and how many of each are held out: at least one of two or more, about a
# fifth in all, what is left over to those of which the most was cut off.
HELD_OUT = [
    ([5] * 12, [1] * 12),
    ([11, 11], [2, 2]),
    ([50], [10]),
    ([2, 2, 2], [1, 1, 1]),
    ([1, 4], [0, 1]),
    ([1, 2, 3, 50], [0, 1, 1, 10]),
    ([9, 9, 7, 5], [2, 2, 1, 1]),  # 30 // 5 = 6, of which 1 + 1 + 1 + 1; cut off: 4, 4, 2, 0.
    ([7, 9, 6, 8], [1, 2, 1, 2]),  # Likewise: 2, 4, 1, 3.
    ([1] * 20 + [6], [0] * 20 + [2]),
    ([1] * 40 + [6, 5], [0] * 40 + [2, 1]),  # 51 // 5 = 10, but no class gives up more.
    ([0, 5, 5], [0, 1, 1]),
]


@pytest.mark.parametrize(("counts", "held"), HELD_OUT)
def test_held_out_part_has_of_every_class(counts, held):
    labels = np.repeat(np.arange(len(counts)), counts)
    train, test = held_out(labels)
    assert sorted([*train, *test]) == list(range(len(labels)))
    assert np.bincount(labels[test], minlength=len(counts)).tolist() == held
    assert all(np.bincount(labels[train], minlength=len(counts))[np.array(counts) > 0])
    assert all(np.array_equal(a, b) for a, b in zip(held_out(labels), (train, test), strict=True))


def test_held_out_images_are_not_the_first_of_their_class():
    labels = np.arange(200) % 2
    _, test = held_out(labels)
    assert test.max() > 150
    assert not np.array_equal(np.sort(test), test)


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


@pytest.mark.parametrize("dataset", get_args(Dataset))
def test_missing_folder_is_refused(tmp_path, dataset):
    missing = tmp_path / "none"
    message = message_of(dataset=dataset, data_dir=str(missing))
    assert message == f"data-dir: there is no folder {missing}"


def test_image_folder_needs_a_folder():
    assert message_of(dataset="image-folder").startswith("data-dir: image-folder needs the folder")


@pytest.mark.parametrize("dataset", get_args(Dataset))
def test_folder_that_is_a_file_is_refused(tmp_path, dataset):
    (tmp_path / "file").write_text("none")
    message = message_of(dataset=dataset, data_dir=str(tmp_path / "file"))
    assert message == f"data-dir: {tmp_path / 'file'} is no folder"


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_download_without_a_home_is_one_line(monkeypatch, dataset):
    monkeypatch.setattr(task.data.dataset, "CACHE", Path("~/.cache/prowd"))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert message_of(dataset=dataset).startswith(
        "data-dir: ~/.cache/prowd/data: no home folder is known for ~; allowed: a path, absolute"
    )


def test_download_into_a_folder_that_cannot_be_made_is_one_line():
    task.data.dataset.CACHE.write_text("none")
    message = message_of(dataset="cifar10")
    assert message.startswith(
        f"data-dir: CIFAR10 could not be downloaded to {task.data.dataset.CACHE}/data"
    )


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


@pytest.mark.parametrize(
    ("pixels", "labels", "why"),
    [
        (noise(1, 6, 28, 28), [3, 1, 4, 1, 5], "holds 6 images but 5 labels"),
        (noise(1, 6, 28, 28), [3, 1, 4, 1, 5, 10], "holds labels from 1 to 10; allowed: 0 to 9"),
        (noise(1, 0, 28, 28), [], "FashionMNIST could not be read from"),
        (noise(1, 6, 28, 14), [3, 1, 4, 1, 5, 9], "images are uint8 of shape (6, 1, 28, 14)"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(tmp_path, pixels, labels, why):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))
    message = message_of(dataset="fashion-mnist", data_dir=str(tmp_path))
    assert message.startswith("data-dir: ")
    assert str(tmp_path) in message
    assert why in message


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
    assert message.startswith(f"data-dir: {dataset.upper()} could not be read from {tmp_path}: ")
    assert "download=True" not in message
