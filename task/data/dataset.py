"""Datasets as arrays in memory: loaded once per process, and validated."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from logging import INFO, WARNING
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from core.errors import SettingsError
from core.files import failing_by_name, printable, user_path
from core.settings import Settings
from task.data.builtin import BUILT_IN
from task.data.image_folder import (
    Listing,
    Parts,
    find_parts,
    in_short,
    list_images,
    refuse_masks,
    refuse_one_class,
    same_folders,
)
from task.data.images import check_memory, load_images, warn_once
from task.data.to_input import to_input
from task.examples import Examples, Indices, Inputs

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "prowd")
# A brightest pixel below this is reported: a quarter of the levels is used.
_DARK = 64


@dataclass(frozen=True)
class Pixels(Inputs):
    """Images without labels.

    Attributes
    ----------
    pixels : ndarray
        uint8 ``[n, channels, size, size]``.
    """

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def inputs(self, index: Indices, device: torch.device | None = None) -> Tensor:
        return to_input(self.pixels[index], device)


@dataclass(frozen=True)
class Images(Examples):
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

    def __getitem__(self, index: Indices) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    def part(self, index: np.ndarray) -> "Images":
        return self[index]

    def inputs(self, index: Indices, device: torch.device | None = None) -> Tensor:
        return to_input(self.pixels[index], device)

    def batch(self, index: Indices, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        return self.inputs(index, device), torch.from_numpy(self.labels[index]).to(device)


@dataclass(frozen=True)
class Dataset:
    """Training and test images of one task.

    Attributes
    ----------
    train, test : Images
        Images.
    num_classes : int
        Classes.
    classes : tuple of str
        Their names, where the user gave them.
    notes : tuple of str
        What a user should know of how they were read.
    """

    train: Images
    test: Images
    num_classes: int
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of an image, 1 or 3."""
        return int(self.train.pixels.shape[1])

    @property
    def size(self) -> int:
        """Pixels a side."""
        return int(self.train.pixels.shape[2])


