"""Bit-packing where the codes are: on a GPU, before they leave it, to the bytes of `pack`.

For who quantizes on a GPU; this project's own clients bring the model to the CPU before. Many full
blocks are packed at once, by a few operations over all of them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from core.arguments import check_kind
from quant.codec.packing import BLOCK, off_grid, offset_of, pack, slices_of
from quant.grid import largest_code

# Blocks at a time: memory for 25 bytes a code.
_BLOCKS = 16
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def pack_tensor(codes: Tensor, bits: int) -> memoryview:
    """Pack signed codes into bytes, on the device that holds them.

    Parameters
    ----------
    codes : Tensor
        Integers of any shape, taken in C order; entries within the grid of `bits`.
    bits : int
        Bit-width, 2 to 16.

    Returns
    -------
    memoryview
        What `pack` returns.

    Raises
    ------
    ValueError
        As `pack` does.
    """
    check_kind("codes", codes, Tensor)
    if codes.device.type == "cpu":
        return pack(codes.detach().numpy(), bits)
    packed = pack_on_device(codes, bits)
    # Memory that the device writes to by itself; torch keeps it for the next time in this process.
    host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
    return host.copy_(packed).numpy().data


def pack_on_device(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes of `pack_tensor` as uint8, on the device; those of int8 may be the codes."""
    flat, limit = codes.detach().flatten(), largest_code(bits)
    if flat.dtype not in _INTEGERS:
        raise ValueError(f"codes have dtype {flat.dtype}; allowed are integers up to int64, uint8")
    if not flat.numel():
        return flat.to(torch.uint8)
    smallest, largest = torch.stack(flat.aminmax()).tolist()
    if smallest < -limit or largest > limit:
        raise off_grid(bits)
    if bits == 8:
        return flat.to(torch.int8).view(torch.uint8)
    full = len(flat) // BLOCK * BLOCK
    parts = [*flat[:full].view(-1, BLOCK).split(_BLOCKS), flat[full:].view(1, -1)]
    offset = int(offset_of(bits))
    return torch.cat([_pack_blocks(p.int() + offset, bits).flatten() for p in parts if p.numel()])


def _pack_blocks(words: Tensor, bits: int) -> Tensor:
    """Pack blocks int32 ``[blocks, words]`` to uint8 ``[blocks, bytes]``."""
    if bits > 8:
        return torch.cat([_low_byte(words), _pack_blocks(words >> 8, bits - 8)], dim=1)
    slices = slices_of(bits)
    # What the words of all slices make together.
    joint = torch.int32 if slices * bits < 32 else torch.int64
    parts = F.pad(words, (0, -words.shape[1] % slices)).unflatten(1, (slices, -1)).to(joint)
    shifts = torch.arange(0, slices * bits, bits, dtype=joint, device=words.device)
    joined = (parts << shifts[:, None]).sum(dim=1, dtype=joint)
    return torch.cat([_low_byte(joined >> shift) for shift in range(0, slices * bits, 8)], dim=1)


def _low_byte(words: Tensor) -> Tensor:
    return (words & 255).to(torch.uint8)
