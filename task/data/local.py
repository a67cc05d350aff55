"""A device's own folder of images, brought to the classes and the shape that the server names."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from core.errors import SettingsError
from core.files import printable, user_path
from task.data.dataset import Images, images_of, readable_folder
from task.data.image_folder import Listing, find_parts, in_short, list_images

# How folders of images are spoken of that are read on the server too; not within a path.
_OF_THE_SERVER = re.compile(r"^data-dir(?=: )|(?<=; )data-dir(?= may be one level)")


@lru_cache(maxsize=2)
def local_images(
    data_path: str, image_size: int, classes: tuple[str, ...], channels: int, size: int
) -> tuple[Images, Images | None]:
    """Read ``data_path/<class>/**``, or its folders ``train`` and ``test``.

    Parameters
    ----------
    data_path : str
        ``data-path`` of the node-config.
    image_size : int
        As the setting; 0: images are as they are, and must be of `size`.
    classes : tuple of str
        The server's, whose places are the labels. A device may lack some.
    channels, size : int
        Of the server's images. Grey images are taken for three channels too.

    Returns
    -------
    tuple of Images
        To train on, and to evaluate on; None where the folder has no part ``test``.

    Raises
    ------
    SettingsError
        If there is no such folder, it holds fewer than two images, or what it holds is not the
        server's; one line that begins with ``data-path``.
    """
    try:
        folder = readable_folder(user_path("data-path", data_path), "data-path")
        parts = find_parts(folder)
        train = _read(folder, parts.train, image_size, classes, channels, size)
        test = None
        if parts.test is not None:
            test = _read(folder, parts.test, image_size, classes, channels, size)
    except SettingsError as error:
        raise SettingsError(_OF_THE_SERVER.sub("data-path", str(error))) from None
    if len(train) < 2:
        raise SettingsError(
            f"data-path: {printable(folder)} holds {len(train)} image; allowed: 2 or more"
        )
    return train, test


def _read(
    folder: Path,
    part: Path,
    image_size: int,
    classes: Sequence[str],
    channels: int,
    size: int,
) -> Images:
    listing = list_images(part, may_lack=True)
    if unknown := [name for name in listing.classes if name not in classes]:
        raise SettingsError(
            f"data-path: {printable(folder)} has classes that the server does not have: "
            f"{in_short(unknown)}; allowed: {in_short(classes)}"
        )
    images = images_of(_relabelled(listing, classes), image_size)
    pixels = images.pixels
    if pixels.shape[1] == 1 and channels == 3:
        pixels = np.repeat(pixels, 3, axis=1)
    if pixels.shape[1:] != (channels, size, size):
        raise SettingsError(
            f"data-path: images in {printable(folder)} are {pixels.shape[1]}x{pixels.shape[2]}x"
            f"{pixels.shape[3]}, the server's {channels}x{size}x{size}; allowed: the same, or "
            "image-size set"
        )
    return Images(pixels, images.labels)


def _relabelled(listing: Listing, classes: Sequence[str]) -> Listing:
    """Give files the places of their classes among the server's."""
    place = [classes.index(name) for name in listing.classes]
    files = tuple(replace(file, label=place[file.label]) for file in listing.files)
    return Listing(tuple(classes), files, listing.passed_over)
