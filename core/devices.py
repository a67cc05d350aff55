"""Where networks compute. What goes in and what comes out is on the CPU."""

import torch
from torch import nn

from core.errors import SettingsError


def pick_device(name: str) -> torch.device:
    """Return a device by the name that the settings give it, and make it compute exactly.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda"}
        ``"auto"`` is the GPU, if this process was given one, else the CPU. Flower gives a simulated
        client one with ``client-resources-num-gpus``; a networked client has its machine's.

    Raises
    ------
    SettingsError
        If there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise SettingsError(
                "server-device: 'cuda', but torch sees no GPU here; allowed here: auto, cpu"
            )
        # One seed gives one result on a GPU too; the fastest kernels add in any order (as torch's
        # only one for the gradient of adaptive pooling does, which cnn has),
        torch.backends.cudnn.deterministic = True
        # and keep 11 bits of a float32, fewer than the wider grids have.
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def device_of(network: nn.Module) -> torch.device:
    """Return where a network's parameters are."""
    return next(network.parameters()).device
