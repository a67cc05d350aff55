"""Any folder of images, one subfolder a class, decoded once and cached as one array."""

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

from task.errors import SettingsError

# Of pixels in memory: the server and every worker hold the data once.
_MOST_GIBIBYTES = 8


def load_image_folder(
    folder: Path, image_size: int, cache: Path
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Decode ``folder/<class>/*`` or read the array that an earlier call left.

    Parameters
    ----------
    folder : Path
        Class folders, numbered in the order of their names.
    image_size : int
        Pixels a side to resize to; 0 keeps the images as they are, which must then be square and
        of one size.
    cache : Path
        Folder of the cached arrays. A cached array is used as long as no file's name, size or
        time of change has changed.

    Returns
    -------
    tuple
        Pixels uint8 ``[n, channels, size, size]`` (1 channel if all images are grey, else 3),
        labels int64 ``[n]``, names of the classes.

    Raises
    ------
    SettingsError
        If there are no images, one cannot be decoded, or sizes differ and `image_size` is 0.
    """
    from torchvision.datasets import ImageFolder

    try:
        listing = ImageFolder(str(folder))
    except (FileNotFoundError, OSError) as error:
        raise SettingsError(f"data-dir: {str(error).splitlines()[0]}") from None
    path = cache / f"{_digest(listing.samples, image_size)}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return arrays["pixels"], arrays["labels"], listing.classes
    pixels = _decode_all([name for name, _ in listing.samples], image_size)
    labels = np.array([label for _, label in listing.samples], np.int64)
    _write(path, pixels=pixels, labels=labels)
    return pixels, labels, listing.classes


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


def _digest(samples: list[tuple[str, int]], image_size: int) -> str:
    digest = hashlib.sha256(str(image_size).encode())
    for name, label in samples:
        stat = os.stat(name)
        digest.update(f"{name}\0{label}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def _decode_all(names: list[str], image_size: int) -> np.ndarray:
    first, grey = _decode(names[0], image_size)
    check_memory(len(names), 3, first.shape[0])
    pixels = np.empty((len(names), 3, *first.shape[:2]), np.uint8)
    for index, name in enumerate(names):
        array, is_grey = _decode(name, image_size)
        grey &= is_grey
        if array.shape[0] != pixels.shape[2]:
            raise SettingsError(
                f"image-size: {name} is {array.shape[0]} pixels wide, others {pixels.shape[2]}; "
                "set image-size"
            )
        pixels[index] = array.transpose(2, 0, 1)
    return pixels[:, :1].copy() if grey else pixels


def _decode(name: str, image_size: int) -> tuple[np.ndarray, bool]:
    """Decode one file to uint8 ``[size, size, 3]``, and say whether it is grey."""
    from PIL import Image

    try:
        with Image.open(name) as file:
            is_grey = file.mode in ("1", "L", "I;16")
            image = (_high_byte(file) if file.mode == "I;16" else file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SettingsError(f"data-dir: {name} cannot be decoded: {error}") from None
    if image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    if image.width != image.height:
        raise SettingsError(
            f"image-size: {name} is {image.width}x{image.height}; set image-size to make "
            "images square"
        )
    return np.asarray(image, np.uint8), is_grey


def _high_byte(image):
    """Bring 16-bit grey to 8 bits; Pillow's own conversion clips instead."""
    from PIL import Image

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _write(path: Path, **arrays: np.ndarray) -> None:
    """Write so that another process sees either no file or the whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # Its own keyword is no array.
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
