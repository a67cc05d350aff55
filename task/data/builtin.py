"""The built-in datasets as arrays: read, downloaded, or of scikit-learn."""

import gzip
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import SettingsError
from core.files import failing_by_name, printable, read_regular, reason, user_path

# Pixels uint8 [n, channels, size, size] and labels int64 [n].
Arrays = tuple[np.ndarray, np.ndarray]
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _digits(folder: Path | None, downloads: Path) -> tuple[Arrays, Arrays]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=360, random_state=0, stratify=labels
    )
    return (pixels[train], labels[train]), (pixels[test], labels[test])


def _fashion_mnist(folder: Path | None, downloads: Path) -> tuple[Arrays, Arrays]:
    if folder is None and not os.path.isdir(_DEBIAN_FASHION_MNIST):
        return _torchvision(None, downloads, name="FashionMNIST")
    source = folder or _DEBIAN_FASHION_MNIST
    if os.path.isdir(source / "FashionMNIST"):
        return _torchvision(source, downloads, name="FashionMNIST")
    return _read_part(source, "train", 60_000), _read_part(source, "t10k", 10_000)


def _read_part(source: Path, part: str, count: int) -> Arrays:
    pixels = _read_idx(source / f"{part}-images-idx3-ubyte.gz", (count, 28, 28))
    labels = _read_idx(source / f"{part}-labels-idx1-ubyte.gz", (count,))
    return pixels[:, None], labels.astype(np.int64)


def _read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    with failing_by_name("data-dir", path, "read", EOFError, zlib.error):
        data = gzip.decompress(read_regular(path))
    if not data.startswith(header) or len(data) != len(header) + int(np.prod(shape)):
        raise SettingsError(f"data-dir: {printable(path)} is not an idx file of shape {shape}")
    return np.frombuffer(bytearray(data), np.uint8, offset=len(header)).reshape(shape)


def _torchvision(folder: Path | None, downloads: Path, *, name: str) -> tuple[Arrays, Arrays]:
    import torchvision

    root = folder or user_path("data-dir", downloads)
    dataset_class = getattr(torchvision.datasets, name)
    try:
        train, test = (
            _arrays(dataset_class(root, train=train, download=folder is None))
            for train in (True, False)
        )
    except Exception as error:  # urllib, tarfile and torchvision raise a dozen kinds.
        tried = "downloaded to" if folder is None else "read from"
        # Torchvision's advice is meant for its caller.
        why = reason(error).removesuffix(" You can use download=True to download it")
        allowed = "" if folder is None else "; allowed: all its files, laid out as torchvision does"
        raise SettingsError(
            f"data-dir: {name} could not be {tried} {printable(root)}: {why}{allowed}"
        ) from None
    return train, test


def _arrays(part: Any) -> Arrays:
    """Bring a part of a torchvision dataset to channels first."""
    pixels = np.asarray(part.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    if pixels.dtype != np.uint8 or not pixels.size or pixels.shape[2] != pixels.shape[3]:
        raise ValueError(f"images are {pixels.dtype} of shape {pixels.shape}")
    return np.ascontiguousarray(pixels), np.asarray(part.targets, np.int64)


# Classes, and what reads the training and the test part from a folder of the user's or, without
# one, from that of downloads.
BUILT_IN: dict[str, tuple[int, Callable[[Path | None, Path], tuple[Arrays, Arrays]]]] = {
    "digits": (10, _digits),
    "fashion-mnist": (10, _fashion_mnist),
    "cifar10": (10, partial(_torchvision, name="CIFAR10")),
    "cifar100": (100, partial(_torchvision, name="CIFAR100")),
}
