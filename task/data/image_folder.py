"""What lies in a folder of images: its parts, its classes, and the files of each."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import SettingsError
from core.files import failing_by_name, printable, reason

# Those of torchvision's ImageFolder.
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# What systems leave in folders, beside all that begins with a dot.
_LEFT_BY_SYSTEMS = frozenset(
    {
        "__macosx",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "@eadir",
        "#recycle",
        "@recycle",
        "#snapshot",
        "__pycache__",
    }
)
# Names of parts of a dataset, without spaces, dots, dashes and what stands after them.
_PARTS = frozenset(
    {
        *("train", "training", "trn", "test", "testing", "tst"),
        *("val", "valid", "validation", "dev", "eval", "evaluation", "holdout", "heldout"),
    }
)
# Names of folders that hold an image each and what is drawn over it, file by file, as data for
# segmentation has.
_IMAGES = frozenset({"image", "images", "img", "imgs", "input", "inputs", "original", "originals"})
_MASKS = frozenset(
    {
        *("mask", "masks", "label", "labels", "annotation", "annotations", "gt", "groundtruth"),
        *("segmentation", "segmentations", "segmented", "target", "targets"),
    }
)
_AFTER_PARTS = ("dataset", "data", "set", "split", "images", "image", "imgs", "img")


@dataclass(frozen=True)
class ImageFile:
    """A file of a class, and what shows whether it has changed."""

    name: str
    label: int
    size: int
    changed: int


@dataclass(frozen=True)
class Listing:
    """The image files below one folder.

    Attributes
    ----------
    classes : tuple of str
        Class folders, in the order of their names.
    files : tuple of ImageFile
        In the order of classes and names.
    passed_over : tuple of str
        Files that are no images by their suffix, or lie in no class folder.
    """

    classes: tuple[str, ...]
    files: tuple[ImageFile, ...]
    passed_over: tuple[str, ...]


@dataclass(frozen=True)
class Parts:
    """Where the images lie.

    Attributes
    ----------
    train, test : Path, Path or None
        Folders of class folders; without a test folder, some of the images must be held out.
    unused : tuple of str
        Folders beside ``train`` and ``test``.
    """

    train: Path
    test: Path | None = None
    unused: tuple[str, ...] = ()


def find_parts(folder: Path) -> Parts:
    """Tell a folder of ``train`` and ``test`` from one of classes.

    Raises
    ------
    SettingsError
        If its folders have the names of parts, but are not one ``train`` and one ``test``.
    """
    names = [entry.name for entry in _entries(folder) if _is_folder(entry)]
    parts = [name for name in names if _names_part(name)]
    # As seg_train and seg_test, or train2017 and val2017; two classes may be called so too.
    alike = [n for n in names if _sounds_like_part(n) and _has_folders(folder / n)]
    if len(alike) > max(1, len(parts)):
        parts = alike
    if not parts or (len(parts) == 1 < len(names) and not _has_folders(folder / parts[0])):
        # Trains and buses may well be classes.
        return Parts(folder)
    train, test = ([name for name in names if name.lower() == part] for part in ("train", "test"))
    if len(train) == 1 and len(test) == 1:
        unused = tuple(name for name in names if name not in (*train, *test))
        return Parts(folder / train[0], folder / test[0], unused)
    problem = f"holds {in_short(parts)}, which name parts and not classes"
    if len(train) == 1 and not test:
        problem = f"has a train folder but no test folder beside it; it holds {in_short(names)}"
    raise SettingsError(
        f"data-dir: {printable(folder)} {problem}; allowed: one folder train and one test, in "
        "any case, or class folders alone"
    )


def list_images(folder: Path, *, may_lack: bool = False) -> Listing:
    """List ``folder/<class>/**`` without what is hidden; links are followed.

    With `may_lack` a class folder may be empty, if not all are.

    Raises
    ------
    SettingsError
        If there are no class folders, one has no image, something cannot be read, or a link leads
        to a folder above it.
    """
    entries = _entries(folder)
    classes = tuple(entry.name for entry in entries if _is_folder(entry))
    passed_over = [entry.path for entry in entries if not _is_folder(entry)]
    if not classes:
        images = sum(map(_is_image, passed_over))
        found = f"holds {images} images but no class folders" if images else "holds no folders"
        raise SettingsError(
            f"data-dir: {printable(folder)} {found}; allowed: one folder of images for each "
            "class; data-dir may be one level too low"
        )
    files: list[ImageFile] = []
    empty = []
    for label, name in enumerate(classes):
        before = len(files)
        for path, status in _below(os.path.join(folder, name)):
            if _is_image(path):
                files.append(ImageFile(path, label, status.st_size, status.st_mtime_ns))
            else:
                passed_over.append(path)
        if len(files) == before:
            empty.append(name)
    if empty and not (may_lack and files):
        raise SettingsError(
            f"data-dir: {printable(folder)} has class folders without an image: {in_short(empty)}; "
            f"allowed: files {' '.join(SUFFIXES)}"
        )
    return Listing(classes, tuple(files), tuple(passed_over))


def refuse_one_class(folder: Path, listing: Listing) -> None:
    """Refuse data on which every answer is right.

    Raises
    ------
    SettingsError
        If there is one class.
    """
    if len(listing.classes) > 1:
        return
    [name] = listing.classes
    inside = [entry.name for entry in _entries(folder / name) if _is_folder(entry)]
    holds = f"the folders {in_short(inside)}" if inside else f"{len(listing.files)} images"
    raise SettingsError(
        f"data-dir: {printable(folder)} has one class, {printable(name)} (it holds {holds}); "
        "allowed: 2 or more class folders; data-dir may be one level too high or too low"
    )


def refuse_masks(folder: Path, listing: Listing) -> None:
    """Refuse images and their masks, which are no two classes.

    Raises
    ------
    SettingsError
        If all class folders have such names, and both kinds are there.
    """
    words = [set(re.split("[^a-z]+", name.lower())) - {""} for name in listing.classes]
    known = _IMAGES | _MASKS | _PARTS
    masks = [bool(own & _MASKS) for own in words]
    if all(own <= known and own & (_IMAGES | _MASKS) for own in words) and len(set(masks)) == 2:
        raise SettingsError(
            f"data-dir: {printable(folder)} holds {in_short(listing.classes)}, which name images "
            "and their masks and not classes; allowed: one folder of images for each class"
        )


def in_short(names: Sequence[str], most: int = 10) -> str:
    """Return the first names of a list, and how many more there are."""
    shown = [printable(name)[:60] for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _names_part(name: str) -> bool:
    plain = "".join(c for c in name.lower() if c not in " ._-")
    for ending in _AFTER_PARTS:
        plain = plain.removesuffix(ending) or plain
    return plain in _PARTS


def _sounds_like_part(name: str) -> bool:
    return not _PARTS.isdisjoint(re.split("[^a-z]+", name.lower()))


def same_folders(folder: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the folders that every class folder holds, if these are two or more: then perhaps
    they are the classes, and what holds them are parts.
    """
    held = [{e.name for e in _entries(folder / name) if _is_folder(e)} for name in classes]
    return tuple(sorted(set.intersection(*held))) if len(set.intersection(*held)) > 1 else ()


def _has_folders(folder: Path) -> bool:
    return any(_is_folder(entry) for entry in _entries(folder))


def _below(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Walk all files below a folder, folders in the order of their paths, as torchvision does."""
    files: dict[str, list[tuple[str, os.stat_result]]] = {}
    pending = [(folder, frozenset[tuple[int, int]]())]
    while pending:
        path, above = pending.pop()
        status = _status(path)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise SettingsError(f"data-dir: {printable(path)} is a link to a folder above it")
        files[path] = []
        for entry in _entries(path):
            status = _status(entry.path)
            if stat.S_ISDIR(status.st_mode):
                pending.append((entry.path, above | {here}))
            elif stat.S_ISREG(status.st_mode):
                files[path].append((entry.path, status))
            elif _is_image(entry.name):  # Opening a pipe would wait for ever.
                raise SettingsError(f"data-dir: {printable(entry.path)} is no regular file")
    for path in sorted(files):
        yield from files[path]


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder and is not hidden, by name."""
    with failing_by_name("data-dir", folder), os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    return [e for e in entries if e.name[0] != "." and e.name.lower() not in _LEFT_BY_SYSTEMS]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return stat.S_ISDIR(_status(entry.path).st_mode)


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        link = " (a link)" if os.path.islink(path) else ""
        raise SettingsError(
            f"data-dir: {printable(path)}{link} cannot be read: {reason(error)}"
        ) from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
