"""What a folder's layout is taken for, and what is refused."""

import logging
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from closed import closed_to_us
from PIL import Image

import task.data.dataset
from core.errors import SettingsError
from core.settings import Settings
from task.data.dataset import describe, load_dataset
from task.data.image_folder import find_parts, in_short, list_images


def fill(folder, brightness=60, **counts):
    """Make class folders of so many images, all different."""
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = np.full((2, 2), brightness + 10 * number + index, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


def load(folder):
    task.data.dataset._load.cache_clear()
    return load_dataset(Settings(dataset="image-folder", data_dir=str(folder)))


def refusal(folder):
    with pytest.raises(SettingsError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith("data-dir: ")
    assert len(message.encode().splitlines()) == 1
    return message


def lines(folder):
    dataset = load(folder)
    return [line for _, line in describe(dataset, dataset.test)]


@pytest.fixture
def public():
    """A folder that the user nobody may enter, which tmp_path is not."""
    with TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        yield Path(base)


HIDDEN = [
    *(".ipynb_checkpoints", "__MACOSX", ".git", "$RECYCLE.BIN", "@eaDir", "lost+found"),
    *("#recycle", "@Recycle", "#snapshot"),
]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_folders_are_no_classes_and_no_parts_of_one(tmp_path, hidden):
    fill(tmp_path, a=5, b=5)
    fill(tmp_path / hidden, x=1)
    fill(tmp_path, **{hidden: 2})
    fill(tmp_path / "a", **{hidden: 2})
    dataset = load(tmp_path)
    assert dataset.classes == ("a", "b")
    assert len(dataset.train) + len(dataset.test) == 10
    assert dataset.notes == ()


def test_hidden_files_are_no_images(tmp_path):
    fill(tmp_path, a=5, b=5)
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"none")
        (tmp_path / "a" / name).write_bytes(b"none")
    dataset = load(tmp_path)
    assert len(dataset.train) + len(dataset.test) == 10
    assert dataset.notes == ()


def test_other_files_are_counted_and_one_is_named(tmp_path):
    fill(tmp_path, a=5, b=5)
    for path in ("README.md", "a/0.gif", "b/more/0.heic"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"none")
    assert lines(tmp_path)[1:] == [
        "data-dir: not used, as no image by its suffix or in no class folder: "
        f"{tmp_path}/README.md and 2 more"
    ]


def test_one_class_is_refused_with_what_it_holds(tmp_path):
    fill(tmp_path / "scans", a=3, b=3)
    assert refusal(tmp_path) == (
        f"data-dir: {tmp_path} has one class, scans (it holds the folders a, b); allowed: 2 or "
        "more class folders; data-dir may be one level too high or too low"
    )
    fill(tmp_path / "one", a=3)
    assert "has one class, a (it holds 3 images)" in refusal(tmp_path / "one")
    fill(tmp_path / "parts" / "train", a=3)
    fill(tmp_path / "parts" / "test", a=3)
    assert f"{tmp_path}/parts/train has one class, a" in refusal(tmp_path / "parts")


def test_folder_one_level_too_low_is_told(tmp_path):
    fill(tmp_path, a=3, b=3)
    assert refusal(tmp_path / "a") == (
        f"data-dir: {tmp_path}/a holds 3 images but no class folders; allowed: one folder of "
        "images for each class; data-dir may be one level too low"
    )
    # Without class folders, a test part tells nothing.
    fill(tmp_path / "in" / "train", a=3, b=3)
    fill(tmp_path / "in", test=3)
    assert f"{tmp_path}/in/test holds 3 images but no class folders" in refusal(tmp_path / "in")


def test_empty_class_folders_are_named(tmp_path):
    fill(tmp_path, a=3, b=0, c=3, d=0)
    (tmp_path / "d" / "notes.txt").write_text("none")
    message = refusal(tmp_path)
    assert "has class folders without an image: b, d; allowed: files .jpg .jpeg .png" in message


@pytest.mark.parametrize("names", [("Train", "Test"), ("TRAIN", "test"), ("train", "TeSt")])
def test_train_and_test_in_any_case_are_parts(tmp_path, names):
    fill(tmp_path / names[0], a=2, b=2)
    fill(tmp_path / names[1], a=1, b=2)
    dataset = load(tmp_path)
    assert dataset.classes == ("a", "b")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "names",
    [
        ("training", "testing"),
        ("Training", "val"),
        ("trn", "tst"),
        ("valid", "test"),
        ("train_set", "test_set"),
        ("Train Images", "Test Images"),
        ("train-data", "validation-data"),
        ("train", "val"),
        ("train", "testing"),
        ("train", "TRAIN"),
        ("train", "Train", "test"),
        ("val",),
        ("test",),
        ("train", "val", "cats"),
    ],
)
def test_names_of_parts_are_never_classes(tmp_path, names):
    for name in names:
        fill(tmp_path / name, a=2, b=2)
    message = refusal(tmp_path)
    assert "allowed: one folder train and one test, in any case, or class folders" in message
    for name in names:
        if name != "cats" or "but no test folder" in message:
            assert name in message


