"""Pixels to what a network takes."""

import numpy as np
import torch
from torch import Tensor

# A pixel x of 0..255 enters the network as PIXEL_SCALE * x + PIXEL_OFFSET, in -2..2.
PIXEL_SCALE, PIXEL_OFFSET = 4 / 255, -2.0


def to_input(pixels: np.ndarray, device: torch.device | None = None) -> Tensor:
    """Turn uint8 pixels into the network's input: float32, 0..255 to -2..2, channels last."""
    return normalize(torch.from_numpy(pixels).to(device))


def normalize(pixels: Tensor) -> Tensor:
    """Do what `to_input` does with a tensor of uint8 pixels."""
    x = pixels.to(torch.float32, memory_format=torch.channels_last)
    return x.mul_(PIXEL_SCALE).add_(PIXEL_OFFSET)
