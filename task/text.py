"""The task `text`: the next byte of any text, by a small GPT."""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from core.errors import SettingsError
from core.files import printable, reason, user_path
from core.options import Options
from core.seeds import seed_torch
from task.data.partition import random_part, random_sample, validation_part
from task.interface import Data, Node, Task
from task.transformer import Block

# One of so many windows is held out for the server's test set.
_TEST_EVERY = 10
_BYTES = 256
# Windows that the server calibrates with, without their targets.
_SERVER_WINDOWS = 64


class TextOptions(Options):
    """Settings of `TextTask` (``task-options``).

    >>> TextOptions(width=32).width
    32
    """

    context: int = Field(64, ge=2, le=4096, description="Bytes that the network sees.")
    width: int = Field(64, ge=8, le=4096, description="Features of a byte.")
    depth: int = Field(2, ge=1, le=64, description="Blocks of attention and two linear layers.")
    heads: int = Field(4, ge=1, le=64, description="Heads of attention; they divide the width.")


class TextTask(Task):
    """Bytes of text files, cut into windows; the targets are the next bytes.

    Common text is that of the files in ``data-dir``, or without it the language reference that
    comes with Python; a device may have files of its own (``data-path``). As the alphabet is that
    of bytes, text of every language and encoding is read.

    Examples
    --------
    >>> task = TextTask(Settings(task="text"))
    >>> inputs, targets = task.train_data(Node(0, 10))
    >>> inputs.shape[1], torch.equal(inputs[:, 1:], targets[:, :-1])
    (64, True)
    """

    Options = TextOptions
    input_name = "tokens"
    options: TextOptions

    def model(self, seed: int) -> nn.Module:
        o = self.options
        if o.width % o.heads:
            raise SettingsError(
                f"task-options: width {o.width} is no multiple of heads {o.heads}; allowed: one"
            )
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            return GPT(o.context, o.width, o.depth, o.heads)

    def train_data(self, node: Node) -> Data:
        if node.data_path:
            return _pairs(_windows("data-path", node.data_path, self.options.context))
        own = self._common(test=False)
        place, of = node.partition_id, node.num_partitions
        chosen = random_part(self.settings, len(own), place, of, "windows of text")
        return _pairs(own[torch.from_numpy(np.sort(chosen))])

    def test_data(self) -> Data:
        if not self.settings.validation_samples:
            return _pairs(self._common(test=True))
        own = self._common(test=False)
        return _pairs(own[torch.from_numpy(validation_part(self.settings, len(own)))])

    def local_test_data(self, node: Node) -> Data | None:
        # Of common text every device has the test set.
        return None if node.data_path else self.test_data()

    def has_local_test_data(self, node: Node) -> bool:
        return not node.data_path

    def server_inputs(self) -> Tensor:
        windows = self._common(test=False)
        chosen = random_sample(self.settings, len(windows), _SERVER_WINDOWS)
        return windows[torch.from_numpy(chosen), :-1]

    def partition_size(self, partition_id: int, num_partitions: int) -> int | None:
        return len(self.examples(Node(partition_id, num_partitions)))

    def _common(self, test: bool) -> Tensor:
        windows = _windows("data-dir", self.settings.data_dir, self.options.context)
        held = torch.arange(len(windows)) % _TEST_EVERY == _TEST_EVERY - 1
        return windows[held == test]


@lru_cache(maxsize=4)
def _text_of(setting: str, path: str) -> bytes:
    """Return a file's bytes, or those of all files ``*.txt`` below a folder, in their order."""
    if not path:
        from pydoc_data import topics  # Half a megabyte that only this needs.

        return "\n".join(topics.topics.values()).encode()
    place = user_path(setting, path)
    try:
        files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
        text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise SettingsError(
            f"{setting}: {printable(Path(error.filename or place))} cannot be read: {reason(error)}"
        ) from None
    if not files:
        raise SettingsError(f"{setting}: {printable(place)} holds no file *.txt")
    return text


def _windows(setting: str, path: str, context: int) -> Tensor:
    """Cut text into windows of one byte more than the network sees, int64."""
    text = _text_of(setting, path)
    count = len(text) // (context + 1)
    if count < 2 * _TEST_EVERY:
        place = printable(user_path(setting, path) if path else "the text of Python")
        raise SettingsError(
            f"{setting}: {place} holds {len(text)} bytes of text, which context {context} of "
            f"task-options cuts into {count} windows; allowed: {2 * _TEST_EVERY} or more"
        )
    values = np.frombuffer(text, np.uint8, count * (context + 1)).astype(np.int64)
    return torch.from_numpy(values).view(count, context + 1)


def _pairs(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows[:, :-1], windows[:, 1:]


class GPT(nn.Module):
    """A decoder-only transformer over bytes; the head's weight is the embedding's.

    Parameters
    ----------
    context, width, depth, heads : int
        As of `TextOptions`.
    """

    def __init__(self, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(_BYTES, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _BYTES, bias=False)
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(width))
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.embed(tokens) + self.position[:length]
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        for block in self.blocks:
            x = block(x, future)
        logits: Tensor = self.head(self.norm(x))
        return logits
