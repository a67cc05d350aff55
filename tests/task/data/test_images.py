import errno
import io
import logging
import os
import pickle
import pwd
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import task.data.dataset
import task.data.images
from core.errors import SettingsError
from core.settings import Settings
from task.data.dataset import load_dataset
from task.data.image_folder import list_images
from task.data.images import load_images


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def grey_folder(folder, classes=("a", "b"), count=3, size=4):
    """Grey PNGs of noise; returns the pixels in the order of class and file name."""
    arrays = []
    for class_number, name in enumerate(classes):
        for number in range(count):
            array = noise([class_number, number, size], size, size)
            save(folder / name / f"{number}.png", array)
            arrays.append(array)
    return np.stack(arrays)[:, None]


def load_image_folder(folder, image_size, cache):
    listing = list_images(folder)
    labels = [file.label for file in listing.files]
    return load_images(listing.files, image_size, cache), labels, list(listing.classes)


def message_of(function, *arguments):
    with pytest.raises(SettingsError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def load(folder, image_size=0):
    settings = Settings(dataset="image-folder", data_dir=str(folder), image_size=image_size)
    return load_dataset(settings)


def test_grey_pixels_are_exact_and_classes_in_the_order_of_their_names(tmp_path):
    # Made in another order than that of the names.
    second, third = noise(1, 5, 5), noise(2, 5, 5)
    save(tmp_path / "in" / "zebra" / "1.png", third)
    save(tmp_path / "in" / "ant" / "2.png", second)
    save(tmp_path / "in" / "ant" / "1.png", noise(0, 5, 5))
    pixels, labels, classes = load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    assert classes == ["ant", "zebra"]
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, 1, 5, 5)
    assert labels == [0, 0, 1]
    assert np.array_equal(pixels[1, 0], second)
    assert np.array_equal(pixels[2, 0], third)


def test_colour_pixels_are_exact_and_channels_come_first(tmp_path):
    array = noise(3, 6, 6, 3)
    save(tmp_path / "in" / "a" / "1.png", array)
    save(tmp_path / "in" / "b" / "1.png", noise(4, 6, 6, 3))
    pixels, _, _ = load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    assert pixels.shape == (2, 3, 6, 6)
    for channel in range(3):
        assert np.array_equal(pixels[0, channel], array[:, :, channel])


def test_one_colour_image_makes_all_of_them_colour(tmp_path):
    grey = np.array([[0, 90], [180, 255]], np.uint8)
    save(tmp_path / "grey" / "a" / "1.png", grey)
    save(tmp_path / "grey" / "a" / "2.png", grey // 2)
    pixels, _, _ = load_image_folder(tmp_path / "grey", 0, tmp_path / "cache")
    assert pixels.shape == (2, 1, 2, 2)
    assert np.array_equal(pixels[1, 0], grey // 2)
    save(tmp_path / "grey" / "b" / "3.png", np.full((2, 2, 3), 77, np.uint8))
    pixels, _, _ = load_image_folder(tmp_path / "grey", 0, tmp_path / "cache")
    assert pixels.shape == (3, 3, 2, 2)
    assert np.array_equal(pixels[0, 2], grey)
    save(tmp_path / "colour" / "a" / "1.png", np.full((2, 2, 3), 77, np.uint8))
    save(tmp_path / "colour" / "a" / "2.png", grey)
    pixels, _, _ = load_image_folder(tmp_path / "colour", 0, tmp_path / "cache")
    assert pixels.shape == (2, 3, 2, 2)
    assert all(np.array_equal(pixels[1, channel], grey) for channel in range(3))


def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path):
    # value // 257 and value >> 8 agree on these.
    save(tmp_path / "in" / "a" / "1.png", np.array([[0, 514], [32896, 65535]], np.uint16))
    pixels, _, _ = load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    assert pixels[0, 0].tolist() == [[0, 2], [128, 255]]


def test_unchanged_files_are_read_from_the_cache(tmp_path):
    expected = grey_folder(tmp_path / "in")
    cache = tmp_path / "cache"
    load_image_folder(tmp_path / "in", 0, cache)
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    for path in (tmp_path / "in").rglob("*.png"):
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pixels, labels, classes = load_image_folder(tmp_path / "in", 0, cache)
    assert np.array_equal(pixels, expected)
    assert labels == [0, 0, 0, 1, 1, 1]
    assert classes == ["a", "b"]
    # Without the cache they cannot be decoded.
    message_of(load_image_folder, tmp_path / "in", 0, tmp_path / "other")


@pytest.mark.parametrize("change", ["time", "size"])
def test_changed_file_is_decoded_anew(tmp_path, change):
    expected = grey_folder(tmp_path / "in")
    load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    path = tmp_path / "in" / "b" / "2.png"
    stat = path.stat()
    new = noise(99, 4, 4) if change == "time" else np.zeros((4, 4), np.uint8)
    save(path, new)
    # PNGs of 4 x 4 noise do not compress, so that only the time differs; zeros do.
    assert (path.stat().st_size == stat.st_size) == (change == "time")
    later = 10**9 if change == "time" else 0
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + later))
    pixels, _, _ = load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    assert np.array_equal(pixels[-1, 0], new)
    assert np.array_equal(pixels[:-1], expected[:-1])


