"""A partition that the user wrote: used as it is, or refused with the reason in one line."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from closed import closed_to_us

from core.errors import SettingsError
from core.settings import Settings
from task.data.dataset import load_dataset
from task.data.partition import client_images, evaluation_images, partition, server_pixels
from task.data.partition_file import fingerprint_of_file, read_partition_file

# 1437 training images of the digits.
TRAIN = 1437


@pytest.fixture
def write(tmp_path):
    """Write a partition file; return the settings that use it."""

    def write(content, name="partition.json", **settings):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        chosen = {"partitioner": "file", "server_buffer": 100, **settings}
        return Settings(partition_file=str(path), **chosen)

    return write


def message_of(function, *arguments):
    with pytest.raises(SettingsError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


def test_each_client_holds_what_the_file_gives_it(write):
    settings = write({"clients": [[7, 3, 1436], [0]]})
    parts = partition(settings, 2)
    assert [part.tolist() for part in parts.clients] == [[7, 3, 1436], [0]]
    train = load_dataset(settings).train
    images = client_images(settings, 0, 2)
    assert np.array_equal(images.pixels, train.pixels[[7, 3, 1436]])
    assert np.array_equal(images.labels, train.labels[[7, 3, 1436]])


def test_the_server_takes_its_share_of_what_is_left(write):
    taken = [list(range(600)), list(range(600, 1137))]
    settings = write({"clients": taken}, validation_samples=200)
    parts = partition(settings, 2)
    train = load_dataset(settings).train
    # 1437 - 1137 = 300 images are left: 100 to the buffer, 200 to the validation part.
    assert np.array_equal(server_pixels(settings), train.pixels[parts.buffer])
    assert parts.buffer.min() >= 1137
    held = np.setdiff1d(np.arange(1137, TRAIN), parts.buffer)
    expected = sorted(train.pixels[i].tobytes() for i in held)
    assert sorted(p.tobytes() for p in evaluation_images(settings).pixels) == expected


def test_the_buffer_depends_on_the_seed_and_the_clients_do_not(write):
    one, two = (write({"clients": [[1, 2], [3]]}, seed=seed) for seed in (1, 2))
    assert not np.array_equal(partition(one, 2).buffer, partition(two, 2).buffer)
    for mine, other in zip(partition(one, 2).clients, partition(two, 2).clients, strict=True):
        assert np.array_equal(mine, other)


def test_samples_per_client_keeps_the_first_of_each(write):
    settings = write({"clients": [[9, 8, 7], [6, 5]]}, samples_per_client=2)
    assert [part.tolist() for part in partition(settings, 2).clients] == [[9, 8], [6, 5]]
    settings = write({"clients": [[9, 8, 7], [6, 5]]}, samples_per_client=3)
    assert message_of(partition, settings, 2) == (
        "samples-per-client: 3, but client 1 holds only 2 images"
    )


def test_another_number_of_clients_is_refused(write):
    settings = write({"clients": [[1], [2]]})
    assert message_of(partition, settings, 3) == (
        f"partition-file: {settings.partition_file} names 2 clients; there are 3"
    )


@pytest.mark.parametrize("function", [server_pixels, evaluation_images])
def test_a_file_that_leaves_the_server_too_few_is_refused(write, function):
    settings = write({"clients": [list(range(1287))]}, validation_samples=51)
    assert message_of(function, settings) == (
        f"partition-file: {settings.partition_file} leaves 150 of 1437 training images to the "
        "server; server-buffer 100 and validation-samples 51 take more"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"clients": [[0, 1], [2, 1]]}', "gives image 1 twice, to clients 0 and 1"),
        ('{"clients": [[0, 0], [2]]}', "gives image 0 twice, to clients 0 and 0"),
        ('{"clients": [[0], [1437]]}', "gives client 1 image 1437; allowed: 0 to 1436"),
        ('{"clients": [[0], []]}', "gives client 1 no image"),
        ('{"clients": []}', "names no client"),
        ('{"clients": [[0], [-1]]}', "clients.1.0: Input should be greater than or equal to 0"),
        ('{"clients": [[0], [1.0]]}', "clients.1.0: Input should be a valid integer"),
        ('{"clients": [[0], [true]]}', "clients.1.0: Input should be a valid integer"),
        ('{"clients": [[0], ["1"]]}', "clients.1.0: Input should be a valid integer"),
        ('{"clients": [[0], [1' + "0" * 30 + "]]}", "gives client 1 image 1000"),
        ('{"clients": [[0], 1]}', "clients.1: Input should be a valid array"),
        ('{"clients": {"0": [1]}}', "clients: Input should be a valid array"),
        ("[[0], [1]]", "it: Input should be an object"),
        ("{}", "clients: Field required"),
        ('{"clients": [[0], [1]], "clients": [[2]]}', "holds 'clients' 2 times; allowed: once"),
        ('{"clients": 5, "clients": [[0], [1]]}', "holds 'clients' 2 times; allowed: once"),
        ('{"clients": [[0]], "buffer": [1]}', "buffer: Extra inputs are not permitted"),
        ('{"clients": [[0]', "it: Invalid JSON: EOF while parsing"),
        ("[" * 50_000, "it: Invalid JSON: recursion limit exceeded"),
        ("[" * 100_000, "has more than 92992 bytes, all that 1437 images take"),
        ("", "it: Invalid JSON: EOF"),
        ("\x00\x01", "it: Invalid JSON"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(write, content, reason):
    settings = write(content)
    message = message_of(partition, settings, 2)
    assert message.startswith(f"partition-file: {settings.partition_file} ")
    assert reason in message


def test_a_file_that_is_not_there_is_named(tmp_path):
    settings = Settings(partitioner="file", partition_file=str(tmp_path / "none.json"))
    assert message_of(partition, settings, 2) == (
        f"partition-file: {tmp_path / 'none.json'} cannot be read: No such file or directory"
    )
    settings = Settings(partitioner="file", partition_file=str(tmp_path))
    assert "is no regular file" in message_of(partition, settings, 2)


@pytest.mark.parametrize(
    "function", [fingerprint_of_file, lambda file: read_partition_file(file, 9)]
)
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("{base}/file/more.json", "{file} cannot be read: Not a directory"),
        ("{base}/" + "x" * 256, "{file} cannot be read: File name too long"),
        ("{base}/pipe", "{file} is no regular file"),
        ("{base}/loop", "{file} cannot be read: Too many levels of symbolic links"),
        ("~no-such-user-here/a.json", "{file}: no home folder is known for ~no-such-user-here; "),
        ("{base}/a\0b", "{base}/a\\x00b holds a NUL, which no path can"),
        ("{base}/a\nb", "{base}/a\\nb cannot be read: No such file or directory"),
    ],
)
def test_a_path_that_leads_to_no_file_is_one_line(tmp_path, function, file, reason):
    (tmp_path / "file").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    file = file.format(base=tmp_path)
    message = message_of(function, file)
    assert message.startswith("partition-file: " + reason.format(base=tmp_path, file=file))


@pytest.mark.parametrize(
    "function", [fingerprint_of_file, lambda file: read_partition_file(file, 9)]
)
def test_the_file_of_another_user_is_one_line(function):
    # Not under tmp_path, which the user nobody may not enter.
    with TemporaryDirectory() as base:
        os.chmod(base, 0o755)
        path = Path(base) / "partition.json"
        path.write_text("{}")
        with closed_to_us(path):
            message = message_of(function, str(path))
    assert message == f"partition-file: {path} cannot be read: Permission denied"


def test_a_file_in_utf_8_with_a_mark_is_read_and_one_in_another_encoding_named(tmp_path):
    text = json.dumps({"clients": [[1]]})
    path = tmp_path / "partition.json"
    path.write_text(text, encoding="utf-8-sig")
    assert read_partition_file(str(path), 9)[0].tolist() == [1]
    other = tmp_path / "other.json"
    other.write_text(text, encoding="utf-16")
    assert message_of(read_partition_file, str(other), 9) == (
        f"partition-file: {other} is not in UTF-8, as byte 0 shows"
    )


def test_every_training_image_indented_is_no_file_too_large(write):
    settings = write(json.dumps({"clients": [list(range(TRAIN))]}, indent=8))
    [everything] = read_partition_file(settings.partition_file, TRAIN)
    assert np.array_equal(everything, np.arange(TRAIN))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partitioner": "file"}, "partition-file: '' with partitioner file; allowed: a file"),
        ({"partition-file": "/a.json"}, "partition-file: '/a.json' with partitioner iid; allowed"),
        (
            {"partitioner": "file", "partition-file": "a.json"},
            "partition-file: 'a.json' is not allowed: value error, the path must be absolute",
        ),
    ],
)
def test_file_and_partitioner_go_together(changes, message):
    assert message_of(Settings.read, changes).startswith(message)


def test_the_fingerprint_distinguishes_two_partitions(write):
    one, two = (write({"clients": [[i]]}, f"{i}.json").partition_file for i in (1, 2))
    assert fingerprint_of_file(one) != fingerprint_of_file(two)
    same = write({"clients": [[1]]}, "same.json").partition_file
    assert fingerprint_of_file(one) == fingerprint_of_file(same)