def load_dataset(settings: Settings) -> Dataset:
    """Load the dataset that the settings name; a second call in the same process is free.

    Raises
    ------
    SettingsError
        If the folder is missing or does not hold the data, or a download fails.

    Examples
    --------
    >>> data = load_dataset(Settings(dataset="digits"))
    >>> len(data.train), data.num_classes, data.channels
    (1437, 10, 1)
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


def describe(dataset: Dataset, evaluation: Images) -> Iterator[tuple[int, str]]:
    """Say in lines, with their log levels, what was read: for the server's log.

    Parameters
    ----------
    dataset : Dataset
        The data.
    evaluation : Images
        What models are evaluated on.

    Yields
    ------
    tuple
        Log level and line.
    """
    names = dataset.classes or tuple(map(str, range(dataset.num_classes)))
    parts = {"training": dataset.train, "evaluation": evaluation}
    counts = {
        part: np.bincount(images.labels, minlength=len(names)) for part, images in parts.items()
    }
    if dataset.classes:
        pairs = zip(names, counts["training"], counts["evaluation"], strict=True)
        listed = in_short([f"{printable(name)[:40]} {n} + {m}" for name, n, m in pairs])
        yield INFO, f"{len(names)} classes, training + evaluation images: {listed}"
        brightest = max(int(images.pixels.max()) for images in (dataset.train, dataset.test))
        if brightest < _DARK:
            yield WARNING, f"data-dir: the brightest pixel of all images is {brightest} of 255"
    twice = _seen_twice(dataset.train, dataset.test) if dataset.classes else ()
    for note in (*dataset.notes, *twice):
        yield WARNING, f"data-dir: {note}"
    for part, count in counts.items():
        if absent := [name for name, n in zip(names, count, strict=True) if not n]:
            yield WARNING, f"the {part} images hold none of the classes {in_short(absent)}"


def data_folder(data_dir: str) -> Path:
    """Return the folder that ``data-dir`` names.

    Raises
    ------
    SettingsError
        If it is not there, is a file, or cannot be read.
    """
    return readable_folder(user_path("data-dir", data_dir), "data-dir")


def readable_folder(folder: Path, setting: str) -> Path:
    """Return a folder that a setting names, if it can be read.

    Raises
    ------
    SettingsError
        If not; the message begins with the setting.
    """
    with failing_by_name(setting, folder):
        try:
            with os.scandir(folder):
                return folder
        except FileNotFoundError:
            raise SettingsError(f"{setting}: there is no folder {printable(folder)}") from None
        except NotADirectoryError:
            raise SettingsError(f"{setting}: {printable(folder)} is no folder") from None


@lru_cache(maxsize=2)
def _load(name: str, data_dir: str, image_size: int) -> Dataset:
    folder = data_folder(data_dir) if data_dir else None
    if name == "image-folder":
        if folder is None:
            raise SettingsError("data-dir: image-folder needs the folder that holds the images")
        return _from_image_folder(folder, image_size)
    num_classes, read = BUILT_IN[name]
    train, test = (Images(*arrays) for arrays in read(folder, CACHE / "data"))
    dataset = Dataset(train, test, num_classes)
    for images in (dataset.train, dataset.test):
        _check_labels(images, dataset.num_classes, folder)
    return _resized(dataset, image_size)


def _check_labels(images: Images, num_classes: int, folder: Path | None) -> None:
    where = f"data-dir: {printable(folder)} holds" if folder else "dataset: there are"
    labels = images.labels
    if labels.shape != images.pixels.shape[:1]:
        raise SettingsError(f"{where} {len(images.pixels)} images but {labels.size} labels")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise SettingsError(
            f"{where} labels from {labels.min()} to {labels.max()}; allowed: 0 to {num_classes - 1}"
        )


def _from_image_folder(folder: Path, image_size: int) -> Dataset:
    parts = find_parts(folder)
    listing = list_images(parts.train)
    refuse_one_class(parts.train, listing)
    refuse_masks(parts.train, listing)
    if parts.test is None:
        return _held_out_of(folder, listing, image_size)
    test_listing = list_images(parts.test)
    if test_listing.classes != listing.classes:
        odd = in_short(sorted(set(listing.classes) ^ set(test_listing.classes)))
        raise SettingsError(
            f"data-dir: train and test in {printable(folder)} differ in classes: {odd}"
        )
    train, test = (images_of(part, image_size) for part in (listing, test_listing))
    if test.pixels.shape[1:] != train.pixels.shape[1:]:
        shapes = f"{train.pixels.shape[1:]} and {test.pixels.shape[1:]}"
        raise SettingsError(
            f"data-dir: images in train and test of {printable(folder)} are {shapes}"
        )
    notes = _notes(parts, listing, test_listing.passed_over)
    return Dataset(train, test, len(listing.classes), listing.classes, notes)


def images_of(listing: Listing, image_size: int) -> Images:
    """Decode the images of a listing, or take those that an earlier call has cached."""
    labels = np.array([file.label for file in listing.files], np.int64)
    return Images(load_images(listing.files, image_size, _cache_folder()), labels)


def _held_out_of(folder: Path, listing: Listing, image_size: int) -> Dataset:
    """Hold out a fifth of the images of a folder without a test part."""
    labels = np.array([file.label for file in listing.files])
    counts = np.bincount(labels)
    if len(labels) < 5 or counts.max() < 2:
        raise SettingsError(
            f"data-dir: {printable(folder)} holds {len(labels)} images, of one class "
            f"{counts.max()} at most; it takes 5 or more, and 2 of one class, or folders train "
            "and test"
        )
    images = images_of(listing, image_size)
    train, test = held_out(labels)
    notes = _notes(Parts(folder), listing)
    return Dataset(images[train], images[test], len(listing.classes), listing.classes, notes)


def held_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split images by class, the same way every time: four fifths to train on, one to test on.

    Parameters
    ----------
    labels : ndarray
        Labels of the images, from 0.

    Returns
    -------
    tuple of ndarray
        Indices of the two parts. A class of two or more images has at least one in each.
    """
    counts = np.bincount(labels)
    held = np.where(counts >= 2, np.maximum(counts // 5, 1), 0)
    # What the whole numbers left of one fifth goes to the classes that they rounded down most.
    lost = np.where(counts >= 5, counts % 5, 0)
    spare = max(len(labels) // 5 - held.sum(), 0)
    most = np.argsort(-lost, kind="stable")[:spare]
    held[most] += lost[most] > 0
    order = np.random.default_rng(0).permutation(len(labels))
    # The place of each image among those of its class, in that order.
    by_class = np.argsort(labels[order], kind="stable")
    place = np.empty(len(labels), np.int64)
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_test = place < held[labels[order]]
    return order[~in_test], order[in_test]


def _seen_twice(train: Images, test: Images) -> tuple[str, ...]:
    """Tell of images, pixel by pixel, in both parts, or in two classes: links and copies are so."""
    seen, known = (_labels_of(images) for images in (train, test))
    notes = []
    if both := len(seen.keys() & known.keys()):
        notes.append(f"images that are in both the training and the test part: {both}")
    for image, labels in known.items():
        seen.setdefault(image, set()).update(labels)
    if torn := sum(len(labels) > 1 for labels in seen.values()):
        notes.append(f"images that are in several classes: {torn}")
    return tuple(notes)


def _labels_of(images: Images) -> dict[int, set[int]]:
    labels: dict[int, set[int]] = {}
    for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
        labels.setdefault(xxh3_64_intdigest(pixels.tobytes()), set()).add(label)
    return labels


def _notes(parts: Parts, listing: Listing, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    notes = []
    if same := same_folders(parts.train, listing.classes):
        notes.append(
            f"each of its class folders holds {in_short(same)}; if those are the classes, data-dir "
            "is one level too high"
        )
    plain: dict[str, list[str]] = {}
    for name in listing.classes:
        plain.setdefault(normalize("NFKC", name).casefold().strip(), []).append(name)
    if alike := [n for own in plain.values() if len(own) > 1 for n in own]:
        notes.append(f"classes have names that hardly differ: {in_short(alike)}")
    passed_over = listing.passed_over + more
    if parts.unused:
        notes.append(f"of its folders only train and test are used, not {in_short(parts.unused)}")
    if passed_over:
        others = f" and {len(passed_over) - 1} more" if len(passed_over) > 1 else ""
        notes.append(
            "not used, as no image by its suffix or in no class folder: "
            f"{printable(passed_over[0])}{others}"
        )
    return tuple(notes)


def _cache_folder() -> Path | None:
    try:
        return (CACHE / "image-folder").expanduser()
    except RuntimeError:
        warn_once("decoded images are not cached, as no home folder is known; HOME is unset")
        return None


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

    return replace(dataset, train=resized(dataset.train), test=resized(dataset.test))
