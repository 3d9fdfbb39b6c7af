"""The compiled attention over a packed cache: `../csrc/attend.c`, loaded through ctypes, for one query per sequence.

`pip install` builds it when a C compiler is there; without it `library()` is None and `attention.attend` serves.
Like the library of packed Linears it shares torch's OpenMP runtime.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmslim.kvcache.basis import Components, Rotated
from llmslim.kvcache.codec import Codec, PerChannel, PerToken, Raw
from llmslim.kvcache.runtime.layer import Page, Pair, View

FLOATS = {torch.float32: 0, torch.bfloat16: 1}
"""The C code's number for the type of the keys and values that are kept as they are."""

KINDS = {PerChannel: 1, PerToken: 2, Rotated: 3, Components: 3}
IN_A_BASIS = (Rotated, Components)

WORTH_A_THREAD = 1 << 16
"""Multiply-adds below which one thread does it all."""


class Shape(ctypes.Structure):
    """As `../csrc/attend.c` has it."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("key_bits", ctypes.c_int64),
        ("value_bits", ctypes.c_int64),
        ("key_kind", ctypes.c_int64),
        ("value_kind", ctypes.c_int64),
        ("key_group", ctypes.c_int64),
        ("value_group", ctypes.c_int64),
        ("mask_stride", ctypes.c_int64),
        ("softcap", ctypes.c_float),
    ]


class Store(ctypes.Structure):
    """Pointers to what a codec made of keys or values, to levels in another basis, and to the bits of components."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("codes", "scale", "low", "levels", "widths")]


class State(ctypes.Structure):
    """Pointers to the queries, the mask and what the running softmax has so far."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("query", "mask", "top", "total", "out")]


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None when it was not built or does not fit this machine."""
    for path in sorted(Path(__file__).parent.parent.glob("_attend*.so")):
        try:
            lib = ctypes.CDLL(str(path))
        except OSError:
            continue
        pointer, index = ctypes.c_void_p, ctypes.c_int64
        head: list[Any] = [ctypes.POINTER(Shape), ctypes.POINTER(State)]
        stores = [ctypes.POINTER(Store)] * 2
        lib.llmslim_attend_packed.argtypes = [*head, *stores, index, index, ctypes.c_int]
        lib.llmslim_attend_plain.argtypes = [*head, *[pointer] * 4, index, index, ctypes.c_int]
        return lib
    return None


def serves(query: Tensor, view: View, mask: Tensor | None) -> bool:
    """Whether the library can do this: one query per sequence, on the CPU, with a mask that heads share."""
    return (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and not query.requires_grad
        and view.tail[0].dtype in FLOATS
        and not any(isinstance(codec, Raw) for codec in view.codecs)
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1))
        and library() is not None
    )


def attend(
    query: Tensor, view: View, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """As `attention.attend`: query [batch, heads, 1, D] -> [batch, heads, 1, value D]."""
    batch, heads, _, key_dim = query.shape
    keys, values = view.tail
    kv_heads, value_dim = keys.shape[1], values.shape[-1]
    key_codec, value_codec = view.codecs
    rows = query.reshape(batch, kv_heads, heads // kv_heads, key_dim).float() * scale
    top = torch.full((batch, heads), -torch.inf)
    total, out = torch.zeros(batch, heads), torch.zeros(batch, heads, value_dim)
    shape = Shape(
        batch, kv_heads, heads // kv_heads, key_dim, value_dim, view.settings.block,
        key_codec.bits, value_codec.bits,
        KINDS[type(key_codec)], KINDS[type(value_codec)],
        getattr(key_codec, "group", 0), getattr(value_codec, "group", 0), 0, softcap or 0.0,
    )  # fmt: skip
    flags = None
    if mask is not None:
        flags = mask.contiguous()
        shape.mask_stride = flags.shape[-1] if flags.shape[0] > 1 else 0

    def state(query: Tensor, start: int) -> State:
        at = None if flags is None else flags.data_ptr() + start
        return State(query.data_ptr(), at, top.data_ptr(), total.data_ptr(), out.data_ptr())

    start = view.sink[0].shape[2] if view.sink else 0
    if view.pages:
        turned = rows @ key_codec.basis if isinstance(key_codec, IN_A_BASIS) else rows
        for page in view.pages:
            _packed(shape, state(turned, start), view, page)
            start += page.tokens
        if isinstance(value_codec, Rotated):
            out = out @ value_codec.basis.T
    if view.sink:
        _plain(shape, state(rows, 0), view.sink)
    if keys.shape[2]:
        _plain(shape, state(rows, start), view.tail)
    out /= total.where(total > 0, 1)[..., None]
    return out.to(query.dtype)[:, :, None]


def _threads(shape: Shape, tokens: int) -> int:
    work = shape.batch * shape.heads * shape.queries * shape.key_dim * tokens
    return torch.get_num_threads() if work >= WORTH_A_THREAD else 1


def _packed(shape: Shape, state: State, view: View, page: Page) -> None:
    lib = library()
    assert lib is not None
    keys = [part.contiguous() for part in page.keys]  # which must outlive the call, as what `values` has
    values = [part.contiguous() for part in page.values]
    stores = _store(view.codecs[0], keys), _store(view.codecs[1], values)
    threads = _threads(shape, page.tokens)
    if lib.llmslim_attend_packed(shape, state, *stores, page.blocks, page.tokens, threads):
        raise MemoryError("llmslim: no memory for attention over a packed cache")


def _store(codec: Codec, parts: list[Tensor]) -> Store:
    levels = codec.padded_levels.data_ptr() if isinstance(codec, IN_A_BASIS) else None
    widths = codec.widths.data_ptr() if isinstance(codec, Components) else None
    return Store(*[part.data_ptr() for part in parts], levels, widths)


def _plain(shape: Shape, state: State, pair: Pair) -> None:
    lib = library()
    assert lib is not None
    keys, values = (part if part.stride(-1) == 1 else part.contiguous() for part in pair)
    steps = ctypes.c_int64 * 3
    failed = lib.llmslim_attend_plain(
        shape,
        state,
        keys.data_ptr(),
        steps(*keys.stride()[:3]),
        values.data_ptr(),
        steps(*values.stride()[:3]),
        FLOATS[keys.dtype],
        keys.shape[2],
        _threads(shape, keys.shape[2]),
    )
    if failed:
        raise MemoryError("llmslim: no memory for attention over a packed cache")
