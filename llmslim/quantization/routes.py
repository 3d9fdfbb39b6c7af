"""How products with a packed weight are computed: one small function per route, and the choice between them.

    CPU, up to NATIVE_ROWS rows        `native_linear`: the C kernel reads the packed storage
    CPU, more rows                     `blocked_linear`: expand some rows of W in C, multiply, next rows
    CPU without the C library          `int4pack_linear` where torch's operator takes the layer and the input,
                                       else `dense_linear`
    CUDA                               `int4pack_linear` likewise, else `dense_linear`. Not tested: written on
                                       machines without a GPU
    other devices, tracing             `dense_linear`: plain torch operations

A gradient to x is grad_y @ W with W expanded again in the backward pass: no expanded W is kept in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from llmslim.cpu import fast_bfloat16
from llmslim.quantization import native, packing
from llmslim.quantization.grid import QuantizedWeight

if TYPE_CHECKING:
    from llmslim.quantization.packed import PackedLinear, _Packed

Route = Callable[["PackedLinear", Tensor], Tensor]

NATIVE_ROWS = 32
"""From here on expanding W once and multiplying in floating point wins (evals/linear_speed.py)."""

BLOCK_BYTES = 1 << 23
"""Rows of W are expanded in pieces of about this size: smaller ones slow the GEMM, larger ones take room."""

INT4PACK_ROWS = 32
"""torch's own 4-bit operator slows down beyond."""


def linear(layer: PackedLinear, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out], by the quickest route there is."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Differentiable.apply(layer, x)
    flat = x.reshape(-1, layer.in_features)
    return choose(layer, flat)(layer, flat).view(*x.shape[:-1], layer.out_features)


def choose(layer: PackedLinear, x: Tensor) -> Route:
    """The route for x [m, in]."""
    if torch.compiler.is_compiling() or not (x.is_cpu or x.is_cuda) or not x.is_floating_point():
        return dense_linear
    if x.is_cpu and native.library() is not None:
        return native_linear if x.shape[0] <= NATIVE_ROWS else blocked_linear
    return int4pack_linear if int4pack_takes(layer, x) else dense_linear


class _Differentiable(torch.autograd.Function):
    """Any route, with a gradient to x."""

    @staticmethod
    def forward(ctx: Any, layer: PackedLinear, x: Tensor) -> Tensor:
        ctx.layer = layer
        with torch.no_grad():
            return linear(layer, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad @ ctx.layer.dequantize(grad.dtype)


# ---- routes: x is [m, in] ----


def native_linear(layer: PackedLinear, x: Tensor) -> Tensor:
    """The C kernel. float16 goes through float32 (a CPU computes it slowly in any case)."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return native_linear(layer, x.float()).to(x.dtype)
    parameters = layer._parameters  # the attributes cost a microsecond each
    bias: Tensor | None = parameters["bias"]
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return native.linear(
        layer.layout,
        parameters["weight_packed"],  # type: ignore[arg-type]
        parameters["weight_scale"],  # type: ignore[arg-type]
        parameters["weight_zero_point"],
        bias,
        x.contiguous(),
    )


def blocked_linear(layer: PackedLinear, x: Tensor) -> Tensor:
    """Expands BLOCK_BYTES of W at a time and multiplies, in the dtype in which this CPU multiplies fast."""
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 and fast_bfloat16() else torch.float32
    values = x.to(dtype)
    y = values.new_empty(x.shape[0], layer.out_features)
    step = max(64, BLOCK_BYTES // (layer.in_features * dtype.itemsize))
    buffer = values.new_empty(min(step, layer.out_features), layer.in_features)
    for start in range(0, layer.out_features, step):
        rows = range(start, min(start + step, layer.out_features))
        weight = buffer[: len(rows)]
        _expand(layer, rows, weight)
        torch.mm(values, weight.t(), out=y[:, start : rows.stop])
    if layer.bias is not None:
        y += layer.bias
    return y.to(x.dtype)


def dense_linear(layer: PackedLinear, x: Tensor) -> Tensor:
    """Plain torch: expand all of W, multiply."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return functional.linear(x, layer.dequantize(x.dtype), bias)


def int4pack_takes(layer: PackedLinear, x: Tensor) -> bool:
    """Whether torch's 4-bit operator for x's device takes this layer and x."""
    width, (out_features, in_features) = layer.layout.width, layer.shape
    if layer.scheme.bits != 4 or x.dtype != torch.bfloat16 or x.shape[0] > INT4PACK_ROWS:
        return False
    if layer.scheme.group_size not in (32, 64, 128) or in_features % width:
        return False
    if x.is_cuda:
        return (
            in_features % 128 == 0
            and out_features % 8 == 0
            and torch.cuda.get_device_capability(x.device) >= (8, 0)
        )
    return out_features % 16 == 0


def int4pack_linear(layer: PackedLinear, x: Tensor) -> Tensor:
    """torch's 4-bit operator. It wants a layout of its own: converted at the first call and kept beside the
    storage (not saved; dropped when the layer is moved or loaded)."""
    if layer.int4pack is None:
        layer.int4pack = _convert_int4pack(layer.quantized(), x.is_cuda)
    weight, grid = layer.int4pack
    product = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
    y = product(x.contiguous(), weight, layer.layout.width, grid)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def _convert_int4pack(weight: QuantizedWeight, cuda: bool) -> tuple[Tensor, Tensor]:
    """The operator's W is (code - 8) * scale + shift; gives its codes and its grid [groups, out, 2]."""
    zero: Tensor | int = weight.scheme.midpoint if weight.zero_point is None else weight.zero_point.float()
    shift = (8 - zero) * weight.scale
    grid = torch.stack([weight.scale, shift], dim=-1).transpose(0, 1).contiguous().bfloat16()
    if cuda:
        pairs = weight.codes[:, ::2] << 4 | weight.codes[:, 1::2]
        return torch._convert_weight_to_int4pack(pairs, 8), grid
    return torch._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 1), grid


# ---- expansion ----


def dequantize_rows(layer: _Packed, rows: range | Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of W (a range or int64 [n] of row numbers) -> [n, in] of `dtype`."""
    storage = layer.weight_packed
    if storage.is_cpu and native.library() is not None and not torch.compiler.is_compiling():
        out = torch.empty(
            len(rows), layer.shape[1], dtype=dtype if dtype == torch.bfloat16 else torch.float32
        )
        _expand(layer, rows.long().contiguous() if isinstance(rows, Tensor) else rows, out)
        return out.to(dtype)
    return _dequantize_rows_torch(layer, rows, dtype)


def _expand(layer: _Packed, rows: range | Tensor, out: Tensor) -> None:
    native.dequantize(
        layer.layout, layer.weight_packed, layer.weight_scale, layer.weight_zero_point, rows, out
    )


def _dequantize_rows_torch(layer: _Packed, rows: range | Tensor, dtype: torch.dtype) -> Tensor:
    index = rows if isinstance(rows, Tensor) else slice(rows.start, rows.stop)
    shared = layer.weight_scale.shape[0] != layer.shape[0]
    codes = packing.unpack(layer.weight_packed[index], layer.scheme.bits, layer.shape[1])
    scale = layer.weight_scale if shared else layer.weight_scale[index]
    zero_point = layer.weight_zero_point
    if zero_point is not None and not shared:
        zero_point = zero_point[index]
    return QuantizedWeight(layer.scheme, codes, scale, zero_point).dequantize().to(dtype)