def test_added_and_moved_files_are_noticed(tmp_path):
    grey_folder(tmp_path / "in")
    load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    save(tmp_path / "in" / "a" / "9.png", noise(5, 4, 4))
    assert len(load_image_folder(tmp_path / "in", 0, tmp_path / "cache")[0]) == 7
    (tmp_path / "in" / "a" / "9.png").rename(tmp_path / "in" / "b" / "9.png")
    _, labels, _ = load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    assert labels == [0, 0, 0, 1, 1, 1, 1]


def test_image_size_is_part_of_the_cache_key(tmp_path):
    grey_folder(tmp_path / "in")
    for image_size, size in ((0, 4), (2, 2), (8, 8)):
        pixels, _, _ = load_image_folder(tmp_path / "in", image_size, tmp_path / "cache")
        assert pixels.shape == (6, 1, size, size)


def caches(folder):
    return list(folder.glob("*"))


@pytest.fixture
def logged(caplog, monkeypatch):
    """What is logged, as in a new process."""
    task.data.images.warn_once.cache_clear()
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records]


def other_array(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
        lambda data: b"something else",
        lambda data: b"\x93NUMPY\x01\x00 and no more",
        lambda data: pickle.dumps({"pixels": 1}),
        lambda data: other_array(labels=np.zeros(6)),
        lambda data: other_array(pixels=np.zeros((5, 1, 4, 4), np.uint8)),
        lambda data: other_array(pixels=np.zeros((6, 1, 4, 4), np.float32)),
        lambda data: other_array(pixels=np.zeros((6, 2, 4, 4), np.uint8)),
        lambda data: other_array(pixels=np.zeros((6, 1, 4, 5), np.uint8)),
        lambda data: other_array(pixels=np.zeros((6, 1, 5, 5), np.uint8)),
        lambda data: other_array(pixels=np.array([None] * 6)),
    ],
)
def test_spoilt_cache_is_made_anew(tmp_path, logged, spoil):
    grey_folder(tmp_path / "in")
    cache = tmp_path / "cache"
    expected, *_ = load_image_folder(tmp_path / "in", 4, cache)
    [path] = caches(cache)
    good = path.read_bytes()
    path.write_bytes(spoil(good))
    pixels, *_ = load_image_folder(tmp_path / "in", 4, cache)
    assert np.array_equal(pixels, expected)
    [line] = logged()
    assert line.startswith(f"prowd: the cached images {path} are made anew: ")
    assert len(line.splitlines()) == 1
    assert caches(cache) == [path]
    # Zip files hold the time, so that only the arrays are alike.
    load_image_folder(tmp_path / "in", 4, cache)
    assert len(logged()) == 1


@pytest.mark.parametrize(
    ("changed", "value"),
    [("task.data.images.RULES", "others"), ("PIL.__version__", "99.0")],
)
def test_cache_of_other_rules_of_decoding_is_not_used(tmp_path, monkeypatch, changed, value):
    grey_folder(tmp_path / "in")
    load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    before = set(caches(tmp_path / "cache"))
    monkeypatch.setattr(changed, value)
    load_image_folder(tmp_path / "in", 0, tmp_path / "cache")
    assert before < set(caches(tmp_path / "cache"))


def full_disk(file, **arrays):
    file.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fault", ["file", "below a file", "full", "closed", "folder of its name"])
