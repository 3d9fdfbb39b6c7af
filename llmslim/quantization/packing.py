"""Tight bit packing: codes of 2 to 8 bits, one little-endian bit stream per row.

Code j of a row occupies bits [j*bits, (j+1)*bits) of the row, bit i being bit i % 8 of byte i // 8. So three
bits cost three bits, not four: 8 codes always fill exactly `bits` bytes. Works on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_AT_ONCE = 1 << 22
"""Rows are packed in slices of about this many codes, to bound the int64 intermediates (a byte per code)."""


def packed_width(n: int, bits: int) -> int:
    """Bytes of a row of n codes."""
    return (n * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] of values below 2**bits -> uint8 [rows, packed_width(n, bits)]."""
    rows, n = codes.shape
    if bits == 8:
        return codes.clone()
    packed = torch.empty(rows, packed_width(n, bits), dtype=torch.uint8, device=codes.device)
    for part in _slices(rows, n):
        packed[part] = _pack_bytes(codes[part], bits) if 8 % bits == 0 else _pack_words(codes[part], bits)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse: uint8 [rows, packed_width(n, bits)] -> uint8 [rows, n]. Never a view of `packed`."""
    rows = packed.shape[0]
    if bits == 8:
        return packed.clone()
    codes = torch.empty(rows, n, dtype=torch.uint8, device=packed.device)
    for part in _slices(rows, n):
        codes[part] = (
            _unpack_bytes(packed[part], bits, n) if 8 % bits == 0 else _unpack_words(packed[part], bits, n)
        )
    return codes


def _slices(rows: int, n: int) -> list[slice]:
    step = max(1, CODES_AT_ONCE // max(1, n))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _pad(values: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -values.shape[1] % multiple))


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """2 and 4 bits: no code straddles a byte."""
    per_byte = 8 // bits
    codes = _pad(codes, per_byte)
    packed = codes[:, ::per_byte].clone()
    for i in range(1, per_byte):
        packed |= codes[:, i::per_byte] << (i * bits)
    return packed


def _unpack_bytes(packed: Tensor, bits: int, n: int) -> Tensor:
    mask = 2**bits - 1
    columns = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(columns, dim=-1).flatten(1)[:, :n]


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """Eight codes make one word of `bits` bytes (at most 56 bits, so an int64 holds it)."""
    columns = _pad(codes, 8).unflatten(1, (-1, 8))
    word = columns[..., 0].long()
    for i in range(1, 8):
        word |= columns[..., i].long() << (i * bits)
    as_bytes = torch.stack([((word >> (8 * i)) & 255).byte() for i in range(bits)], dim=-1)
    return as_bytes.flatten(1)[:, : packed_width(codes.shape[1], bits)]


def _unpack_words(packed: Tensor, bits: int, n: int) -> Tensor:
    columns = _pad(packed, bits).unflatten(1, (-1, bits))
    word = columns[..., 0].long()
    for i in range(1, bits):
        word |= columns[..., i].long() << (8 * i)
    mask = 2**bits - 1
    codes = torch.stack([((word >> (i * bits)) & mask).byte() for i in range(8)], dim=-1)
    return codes.flatten(1)[:, :n]
