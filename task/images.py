"""The task `images`: digits, Fashion-MNIST, CIFAR or a folder of images, and any classifier."""

from collections.abc import Iterator

from torch import nn

from core.errors import SettingsError
from task.data.dataset import Images, Pixels, describe, fingerprint, load_dataset
from task.data.local import local_images
from task.data.partition import client_images, evaluation_images, partition, server_pixels
from task.data.partition_file import fingerprint_of_file
from task.interface import Facts, Node, Task
from task.models import build_model


class ImageTask(Task):
    """Classification of images, by the settings `dataset`, `data-dir`, `model` and so on.

    Where the server has no images (``dataset="image-folder"`` without a ``data-dir``), the settings
    `classes`, `image-size` and `image-channels` say what those of the devices are.

    Examples
    --------
    >>> task = ImageTask(Settings(dataset="digits"))
    >>> len(task.examples(Node(0, 10)))
    118
    """

    def model(self, seed: int) -> nn.Module:
        classes, channels, size = self._shape()
        return build_model(self.settings.model, channels, size, len(classes), seed)

    def train_data(self, node: Node) -> Images:
        if node.data_path:
            return self._local(node)[0]
        return client_images(self.settings, node.partition_id, node.num_partitions)

    def test_data(self) -> Images | None:
        return evaluation_images(self.settings) if self._on_server else None

    def local_test_data(self, node: Node) -> Images | None:
        # Of common data every device has the test set.
        return self._local(node)[1] if node.data_path else evaluation_images(self.settings)

    def has_local_test_data(self, node: Node) -> bool:
        return not node.data_path or self._local(node)[1] is not None

    def server_inputs(self) -> Pixels | None:
        return Pixels(server_pixels(self.settings)) if self._on_server else None

    def facts(self) -> Facts:
        if self._on_server:
            data = load_dataset(self.settings)
            names = data.classes or tuple(map(str, range(data.num_classes)))
            return {"classes": list(names), "channels": data.channels, "size": data.size}
        settings = self.settings
        names = tuple(name.strip() for name in settings.classes.split(",") if name.strip())
        if not settings.classes:
            raise SettingsError(
                "data-dir: image-folder needs the folder that holds the images, or classes and "
                "image-size, if only devices have some"
            )
        if len(set(names)) < 2 or len(set(names)) < len(names) or not settings.image_size:
            raise SettingsError(
                f"classes: {settings.classes!r} with image-size {settings.image_size}, and the "
                "server has no images (data-dir); allowed: two names or more, as in cat,dog, and "
                "an image-size"
            )
        return {
            "classes": list(names),
            "channels": settings.image_channels,
            "size": settings.image_size,
        }

    def describe(self) -> Iterator[tuple[int, str]]:
        if self._on_server:
            yield from describe(load_dataset(self.settings), evaluation_images(self.settings))

    def fingerprint(self) -> str:
        if not self._on_server:
            return "no images on the server"
        data = fingerprint(load_dataset(self.settings))
        if self.settings.partition_file:
            data += f", {fingerprint_of_file(self.settings.partition_file)}"
        return data

    def most_examples(self) -> int | None:
        return len(load_dataset(self.settings).train) if self._on_server else None

    def partition_size(self, partition_id: int, num_partitions: int) -> int | None:
        if not self._on_server:
            return None
        return len(partition(self.settings, num_partitions).clients[partition_id])

    @property
    def _on_server(self) -> bool:
        """Whether the run has images that all can read: those of the server."""
        return self.settings.dataset != "image-folder" or bool(self.settings.data_dir)

    def _shape(self) -> tuple[tuple[str, ...], int, int]:
        """Return class names, channels and pixels a side: the server's."""
        facts = self.given or self.facts()
        classes, channels, size = (facts.get(key) for key in ("classes", "channels", "size"))
        if not (isinstance(classes, list) and isinstance(channels, int) and isinstance(size, int)):
            raise SettingsError(f"task: the server says {dict(facts)}, which is no image task")
        return tuple(classes), channels, size

    def _local(self, node: Node) -> tuple[Images, Images | None]:
        return local_images(node.data_path, self.settings.image_size, *self._shape())
