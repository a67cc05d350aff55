"""A device's own folder of images: the server's classes and shape, and what is refused by name."""

import numpy as np
import pytest
from federation import ClientAppNode, InProcessGrid
from flwr.app import Context, RecordDict
from PIL import Image

from core.errors import SettingsError
from core.settings import Settings
from server_app.app import main
from task import Node
from task.data.local import local_images
from task.images import ImageTask

CLASSES = ("cat", "cow", "dog")


def folder_of(path, counts, size=8, mode="RGB", seed=0):
    """Images of classes that differ in colour."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        colour = CLASSES.index(name) if name in CLASSES else 0
        for i in range(count):
            shape = (size, size, 3) if mode == "RGB" else (size, size)
            pixels = rng.integers(0, 120, shape, np.uint8)
            if mode == "RGB":
                pixels[..., colour] += 120
            Image.fromarray(pixels).save(path / name / f"{i}.png")
    return path


def read(path, size=8, channels=3, image_size=0):
    return local_images(str(path), image_size, CLASSES, channels, size)


def test_labels_are_the_places_of_the_servers_classes_also_where_some_are_absent(tmp_path):
    train, test = read(folder_of(tmp_path / "a", {"dog": 2, "cat": 3}))
    assert train.labels.tolist() == [0, 0, 0, 2, 2]
    assert train.pixels.shape == (5, 3, 8, 8)
    assert test is None


def test_a_test_part_of_the_devices_own_is_what_it_evaluates_on(tmp_path):
    folder_of(tmp_path / "a" / "train", {"cow": 4})
    folder_of(tmp_path / "a" / "test", {"cat": 2})
    train, test = read(tmp_path / "a")
    assert (train.labels.tolist(), test.labels.tolist()) == ([1] * 4, [0] * 2)


def test_an_empty_class_folder_is_a_class_that_the_device_lacks(tmp_path):
    train, _ = read(folder_of(tmp_path / "a", {"dog": 2, "cat": 0}))
    assert train.labels.tolist() == [2, 2]


def test_grey_images_are_taken_for_three_channels(tmp_path):
    train, _ = read(folder_of(tmp_path / "a", {"dog": 2}, mode="L"))
    assert train.pixels.shape == (2, 3, 8, 8)
    assert (train.pixels[:, 0] == train.pixels[:, 2]).all()


def test_images_are_resized_where_a_size_is_set(tmp_path):
    train, _ = read(folder_of(tmp_path / "a", {"dog": 2}, size=13), image_size=8)
    assert train.pixels.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("counts", "kind", "line"),
    [
        (
            {"dog": 2, "horse": 1},
            {},
            "classes that the server does not have: horse; allowed: c",
        ),
        (
            {"dog": 2},
            {"size": 9},
            "are 3x9x9, the server's 3x8x8; allowed: the same, or ",
        ),
        ({"dog": 1}, {}, "holds 1 image; allowed: 2 or more"),
        ({"dog": 0}, {}, "has class folders without an image: dog"),
        ({}, {}, "there is no folder"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, counts, kind, line):
    with pytest.raises(SettingsError) as raised:
        read(folder_of(tmp_path / "a", counts, **kind))
    assert str(raised.value).startswith("data-path: ")
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_line_speaks_of_the_devices_setting_and_leaves_its_folder_as_it_is_named(tmp_path):
    (folder := tmp_path / "the, data-dir here").mkdir()
    with pytest.raises(SettingsError) as raised:
        read(folder)
    assert str(raised.value) == (
        f"data-path: {folder} holds no folders; allowed: one folder of images for each class; "
        "data-path may be one level too low"
    )


def test_colour_is_not_made_grey(tmp_path):
    with pytest.raises(SettingsError, match="are 3x8x8, the server's 1x8x8"):
        read(folder_of(tmp_path / "a", {"dog": 2}), channels=1)


# --- whole runs ----------------------------------------------------------------------------------


def run(tmp_path, sites, **settings):
    config = {
        "dataset": "image-folder",
        "model": "cnn",
        "num-server-rounds": 8,
        "learning-rate": 0.02,
        "batch-size": 8,
        "min-nodes": len(sites),
        "node-wait": 1.0,
        "output-dir": str(tmp_path),
        "run-name": "run",
        **{k.replace("_", "-"): v for k, v in settings.items()},
    }
    nodes = {}
    for i, (path, bits) in enumerate(sites):
        node = ClientAppNode(i, len(sites), config)
        node.config = {"data-path": str(path), "bits": bits}
        node.lose_state()
        nodes[50 + i] = node
    main(InProcessGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    import json

    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def sites(tmp_path):
    parts = ({"cat": 12, "cow": 12}, {"cow": 12, "dog": 12}, {"cat": 8, "cow": 8, "dog": 8})
    paths = [folder_of(tmp_path / f"site{i}", part, seed=i) for i, part in enumerate(parts)]
    return list(zip(paths, (4, 8, 32), strict=True))


def test_sites_that_lack_classes_learn_together_with_a_test_set_on_the_server(tmp_path):
    folder_of(tmp_path / "server" / "train", {"cat": 8, "cow": 8, "dog": 8}, seed=8)
    folder_of(tmp_path / "server" / "test", {"cat": 20, "cow": 20, "dog": 20}, seed=9)
    rounds = run(tmp_path, sites(tmp_path), data_dir=str(tmp_path / "server"), server_buffer=12)
    assert rounds[-1]["clients"]["aggregated"] == 3
    # Each site by itself knows two of the three classes at most in part.
    assert rounds[-1]["accuracy"]["32"] > 0.9


def test_sites_learn_together_where_the_server_has_nothing(tmp_path):
    rounds = run(tmp_path, sites(tmp_path), classes="cat,cow,dog", image_size=8)
    assert rounds[-1]["clients"]["aggregated"] == 3
    assert rounds[-1]["accuracy"]["average"] > 0.8
    assert set(rounds[-1]["accuracy"]) == {"4", "8", "32", "average"}


@pytest.mark.parametrize("classes", ["cat", "cat,cat"])
def test_a_server_without_images_must_name_the_classes(tmp_path, classes):
    with pytest.raises(SettingsError, match=r"classes: .*allowed: two names"):
        ImageTask(Settings(dataset="image-folder", classes=classes, image_size=8)).facts()


def test_what_is_held_out_of_a_folder_is_not_trained_on(tmp_path):
    path = folder_of(tmp_path / "a", {"cat": 6, "dog": 4})
    settings = Settings(dataset="image-folder", classes="cat,dog", image_size=8)
    task = ImageTask(settings, facts={"classes": ["cat", "dog"], "channels": 3, "size": 8})
    node = Node(data_path=str(path))
    parts = task.examples(node), task.local_test_examples(node)
    assert sum(len(part) for part in parts) == 10
    assert len(parts[1]) >= 1
    seen = {image.tobytes() for part in parts for image in part.pixels}
    assert len(seen) == 10
