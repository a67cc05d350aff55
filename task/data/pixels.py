"""One image file as 8-bit pixels, scaled by the range that its format states.

Pillow's own conversions clip what is deeper than 8 bits, drop transparency and leave an image as
the camera lay. Here a mode is scaled by its range or refused, never clipped.
"""

import os
import warnings
from typing import Any

import numpy as np

from core.errors import SettingsError
from core.files import printable, reason

# Raised with every change of what pixels a file gives: arrays cached under another are not used.
RULES = 4

# Pillow would run Ghostscript on an EPS file, whatever its name ends with.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_GREY = ("1", "L", "LA", "I", "F", *_SIXTEEN_BITS)
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ALLOWED = (
    "allowed: 1, L, LA, P, RGB, RGBA, CMYK and YCbCr of 8 bits, unsigned grey of up to 16 bits "
    "(PNG, PGM, TIFF), and 32-bit float TIFF from 0 to 1"
)
# TIFF tags.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


def decode(name: str, image_size: int) -> tuple[np.ndarray, bool]:
    """Decode one file.

    Parameters
    ----------
    name : str
        Its path.
    image_size : int
        Pixels a side to resize to; 0 keeps the image as it is, which must then be square.

    Returns
    -------
    tuple
        Pixels uint8 ``[size, size, 3]``, upright and on white where they are transparent; and
        whether the file is grey.

    Raises
    ------
    SettingsError
        If it cannot be decoded, holds several images, or its mode has no known range.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow's warnings would be printed between the lines of the log.
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(name, formats=_FORMATS) as file,
        ):
            is_grey = file.mode in _GREY
            image = _eight_bits(file, name)
    except SettingsError:
        raise
    except UnidentifiedImageError:
        known = "no image that is known here" if os.path.getsize(name) else "empty"
        raise _error(name, f"cannot be decoded: it is {known}") from None
    except Exception as error:  # On bad files Pillow raises a dozen kinds.
        raise SettingsError(
            f"data-dir: {printable(name)} cannot be decoded: {reason(error)}"
        ) from None
    if image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    if image.width != image.height:
        raise SettingsError(
            f"image-size: {printable(name)} is {image.width}x{image.height}; set image-size to "
            "make images square"
        )
    return np.asarray(image, np.uint8), is_grey


def _eight_bits(file: Any, name: str) -> Any:
    """Return an open file's image upright, in mode RGB."""
    # A phone's JPEG (MPO) has its preview or depth map behind it; elsewhere all frames are data.
    frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
    if frames > 1:
        raise _error(name, f"holds {frames} images", "allowed: one a file")
    depth = _depth(file)
    _check_maxval(file, name)
    image = _upright(file)
    if not image.width or not image.height:
        raise _error(name, "has no pixels", "allowed: one and more")
    full_scale = _full_scale(file, name)
    if full_scale:
        image = _scaled(image, full_scale, file, name)
    elif (clear := file.info.get("transparency")) is not None and depth:
        image.info["transparency"] = _clear_of_eight_bits(clear, depth, name)
    return _on_white(image)


def _check_maxval(file: Any, name: str) -> None:
    """Refuse a PGM or PPM file with a value above the one that it calls white: Pillow clips it."""
    if not file.tile or file.tile[0][0] != "ppm":  # Else it reads them, or refuses them itself.
        return
    _, _, offset, (_, maxval) = file.tile[0]
    count = file.width * file.height * len(file.getbands())
    values = np.fromfile(name, ">u2" if maxval > 255 else "u1", count, offset=offset)
    if values.size and (top := int(values.max())) > maxval:
        raise _error(name, f"has a value of {top} above its maxval", f"allowed: 0 to {maxval}")


def _depth(file: Any) -> int:
    """Return the bits of a PNG file whose pixels Pillow brings to 8, but not its clear colour."""
    raw = str(file.tile[0][3]) if file.format == "PNG" and file.tile else ""
    return {"L;2": 2, "L;4": 4, "RGB;16B": 16}.get(raw, 0)


def _clear_of_eight_bits(clear: Any, depth: int, name: str) -> Any:
    if depth > 8:
        raise _error(
            name, "has a clear colour of 16 bits", "allowed: one of 8 bits, or an alpha channel"
        )
    return clear * 255 // (2**depth - 1)


def _full_scale(file: Any, name: str) -> float:
    """Return the value that is white in a file of more than 8 bits; 0: it has 8 or fewer."""
    tags = getattr(file, "tag_v2", {})  # Of a TIFF file.
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        raise _error(name, f"(mode {file.mode}) has signed pixels, whose range is not known")
    if file.mode in _EIGHT_BITS:
        return 0
    if file.mode in _SIXTEEN_BITS and file.format == "TIFF":
        return float(2 ** tags.get(_BITS, (16,))[0] - 1)
    # To Pillow, 16 bits are mode I in PGM files and, in older releases, in PNG files. It has scaled
    # a PGM file by its maximum.
    if file.mode in ("I", *_SIXTEEN_BITS) and file.format in ("PNG", "PPM"):
        return 65535
    if file.mode == "F" and file.format == "TIFF":
        return 1.0
    raise _error(name, f"has mode {file.mode} of {file.format}, whose scale is not known")


def _scaled(image: Any, full_scale: float, file: Any, name: str) -> Any:
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    # Written so that NaN is refused as well.
    if not (values.min() >= 0 and values.max() <= full_scale):
        raise _error(
            name,
            f"(mode {image.mode}) has pixels from {values.min():g} to {values.max():g}",
            f"allowed: 0 to {full_scale:g}",
        )
    # Pillow itself turns what has 8 bits or fewer.
    if getattr(file, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = full_scale - values
    clear = image.info.get("transparency")
    if clear is not None:
        values[values == clear] = full_scale
    return Image.fromarray(np.floor(values * (255 / full_scale) + 0.5).astype(np.uint8))


def _upright(file: Any) -> Any:
    """Turn an image by its EXIF orientation."""
    from PIL import ImageOps

    file.load()
    try:
        return ImageOps.exif_transpose(file)
    except (SyntaxError, ValueError, TypeError, KeyError):  # EXIF data that cannot be read.
        return file.copy()


def _on_white(image: Any) -> Any:
    """Return an image in RGB; colours under transparent pixels are dropped."""
    from PIL import Image

    if image.mode not in ("LA", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("RGB")


def _error(name: str, what: str, allowed: str = _ALLOWED) -> SettingsError:
    return SettingsError(f"data-dir: {printable(name)} {what}; {allowed}")
