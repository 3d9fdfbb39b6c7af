"""Linear and embedding layers whose weight stays packed in memory.

One layout is stored, saved and computed with (see `packing.py`); no second copy is kept:

    weight_packed      uint8 [out, ceil(in * bits / 8)]
    weight_scale       scheme.scale_dtype [rows, groups]   (Scheme.scale_shape)
    weight_zero_point  uint8 [rows, groups], absent when the scheme is symmetric
    input_scale        scheme.scale_dtype [1], present when the inputs have a step that is stored
    bias               [out], optional, in the model's dtype

Casting the model (`.to(bfloat16)`, `.half()`) casts the bias but leaves the scales alone: they belong to the
grid, and rounding them once more would change every weight. Moves between devices reach all of it.
How a product is computed is in `routes.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmslim.quantization import native, packing, routes
from llmslim.quantization.grid import QuantizedWeight, Scheme, quantize_static, quantize_tokens


class _Packed(nn.Module):
    """The storage that `PackedLinear` and `PackedEmbedding` share: a weight [rows, cols] on its grid."""

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None

    def __init__(self, rows: int, cols: int, scheme: Scheme, device: torch.device | str | None) -> None:
        super().__init__()
        self.scheme = scheme
        self.shape = (rows, cols)
        self.layout = native.layout(scheme, rows, cols)
        self.int4pack: tuple[Tensor, Tensor] | None = None
        grid = scheme.scale_shape(rows, cols)
        width = packing.packed_width(cols, scheme.bits)
        self.weight_packed = _frozen(torch.empty(rows, width, dtype=torch.uint8, device=device))
        self.weight_scale = _frozen(
            torch.empty(grid, dtype=getattr(torch, scheme.scale_dtype), device=device)
        )
        zero_point = (
            None if scheme.symmetric else _frozen(torch.empty(grid, dtype=torch.uint8, device=device))
        )
        self.register_parameter("weight_zero_point", zero_point)
        step = torch.ones(1, dtype=self.weight_scale.dtype, device=device) if scheme.static_inputs else None
        self.register_parameter("input_scale", None if step is None else _frozen(step))

    @torch.no_grad()
    def store(self, weight: QuantizedWeight) -> None:
        """Packs a weight of this layer's shape and scheme into the storage; a step of the inputs, where it has one."""
        self.weight_packed.copy_(packing.pack(weight.codes, self.scheme.bits))
        self.weight_scale.copy_(weight.scale)
        if self.weight_zero_point is not None:
            assert weight.zero_point is not None
            self.weight_zero_point.copy_(weight.zero_point)
        if self.input_scale is not None and weight.input_scale is not None:
            self.input_scale.copy_(weight.input_scale)
        self.int4pack = None

    def quantized(self) -> QuantizedWeight:
        """The codes, scales and zero points, exactly as they were stored."""
        codes = packing.unpack(self.weight_packed.detach(), self.scheme.bits, self.shape[1])
        zero_point = None if self.weight_zero_point is None else self.weight_zero_point.detach().clone()
        step = None if self.input_scale is None else self.input_scale.detach().float()
        return QuantizedWeight(self.scheme, codes, self.weight_scale.detach().float(), zero_point, step)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out, in]: computed in float32, then rounded to `dtype`."""
        return routes.dequantize_rows(self, range(self.shape[0]), dtype)

    @property
    def weight(self) -> Tensor:
        """The storage seen as int8 (a view). Some models (T5) look at `linear.weight.dtype` and cast their
        activations to it, unless it is int8, their sign of a quantized layer. The values: `dequantize`."""
        weight = self.weight_packed.view(torch.int8)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps models' _init_weights off it
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        """`fn` moves or casts a tensor. It sees the scales as bytes, which a cast does not touch."""

        def keep_scale(t: Tensor) -> Tensor:
            return fn(t.view(torch.uint8)).view(t.dtype) if any(t is one for one in scales) else fn(t)

        scales = (self.weight_scale, self.input_scale)
        self.int4pack = None
        return super()._apply(keep_scale, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.int4pack = None
        super()._load_from_state_dict(*args, **kwargs)


class PackedLinear(_Packed):
    """y = x W^T + b with a packed W; x [..., in] -> y [..., out] in x's dtype. Gradients flow to x only.

    Args:
        in_features, out_features: W is [out, in].
        scheme: the grid of W.
        bias: whether there is a bias; it is of `dtype`.
        device: "meta" gives a skeleton to load into.
    """

    bias: Tensor | None
    pruned: bool = False
    """Whether weights were pruned before: what is 0 is to stay so."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(out_features, in_features, scheme, device)
        self.in_features, self.out_features = in_features, out_features
        stored = _frozen(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", stored)

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
        """Packs a quantized weight; the bias keeps its dtype. Both stay on their device."""
        out_features, in_features = weight.codes.shape
        dtype = torch.float32 if bias is None else bias.dtype
        layer = cls(in_features, out_features, weight.scheme, bias is not None, dtype, weight.codes.device)
        layer.store(weight)
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias.detach())
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return routes.linear(self, self.quantized_inputs(x))

    def quantized_inputs(self, x: Tensor) -> Tensor:
        """The inputs as the product takes them: on their grid, if the scheme says so."""
        if self.input_scale is not None:
            return quantize_static(x, self.input_scale)
        return x if self.scheme.activation_bits is None else quantize_tokens(x)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {_describe(self.scheme)}"
        )


class PackedEmbedding(_Packed):
    """Looks up rows of a packed weight [num_embeddings, embedding_dim]; unpacks only those.

    The output is of `dtype`, which follows casts of the model. A tied head is a `PackedLinear` given this
    layer's Parameters (`tie_head`).

    Args:
        dtype: of the output.
        padding_idx: kept for the code that reads it; it only ever mattered for gradients.
        embed_scale: the output is multiplied by it, rounded to `dtype` first, as Gemma's embeddings do.
    """

    like: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        scheme: Scheme,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, scheme, device)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.embed_scale = padding_idx, embed_scale
        # Empty: it is there to be cast along with the model.
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)

    @classmethod
    def from_quantized(
        cls,
        weight: QuantizedWeight,
        dtype: torch.dtype,
        padding_idx: int | None = None,
        embed_scale: float = 1.0,
    ) -> PackedEmbedding:
        rows, cols = weight.codes.shape
        layer = cls(rows, cols, weight.scheme, dtype, padding_idx, embed_scale, weight.codes.device)
        layer.store(weight)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """What the output is of."""
        return self.like.dtype

    def forward(self, ids: Tensor) -> Tensor:
        rows = routes.dequantize_rows(self, ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)
        return rows if self.embed_scale == 1.0 else rows * rows.new_tensor(self.embed_scale)

    def tie_head(self, bias: Tensor | None = None) -> PackedLinear:
        """The output projection that shares this layer's Parameters."""
        head = PackedLinear(self.embedding_dim, self.num_embeddings, self.scheme, False, self.dtype, "meta")
        head.weight_packed, head.weight_scale = self.weight_packed, self.weight_scale
        head.weight_zero_point = self.weight_zero_point
        head.bias = None if bias is None else _frozen(bias.detach())
        return head

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {_describe(self.scheme)}"


def _frozen(values: Tensor) -> nn.Parameter:
    """A Parameter, since only Parameters can be tied, that is never trained."""
    return nn.Parameter(values, requires_grad=False)


def _describe(scheme: Scheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    return f"bits={scheme.bits}, group_size={scheme.group_size}, {kind}"
