"""The images of a folder, decoded once and cached as one array."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from logging import WARNING, getLogger
from pathlib import Path

import numpy as np

from core.errors import SettingsError
from core.files import printable, reason
from task.data.image_folder import ImageFile
from task.data.pixels import RULES, decode

# Of pixels in memory: the server and every worker hold the data once.
_MOST_GIBIBYTES = 8


def load_images(files: Sequence[ImageFile], image_size: int, cache: Path | None) -> np.ndarray:
    """Decode files, or read the array that an earlier call left.

    Parameters
    ----------
    files : sequence of ImageFile
        At least one.
    image_size : int
        Pixels a side to resize to; 0 keeps the images as they are, which must then be square and
        of one size.
    cache : Path, optional
        Folder of the cached arrays. A cached array is used as long as no file's name, size or
        time of change has changed; one that cannot be read is made anew. Without a folder, or
        with one that cannot be written, every process decodes the files.

    Returns
    -------
    ndarray
        uint8 ``[n, channels, size, size]``: 1 channel if all images are grey, else 3.

    Raises
    ------
    SettingsError
        If one cannot be decoded, or sizes differ and `image_size` is 0.
    """
    if cache is None:
        return _decode_all([file.name for file in files], image_size)
    path = cache / f"{_digest(files, image_size)}.npz"
    pixels = _read(path, len(files), image_size)
    if pixels is None:
        pixels = _decode_all([file.name for file in files], image_size)
        _write(path, pixels)
    return pixels


def check_memory(images: int, channels: int, size: int) -> None:
    """Refuse pixels that no process should hold.

    Raises
    ------
    SettingsError
        If they take too much.
    """
    gibibytes = images * channels * size**2 / 2**30
    if gibibytes > _MOST_GIBIBYTES:
        raise SettingsError(
            f"image-size: {images} images of {size} pixels a side take {gibibytes:.0f} GiB in "
            f"every process; allowed: {_MOST_GIBIBYTES} GiB"
        )


@lru_cache(maxsize=64)
def warn_once(text: str) -> None:
    """Log a line, in this process once: it holds for every folder that is loaded."""
    # The logger that Flower prints.
    getLogger("flwr").log(WARNING, "prowd: %s", text)


def _digest(files: Sequence[ImageFile], image_size: int) -> str:
    import PIL

    digest = hashlib.sha256(f"{RULES} {PIL.__version__} {image_size}".encode())
    for file in files:
        digest.update(os.fsencode(file.name))
        digest.update(f"\0{file.label}\0{file.size}\0{file.changed}\n".encode())
    return digest.hexdigest()[:32]


def _decode_all(names: list[str], image_size: int) -> np.ndarray:
    first, grey = decode(names[0], image_size)
    check_memory(len(names), 3, first.shape[0])
    pixels = np.empty((len(names), 3, *first.shape[:2]), np.uint8)
    for index, name in enumerate(names):
        array, is_grey = decode(name, image_size)
        grey &= is_grey
        if array.shape[0] != pixels.shape[2]:
            raise SettingsError(
                f"image-size: {printable(name)} is {array.shape[0]} pixels wide, others "
                f"{pixels.shape[2]}; set image-size"
            )
        pixels[index] = array.transpose(2, 0, 1)
    return pixels[:, :1].copy() if grey else pixels


def _read(path: Path, count: int, image_size: int) -> np.ndarray | None:
    """Read a cached array; None if there is none, or it is torn or of another dataset."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            pixels: np.ndarray = arrays["pixels"]
        _check(pixels, count, image_size)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # zipfile, numpy and the disk raise a dozen kinds.
        warn_once(f"the cached images {printable(path)} are made anew: {reason(error)}")
        return None
    return pixels


def _check(pixels: np.ndarray, count: int, image_size: int) -> None:
    known = pixels.dtype == np.uint8 and pixels.ndim == 4
    if not known or pixels.shape[0] != count or pixels.shape[1] not in (1, 3):
        raise ValueError(f"they are {pixels.dtype} of shape {pixels.shape}, not {count} images")
    if pixels.shape[2] != pixels.shape[3] or image_size not in (0, pixels.shape[2]):
        raise ValueError(f"they are of {pixels.shape[2]}x{pixels.shape[3]} pixels")


def _write(path: Path, pixels: np.ndarray) -> None:
    """Write so that another process sees either no file or the whole one, or do without."""
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            partial = file.name
            np.savez(file, pixels=pixels)
            file.flush()
        os.replace(partial, path)
    except BaseException as error:
        if partial:
            with suppress(OSError):
                os.unlink(partial)
        if not isinstance(error, OSError):
            raise
        warn_once(
            f"decoded images are not cached, as {printable(path.parent)} cannot be written "
            f"({reason(error)}): every process decodes them anew"
        )