def test_cache_that_cannot_be_written_is_done_without(tmp_path, logged, monkeypatch, fault):
    expected = grey_folder(tmp_path / "in")
    cache = tmp_path / "cache"
    if fault == "folder of its name":
        load_image_folder(tmp_path / "in", 0, cache)
        [path] = caches(cache)
        path.unlink()
        path.mkdir()
    elif fault == "full":
        monkeypatch.setattr(np, "savez", full_disk)
    elif fault == "closed":
        # Root may write anywhere but here.
        cache = Path("/proc/cache")
    else:
        cache.write_text("none")
        cache = cache if fault == "file" else cache / "more"
    for _ in range(2):
        pixels, *_ = load_image_folder(tmp_path / "in", 0, cache)
        assert np.array_equal(pixels, expected)
    lines = [line for line in logged() if "are not cached" in line]
    [line] = lines
    assert line.startswith(f"prowd: decoded images are not cached, as {cache} cannot be written (")
    assert line.endswith("): every process decodes them anew")
    if cache.is_dir():
        assert not [path for path in caches(cache) if path.suffix == ".part"]


def test_unknown_home_is_done_without(tmp_path, logged, monkeypatch):
    monkeypatch.setattr(task.data.dataset, "CACHE", Path("~/.cache/prowd"))
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    for part in ("train", "test"):
        grey_folder(tmp_path / "in" / part)
    assert len(load(tmp_path / "in").train) == 6
    assert logged() == [
        "prowd: decoded images are not cached, as no home folder is known; HOME is unset"
    ]


def test_train_and_test_part_are_told_but_once_that_nothing_is_cached(tmp_path, logged):
    task.data.dataset.CACHE.write_text("none")
    for part in ("train", "test"):
        grey_folder(tmp_path / "in" / part)
    load(tmp_path / "in")
    assert len(logged()) == 1


def test_resizing_averages_and_makes_square(tmp_path):
    # Halving to one pixel: the mean of four. A constant image stays constant at every size.
    save(tmp_path / "in" / "a" / "1.png", np.array([[0, 100], [100, 200]], np.uint8))
    save(tmp_path / "in" / "a" / "2.png", np.full((3, 7), 50, np.uint8))
    pixels, _, _ = load_image_folder(tmp_path / "in", 1, tmp_path / "cache")
    assert pixels.tolist() == [[[[100]]], [[[50]]]]
    pixels, _, _ = load_image_folder(tmp_path / "in", 5, tmp_path / "cache")
    assert pixels.shape == (2, 1, 5, 5)
    assert (pixels[1] == 50).all()


def test_differing_sizes_are_refused(tmp_path):
    save(tmp_path / "in" / "a" / "1.png", noise(0, 4, 4))
    save(tmp_path / "in" / "a" / "2.png", noise(0, 5, 5))
    message = message_of(load_image_folder, tmp_path / "in", 0, tmp_path / "cache")
    assert message.startswith("image-size: ")
    assert f"{tmp_path / 'in' / 'a' / '2.png'} is 5 pixels wide, others 4" in message


def test_images_that_are_not_square_are_refused(tmp_path):
    save(tmp_path / "in" / "a" / "1.png", noise(0, 4, 6))
    message = message_of(load_image_folder, tmp_path / "in", 0, tmp_path / "cache")
    assert message.startswith("image-size: ")
    assert "1.png is 6x4; set image-size" in message


def png(size):
    file = io.BytesIO()
    Image.fromarray(noise(7, size, size)).save(file, "png")
    return file.getvalue()


def with_spoilt_chunk_name(data):
    """A PNG whose second IDAT chunk has a name that is none."""
    head = data.index(b"IDAT") - 4
    length = int.from_bytes(data[head : head + 4], "big")
    body = data[head + 8 : head + 8 + length]

    def chunk(name, part):
        size, check = len(part), zlib.crc32(name + part)
        return size.to_bytes(4, "big") + name + part + check.to_bytes(4, "big")

    halves = chunk(b"IDAT", body[: length // 2]) + chunk(b"\xdcDA\x9b", body[length // 2 :])
    return data[:head] + halves + data[head + 12 + length :]


def huge_bitmap():
    """Header of a BMP file of 65535 x 65535 pixels of 24 bits, which Pillow takes for an attack."""
    size = struct.pack("<iiHH", 65535, 65535, 1, 24)
    return b"BM" + struct.pack("<III", 0, 0, 54) + struct.pack("<I", 40) + size + bytes(24)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.png", b""),
        ("1.png", b"this is no image"),
        ("1.png", png(32)[:-200]),
        ("1.png", with_spoilt_chunk_name(png(32))),
        ("1.ppm", b"P6 4 x 255 "),
        ("1.bmp", huge_bitmap()),
    ],
    ids=["empty", "text", "truncated", "chunk", "header", "huge"],
)
def test_corrupt_file_is_refused_by_name(tmp_path, name, content):
    grey_folder(tmp_path / "in", size=32)
    (tmp_path / "in" / "b" / name).write_bytes(content)
    message = message_of(load_image_folder, tmp_path / "in", 0, tmp_path / "cache")
    assert message.startswith(f"data-dir: {tmp_path / 'in' / 'b' / name} cannot be decoded")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("made", ["nothing", "empty class", "files without classes"])
