"""Naive algorithms: slow, obvious, and independent of the package. Tests compare with them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bit packing, bit by bit: code j of a row at bits [j*bits, (j+1)*bits) of its little-endian stream."""
    rows, n = codes.shape
    packed = torch.zeros(rows, -(-n * bits // 8), dtype=torch.uint8)
    for row in range(rows):
        for j in range(n):
            for i in range(bits):
                bit = int(codes[row, j]) >> i & 1
                position = j * bits + i
                packed[row, position // 8] += bit << (position % 8)
    return packed


def gptq_words(values: list[int], bits: int) -> list[int]:
    """Values packed as GPTQ packs a column: little end first into 32-bit words, 3 bits straddling two."""
    stream = sum(value << (index * bits) for index, value in enumerate(values))
    words = [(stream >> shift) & 0xFFFFFFFF for shift in range(0, len(values) * bits, 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]  # as int32
