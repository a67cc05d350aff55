"""Datasets as arrays in memory: loaded once per process, checked at the door."""

import gzip
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from task.errors import SettingsError
from task.images import check_memory, load_image_folder
from task.settings import Settings

CACHE = Path("~/.cache/prowd")
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes
    ----------
    pixels : ndarray
        uint8 ``[n, channels, size, size]``.
    labels : ndarray
        int64 ``[n]``.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: np.ndarray) -> "Images":
        return Images(self.pixels[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one task."""

    train: Images
    test: Images
    num_classes: int

    @property
    def channels(self) -> int:
        """Channels of an image, 1 or 3."""
        return self.train.pixels.shape[1]

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.train.pixels.shape[2]


def load_dataset(settings: Settings) -> Dataset:
    """Load the dataset that the settings name; a second call in the same process is free.

    Raises
    ------
    SettingsError
        If the folder is missing or does not hold the data, or a download fails.
    """
    return _load(settings.dataset, settings.data_dir, settings.image_size)


def fingerprint(dataset: Dataset) -> str:
    """Return a short text that differs where any image or label does."""
    crc = 0
    for part in (dataset.train, dataset.test):
        for array in (part.pixels, part.labels):
            crc = zlib.crc32(str(array.shape).encode(), crc)
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return f"{len(dataset.train)} + {len(dataset.test)} images, CRC {crc:08x}"


@lru_cache(maxsize=2)
def _load(name: str, data_dir: str, image_size: int) -> Dataset:
    folder = Path(data_dir).expanduser() if data_dir else None
    if folder and not folder.is_dir():
        raise SettingsError(f"data-dir: there is no folder {folder}")
    if name == "image-folder":
        if folder is None:
            raise SettingsError("data-dir: image-folder needs the folder that holds the images")
        return _from_image_folder(folder, image_size)
    dataset = {
        "digits": lambda: _digits(),
        "fashion-mnist": lambda: _fashion_mnist(folder),
        "cifar10": lambda: _torchvision("CIFAR10", folder, 10),
        "cifar100": lambda: _torchvision("CIFAR100", folder, 100),
    }[name]()
    return _resized(dataset, image_size)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    images = Images(pixels, labels)
    return Dataset(images[train], images[test], 10)


def _fashion_mnist(folder: Path | None) -> Dataset:
    if folder is None and not _DEBIAN_FASHION_MNIST.is_dir():
        return _torchvision("FashionMNIST", None, 10)
    source = folder or _DEBIAN_FASHION_MNIST
    if (source / "FashionMNIST").is_dir():
        return _torchvision("FashionMNIST", source, 10)
    parts = []
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        pixels = _read_idx(source / f"{part}-images-idx3-ubyte.gz", (count, 28, 28))
        labels = _read_idx(source / f"{part}-labels-idx1-ubyte.gz", (count,))
        parts.append(Images(pixels[:, None], labels.astype(np.int64)))
    train, test = parts
    return Dataset(train, test, 10)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise SettingsError(f"data-dir: {path} cannot be read: {error}") from None
    if not data.startswith(header) or len(data) != len(header) + int(np.prod(shape)):
        raise SettingsError(f"data-dir: {path} is not an idx file of shape {shape}")
    return np.frombuffer(bytearray(data), np.uint8, offset=len(header)).reshape(shape)


def _torchvision(name: str, folder: Path | None, num_classes: int) -> Dataset:
    import torchvision

    root = folder or (CACHE / "data").expanduser()
    dataset_class = getattr(torchvision.datasets, name)
    try:
        parts = [
            dataset_class(root, train=train, download=folder is None) for train in (True, False)
        ]
    except Exception as error:  # urllib, tarfile and torchvision raise a dozen kinds.
        tried = "downloaded to" if folder is None else "found in"
        raise SettingsError(f"data-dir: {name} could not be {tried} {root}: {error}") from None
    images = []
    for part in parts:
        pixels = np.asarray(part.data)
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
        images.append(Images(np.ascontiguousarray(pixels), np.asarray(part.targets, np.int64)))
    train, test = images
    return Dataset(train, test, num_classes)


def _from_image_folder(folder: Path, image_size: int) -> Dataset:
    cache = (CACHE / "image-folder").expanduser()
    split = (folder / "train").is_dir()
    pixels, labels, classes = load_image_folder(
        folder / "train" if split else folder, image_size, cache
    )
    images = Images(pixels, labels)
    if not split:
        # One fifth of a folder without a test part is held out, the same fifth every time.
        order = np.random.default_rng(0).permutation(len(images))
        cut = len(images) // 5
        if not cut:
            raise SettingsError(
                f"data-dir: {folder} holds {len(images)} images; it takes 5 or more, or folders "
                "train and test"
            )
        return Dataset(images[order[cut:]], images[order[:cut]], len(classes))
    if not (folder / "test").is_dir():
        raise SettingsError(f"data-dir: {folder} has a train folder but no test folder beside it")
    test_pixels, test_labels, test_classes = load_image_folder(folder / "test", image_size, cache)
    if test_classes != classes:
        odd = sorted(set(classes) ^ set(test_classes))[:5]
        raise SettingsError(f"data-dir: train and test in {folder} differ in classes: {odd}")
    if test_pixels.shape[1:] != pixels.shape[1:]:
        shapes = f"{pixels.shape[1:]} and {test_pixels.shape[1:]}"
        raise SettingsError(f"data-dir: images in train and test of {folder} are {shapes}")
    return Dataset(images, Images(test_pixels, test_labels), len(classes))


def _resized(dataset: Dataset, image_size: int) -> Dataset:
    if image_size in (0, dataset.size):
        return dataset
    images = len(dataset.train) + len(dataset.test)
    check_memory(images, dataset.channels, image_size)
    import torch
    from torchvision.transforms.v2.functional import resize

    def resized(images: Images) -> Images:
        pixels = resize(torch.from_numpy(images.pixels), [image_size, image_size], antialias=True)
        return Images(pixels.numpy(), images.labels)

    return Dataset(resized(dataset.train), resized(dataset.test), dataset.num_classes)
