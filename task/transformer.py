"""Transformer blocks, and the small vision transformer made of them."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Patches a side.
_PATCHES = 8


class Block(nn.Module):
    """Pre-norm attention and a multilayer perceptron, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``[batch, tokens, width]``; where `mask` is true, no token is attended to."""
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, attn_mask=mask, need_weights=False)
        x = x + y
        wide: Tensor = self.wide(self.norm2(x))
        return x + cast(Tensor, self.narrow(F.gelu(wide)))


class VisionTransformer(nn.Module):
    """A small vision transformer over 8 x 8 patches, averaged before its head (arXiv:2010.11929).

    Parameters
    ----------
    channels, size, num_classes : int
        As of `task.models.build_model`; pixels at the edge that fill no patch are cut off.
    width, depth, heads : int
        Features of a patch, blocks, and heads of attention.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        side = max(size // _PATCHES, 1)
        self.patches = nn.Conv2d(channels, width, side, side)
        self.position = nn.Parameter(torch.randn((size // side) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return cast(Tensor, self.head(self.norm(self.blocks(x)).mean(dim=1)))