def test_two_names_of_parts_are_no_classes_even_beside_others(tmp_path):
    fill(tmp_path, val=3, testing=3, cat=3)
    assert "holds testing, val, which name parts and not classes" in refusal(tmp_path)


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    # Pictures of trains, buses and cars.
    fill(tmp_path, bus=3, car=3, train=3)
    assert load(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize(
    "names",
    [
        ("seg_train", "seg_test"),
        ("train2017", "val2017"),
        ("01-train", "02-validation"),
        ("train 224", "other"),
    ],
)
def test_names_with_one_of_a_part_in_them_are_parts_if_they_hold_folders(tmp_path, names):
    for number, name in enumerate(names):
        fill(tmp_path / name, 60 + 20 * number, a=3, b=3)
    if names[1] == "other":
        assert load(tmp_path).classes == ("other", "train 224")
        return
    assert f"holds {', '.join(sorted(names))}, which name parts" in refusal(tmp_path)


def test_folders_that_every_class_holds_are_told(tmp_path):
    fill(tmp_path / "fold1", a=2, b=2)
    fill(tmp_path / "fold2", 80, a=2, b=2)
    assert load(tmp_path).notes == (
        "each of its class folders holds a, b; if those are the classes, data-dir is one level too "
        "high",
    )


def test_images_that_are_seen_twice_are_told(tmp_path):
    fill(tmp_path / "train", a=3, b=3)
    (tmp_path / "test").symlink_to(tmp_path / "train")
    told = "data-dir: images that are in both the training and the test part: 6"
    assert lines(tmp_path)[1:] == [told]
    fill(tmp_path / "links", a=3, b=3)
    (tmp_path / "links" / "b" / "9.png").symlink_to(tmp_path / "links" / "a" / "0.png")
    assert lines(tmp_path / "links")[-1] == "data-dir: images that are in several classes: 1"


def test_classes_whose_names_hardly_differ_are_told(tmp_path):
    names = "Cat", "cat", "cafe\u0301", "caf\u00e9"
    for number, name in enumerate(names):
        fill(tmp_path / "in", 60 + 10 * number, x=5)
        (tmp_path / "in" / "x").rename(tmp_path / name)
    (tmp_path / "in").rmdir()
    told = f"classes have names that hardly differ: {', '.join(names)}"
    assert load(tmp_path).notes == (told,)


@pytest.mark.parametrize("name", ["protest", "latest", "contest", "trains", "test1", "valley"])
def test_names_that_only_sound_like_parts_are_classes(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / f"{name}x").mkdir()
    assert find_parts(tmp_path).train == tmp_path


def test_a_third_part_is_told_to_be_unused(tmp_path):
    fill(tmp_path / "train", a=2, b=2)
    fill(tmp_path / "test", 80, a=2, b=2)
    fill(tmp_path / "val", a=2, b=2)
    assert lines(tmp_path) == [
        "2 classes, training + evaluation images: a 2 + 2, b 2 + 2",
        "data-dir: of its folders only train and test are used, not val",
    ]


def test_classes_are_told_with_their_counts(tmp_path):
    fill(tmp_path, **{f"class{number:02}": 5 for number in range(12)})
    [line] = lines(tmp_path)
    assert line.startswith(
        "12 classes, training + evaluation images: class00 4 + 1, class01 4 + 1, "
    )
    assert line.endswith("class09 4 + 1 and 2 more")


def test_class_that_cannot_be_on_both_sides_is_named(tmp_path):
    fill(tmp_path, a=8, b=1, c=1)
    dataset = load(tmp_path)
    assert sorted(dataset.train.labels) == [0, 0, 0, 0, 0, 0, 1, 2]
    assert dataset.test.labels.tolist() == [0, 0]
    [_, (level, line)] = describe(dataset, dataset.test)
    assert level == logging.WARNING
    assert line == "the evaluation images hold none of the classes b, c"


def test_dark_images_are_told(tmp_path):
    # 12-bit values in 16-bit files: 4095 of 65535 is 16 of 255.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            deep = np.full((2, 2), 4095, np.uint16)
            deep.flat[index] = 0 if name == "a" else 2048
            Image.fromarray(deep).save(tmp_path / name / f"{index}.png")
    assert lines(tmp_path)[1:] == ["data-dir: the brightest pixel of all images is 16 of 255"]


def test_nested_folders_belong_to_their_class(tmp_path):
    fill(tmp_path, a=1, b=1)
    fill(tmp_path / "a", x=2, y=2)
    files = list_images(tmp_path).files
    # The order of torchvision: folder by folder.
    names = [os.path.relpath(file.name, tmp_path) for file in files]
    assert names == ["a/0.png", "a/x/0.png", "a/x/1.png", "a/y/0.png", "a/y/1.png", "b/0.png"]
    assert [file.label for file in files] == [0, 0, 0, 0, 0, 1]


def test_linked_folders_and_files_are_followed(tmp_path):
    fill(tmp_path / "elsewhere", a=3, b=3)
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    for index in range(3):
        (tmp_path / "in" / "b" / f"{index}.png").symlink_to(
            tmp_path / "elsewhere" / "b" / f"{index}.png"
        )
    assert [file.label for file in list_images(tmp_path / "in").files] == [0, 0, 0, 1, 1, 1]


def test_link_to_a_folder_above_is_refused(tmp_path):
    fill(tmp_path, a=3, b=3)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    # Within a/up, a is met again.
    assert refusal(tmp_path) == f"data-dir: {tmp_path}/a/up/a is a link to a folder above it"


@pytest.mark.parametrize(
    ("target", "why"), [("none", "No such file"), ("0.png", "Too many levels")]
)
@pytest.mark.parametrize("where", [".", "a"])
def test_broken_link_is_named(tmp_path, target, why, where):
    fill(tmp_path, a=3, b=3)
    link = tmp_path / where / "new"
    link.symlink_to(link if why != "No such file" else target)
    assert f"data-dir: {link} (a link) cannot be read: {why}" in refusal(tmp_path)


def test_pipe_is_not_waited_for(tmp_path):
    fill(tmp_path, a=3, b=3)
    os.mkfifo(tmp_path / "a" / "9.png")
    assert refusal(tmp_path) == f"data-dir: {tmp_path}/a/9.png is no regular file"


def test_names_that_are_not_utf_8_are_read_and_shown(tmp_path):
    folder = tmp_path / "in"
    fill(folder, a=5, b=5)
    base = os.fsencode(folder)
    os.rename(base + b"/a", base + b"/caf\xe9")
    os.rename(base + b"/b/0.png", base + b"/b/\xff.png")
    [line] = lines(folder)
    assert line == "2 classes, training + evaluation images: b 4 + 1, caf\\xe9 4 + 1"
    # From the cache as well.
    assert lines(folder) == [line]
    with open(base + b"/b/\xff.png", "wb") as file:
        file.write(b"none")
    assert f"{folder}/b/\\xff.png cannot be decoded" in refusal(folder)


@pytest.mark.parametrize("what", [".", "a", "a/0.png"])
def test_what_another_user_closed_is_named(public, what):
    fill(public / "in", a=5, b=5)
    with closed_to_us(public / "in" / what):
        message = refusal(public / "in")
    assert re.match(rf"data-dir: {(public / 'in' / what)} cannot be .*Permission denied", message)


def test_data_dir_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("none")
    assert refusal(tmp_path / "file") == f"data-dir: {tmp_path}/file is no folder"
    assert refusal(tmp_path / "file" / "x") == f"data-dir: {tmp_path}/file/x is no folder"


def test_name_that_is_too_long_is_told(tmp_path):
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 300))


def test_long_lists_are_shortened():
    assert in_short(list("abc"), 2) == "a, b and 1 more"
    assert in_short(list("ab"), 2) == "a, b"
    assert in_short(["a\nb", "x" * 99]) == "a\\nb, " + "x" * 60


@pytest.mark.parametrize(
    ("folder", "names"),
    [
        (".", ("images", "masks")),
        ("train", ("Images", "Labels")),
        (".", ("image", "mask_train")),
        (".", ("gt", "img", "masks")),
    ],
)
def test_images_and_their_masks_are_no_two_classes(tmp_path, folder, names):
    for part in {folder, "test" if folder == "train" else folder}:
        fill(tmp_path / part, **dict.fromkeys(names, 3))
    said = f"data-dir: {tmp_path / folder} holds {', '.join(sorted(names))}, which name images and "
    assert refusal(tmp_path).startswith(said)


@pytest.mark.parametrize(
    "names", [("with_mask", "without_mask"), ("mask", "no_mask"), ("image", "video")]
)
def test_classes_may_have_such_names(tmp_path, names):
    fill(tmp_path, **dict.fromkeys(names, 5))
    assert load(tmp_path).num_classes == 2
