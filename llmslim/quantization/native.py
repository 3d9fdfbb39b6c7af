"""The compiled part of the packed runtime: `csrc/packed.c`, loaded through ctypes.

`pip install` builds it when a C compiler is there; without it `library()` is None and the torch routes serve.
The library has no OpenMP runtime of its own: it is loaded after torch and finds torch's (two thread pools on
the same cores would fight).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmslim.quantization.grid import Scheme

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The C code's number for a dtype; activations and outputs are only of the first two."""

WORTH_A_THREAD = 1 << 16
"""Multiply-adds below which one thread does it all: they take it about as long as waking a second one."""


class Layout(ctypes.Structure):
    """Shape and grid of a packed weight, as `csrc/packed.c` has it. No pointers, so it can be copied."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("midpoint", ctypes.c_int64),
        ("scale_kind", ctypes.c_int64),
    ]


def layout(scheme: Scheme, out_features: int, in_features: int) -> Layout:
    rows, groups = scheme.scale_shape(out_features, in_features)
    return Layout(
        rows=out_features,
        cols=in_features,
        row_bytes=(in_features * scheme.bits + 7) // 8,
        groups=groups,
        width=in_features // groups,
        scale_stride=groups if rows == out_features else 0,
        bits=scheme.bits,
        midpoint=scheme.midpoint,
        scale_kind=KINDS[getattr(torch, scheme.scale_dtype)],
    )


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None when it was not built or does not fit this machine."""
    for path in sorted(Path(__file__).parent.glob("_packed*.so")):
        try:
            lib = ctypes.CDLL(str(path))
        except OSError:
            continue
        pointer, integer, index = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        shape = ctypes.POINTER(Layout)
        lib.llmslim_linear.argtypes = [shape, *[pointer] * 6, index, index, integer]
        lib.llmslim_dequantize.argtypes = [shape, *[pointer] * 4, index, index, pointer, index, integer]
        return lib
    return None


def linear(
    shape: Layout, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, x: Tensor
) -> Tensor:
    """x [m, in] @ W^T + bias -> [m, out]; all contiguous on the CPU, x float32 or bfloat16, bias as x."""
    lib = library()
    assert lib is not None
    m = x.shape[0]
    y = x.new_empty(m, shape.rows)
    threads = torch.get_num_threads()
    if threads > 1 and m * shape.rows * shape.cols < WORTH_A_THREAD:
        threads = 1
    failed = lib.llmslim_linear(
        shape,
        packed.data_ptr(),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        m,
        KINDS[x.dtype],
        threads,
    )
    if failed:
        raise MemoryError("llmslim: no memory for a packed product")
    return y


def dequantize(
    shape: Layout, packed: Tensor, scale: Tensor, zero_point: Tensor | None, rows: range | Tensor, out: Tensor
) -> None:
    """Writes rows of W (a range, or an int64 tensor [count] of their numbers) to out [count, in], which is
    float32 or bfloat16."""
    lib = library()
    assert lib is not None
    listed = isinstance(rows, Tensor)
    failed = lib.llmslim_dequantize(
        shape,
        packed.data_ptr(),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        rows.data_ptr() if isinstance(rows, Tensor) else None,
        0 if isinstance(rows, Tensor) else rows.start,
        len(rows),
        out.data_ptr(),
        KINDS[out.dtype],
        torch.get_num_threads() if len(rows) * shape.cols >= WORTH_A_THREAD else 1,
    )
    if failed == -2 and listed:
        raise IndexError(f"an index is outside 0 .. {shape.rows - 1}, the rows of this embedding")
    if failed:
        raise MemoryError("llmslim: no memory to expand a packed weight")
