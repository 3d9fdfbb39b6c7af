"""Bit packing for caches: codes that stand side by side in memory unpack to side by side, for fast wide loads.

A row of n codes (n a multiple of 8) is cut into `8 / bits` runs; byte j holds code j of every run, the first run
in the lowest bits. So one shift and one mask of neighbouring bytes give neighbouring codes. Three bits are a row
of their two low bits followed by a row of their high bits. Any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

Parts = tuple[Tensor, ...]

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths of the planes that codes of so many bits are stored in, lowest bits first."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] of values below 2**bits -> uint8 [..., n * bits / 8]."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        runs = ((codes >> shift) & (2**width - 1)).unflatten(-1, (8 // width, -1)).unbind(-2)
        plane = runs[0].clone()
        for number, run in enumerate(runs[1:], start=1):
            plane |= run << (number * width)
        planes.append(plane)
        shift += width
    return torch.cat(planes, dim=-1) if len(planes) > 1 else planes[0]


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse: uint8 [..., n * bits / 8] -> uint8 [..., n]."""
    n = packed.shape[-1] * 8 // bits
    codes, shift = None, 0
    for width, plane in zip(PLANES[bits], packed.split([n * w // 8 for w in PLANES[bits]], -1), strict=True):
        runs = [(plane >> (number * width)) & (2**width - 1) for number in range(8 // width)]
        part = torch.cat(runs, dim=-1) << shift
        codes = part if codes is None else codes | part
        shift += width
    assert codes is not None
    return codes


def half(x: Tensor) -> Tensor:
    """In float16, with what is too large for it as the largest."""
    return x.clamp(-65504, 65504).to(torch.float16)