def test_folder_without_images_is_refused(tmp_path, made):
    folder = tmp_path / "in"
    folder.mkdir()
    if made == "empty class":
        (folder / "a").mkdir()
    if made == "files without classes":
        save(folder / "1.png", noise(0, 4, 4))
    assert message_of(load_image_folder, folder, 0, tmp_path / "cache").startswith("data-dir: ")


def test_train_and_test_folders_are_used_as_they_are(tmp_path):
    train = grey_folder(tmp_path / "in" / "train", ("a", "b", "c"), 4)
    test = grey_folder(tmp_path / "in" / "test", ("a", "b", "c"), 2)
    dataset = load(tmp_path / "in")
    assert (dataset.num_classes, dataset.channels, dataset.size) == (3, 1, 4)
    assert np.array_equal(dataset.train.pixels, train)
    assert np.array_equal(dataset.test.pixels, test)
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # The cache went where conftest.py put it.
    assert len(list((tmp_path / "cache" / "image-folder").glob("*.npz"))) == 2


def test_one_fifth_is_held_out_where_there_is_no_test_folder(tmp_path):
    pixels = grey_folder(tmp_path / "in", ("a", "b"), 11)
    dataset = load(tmp_path / "in")
    assert (len(dataset.train), len(dataset.test)) == (18, 4)
    rows = [(p.tobytes(), 0 if i < 11 else 1) for i, p in enumerate(pixels)]
    got = [
        (p.tobytes(), int(label))
        for part in (dataset.train, dataset.test)
        for p, label in zip(part.pixels, part.labels, strict=True)
    ]
    assert sorted(got) == sorted(rows)
    # The same images are held out from a copy of the folder.
    grey_folder(tmp_path / "copy", ("a", "b"), 11)
    assert np.array_equal(load(tmp_path / "copy").test.pixels, dataset.test.pixels)


def test_folder_too_small_to_hold_one_image_out_is_refused(tmp_path):
    # 4 // 5 leaves no test image, on which nothing can be evaluated.
    grey_folder(tmp_path / "in", ("a", "b"), 2)
    assert message_of(load, tmp_path / "in").startswith("data-dir: ")


def test_classes_of_train_and_test_must_agree(tmp_path):
    grey_folder(tmp_path / "in" / "train", ("a", "b"))
    grey_folder(tmp_path / "in" / "test", ("a", "c"))
    message = message_of(load, tmp_path / "in")
    assert message.startswith("data-dir: ")
    assert "differ in classes: b, c" in message


def test_channels_of_train_and_test_must_agree(tmp_path):
    grey_folder(tmp_path / "in" / "train", ("a", "b"))
    for name in ("a", "b"):
        save(tmp_path / "in" / "test" / name / "1.png", noise(0, 4, 4, 3))
    message = message_of(load, tmp_path / "in")
    assert message.startswith("data-dir: ")
    assert "(1, 4, 4) and (3, 4, 4)" in message


def test_train_folder_without_test_folder_is_refused(tmp_path):
    grey_folder(tmp_path / "in" / "train")
    message = message_of(load, tmp_path / "in")
    assert message.startswith(f"data-dir: {tmp_path / 'in'} has a train folder but no test folder")


def test_image_size_reaches_both_parts(tmp_path):
    grey_folder(tmp_path / "in" / "train", size=6)
    grey_folder(tmp_path / "in" / "test", size=9)
    dataset = load(tmp_path / "in", image_size=5)
    assert dataset.train.pixels.shape[1:] == dataset.test.pixels.shape[1:] == (1, 5, 5)
