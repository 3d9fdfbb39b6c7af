"""The grid of a quantized weight: what a scheme is, and the codes, scales and zero points that follow it.

A weight `W` of shape [out, in] is cut into groups of `group_size` consecutive inputs per output row. Inside
a group every value is `w = (code - zero_point) * scale`, `code` an integer of `bits` bits (0 .. 2**bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

GroupSize = int | Literal["channel", "tensor"]
ScaleDtype = Literal["float16", "bfloat16", "float32"]


class Scheme(BaseModel):
    """How a weight is put on a grid; plain JSON, since it is stored in the checkpoint.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: inputs that share a scale, or "channel" (one scale per output row) or "tensor" (one in all).
        symmetric: the zero point is 2**(bits-1) everywhere and is not stored.
        scale_dtype: the type that scales are rounded to before codes are chosen, and stored in.
        activation_bits: 8 when the inputs are put on a grid too.
        activation_scale: whether its step follows each token (`quantize_tokens`) or is one number that is stored
            (`quantize_static`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(4, ge=2, le=8)
    group_size: GroupSize = 64
    symmetric: bool = True
    scale_dtype: ScaleDtype = "bfloat16"
    activation_bits: int | None = Field(None, ge=8, le=8)
    activation_scale: Literal["token", "tensor"] = "token"

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: GroupSize) -> GroupSize:
        if isinstance(value, int) and value < 1:
            raise ValueError("a group has at least one input")
        return value

    @property
    def static_inputs(self) -> bool:
        """Whether the step of the inputs is stored with the weight."""
        return self.activation_bits is not None and self.activation_scale == "tensor"

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape [rows, groups] of scales and zero points: [out, in/g], [out, 1] or [1, 1].

        Raises:
            ValueError: `group_size` does not divide the inputs.
        """
        if self.group_size == "tensor":
            return 1, 1
        if self.group_size == "channel":
            return out_features, 1
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features}")
        return out_features, in_features // self.group_size

    def group_width(self, in_features: int) -> int:
        """How many consecutive inputs share a scale."""
        return self.group_size if isinstance(self.group_size, int) else in_features


@dataclass
class QuantizedWeight:
    """A weight on its grid, independent of any file format.

    Attributes:
        codes: uint8 [out, in], values 0 .. 2**bits - 1.
        scale: float32 [rows, groups] (`Scheme.scale_shape`), already rounded to `scheme.scale_dtype`.
        zero_point: uint8 [rows, groups], or None when the scheme is symmetric.
        input_scale: float32 [1], the step of the inputs, if `scheme.static_inputs` and it is known.
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    input_scale: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The float32 weight [out, in] that the codes stand for."""
        out_features, in_features = self.codes.shape
        rows, groups = self.scale.shape
        zero: Tensor | float = float(self.scheme.midpoint)
        if self.zero_point is not None:
            zero = self.zero_point.float().unsqueeze(-1)
        shape = (out_features, groups, in_features // groups)
        values = (self.codes.float().reshape(shape) - zero) * self.scale.float().reshape(rows, groups, 1)
        return values.reshape(out_features, in_features)


_SEARCH_CHUNK = 2**16  # elements searched at a time: what a core's cache holds


def min_max_grid(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point that just cover each group, zero included: round-to-nearest's grid.

    Args:
        weight: float [rows, groups, width].

    Returns:
        scale and zero point, float32 [rows, groups]; the scale rounded to `scheme.scale_dtype`, never 0.
    """
    if scheme.symmetric:
        scale = weight.abs().amax(-1) / (scheme.max_code / 2)
        return round_scale(scale, scheme), torch.full_like(scale, float(scheme.midpoint))
    low, high = weight.amin(-1).clamp_(max=0), weight.amax(-1).clamp_(min=0)
    scale = round_scale((high - low) / scheme.max_code, scheme)
    return scale, (-low / scale).round_().clamp_(0, scheme.max_code)


def round_scale(scale: Tensor, scheme: Scheme) -> Tensor:
    """Round scales to the type they are stored in; zero or lost ones (an all-zero group) become 1."""
    rounded = scale.to(getattr(torch, scheme.scale_dtype)).float()
    return torch.where((rounded == 0) | ~rounded.isfinite(), torch.ones_like(rounded), rounded)


def search_grid(
    weight: Tensor, scheme: Scheme, importance: Tensor | None = None, steps: int = 16
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of least weighted error per group.

    Shrinks the covering range step by step (clipping outliers buys resolution for the rest), refits the scale to
    the codes that each candidate gives by least squares, and keeps what has the least
    `sum importance * (w - (code - zero_point) * scale)**2`.

    Args:
        weight: float32 [out, in].
        importance: float32 [in], for instance the diagonal of the Hessian; equal when None.
        steps: shrunken ranges tried.

    Returns:
        scale and zero point, float32 of `Scheme.scale_shape`.
    """
    out_features, in_features = weight.shape
    rows, groups = scheme.scale_shape(out_features, in_features)
    width = out_features * in_features // (rows * groups)
    if importance is None:
        importance = torch.ones(in_features, device=weight.device)
    factors = (importance / importance.mean().clamp_min(1e-30)).expand(out_features, in_features)
    factors = factors.reshape(1, 1, width) if rows == 1 else factors[:1].reshape(1, groups, width)
    grouped = weight.reshape(rows, groups, width)
    step = max(1, _SEARCH_CHUNK // (groups * width))
    found = [_search(chunk, factors, scheme, steps) for chunk in grouped.split(step)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search(weight: Tensor, factors: Tensor, scheme: Scheme, steps: int) -> tuple[Tensor, Tensor]:
    scale, zero = min_max_grid(weight, scheme)
    best = torch.full_like(scale, torch.inf)
    codes, error = torch.empty_like(weight), torch.empty_like(weight)

    def attempt(new_scale: Tensor, new_zero: Tensor) -> None:
        nonlocal scale, zero, best
        _codes(weight, new_scale, new_zero, scheme, out=codes)
        torch.sub(codes, new_zero.unsqueeze(-1), out=error).mul_(new_scale.unsqueeze(-1)).sub_(weight)
        loss = error.square_().mul_(factors).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        scale = torch.where(better, new_scale, scale)
        zero = torch.where(better, new_zero, zero)

    full, start = scale, zero
    shrinks = torch.linspace(1.0, 0.45 if scheme.bits < 4 else 0.65, steps).tolist()
    signs = (1.0, -1.0) if scheme.symmetric else (1.0,)
    for shrink in shrinks:
        for sign in signs:  # a symmetric grid has one more level below zero than above: either end may get it
            attempt(round_scale(full * (shrink * sign), scheme), start)
    for _ in range(2):
        _codes(weight, scale, zero, scheme, out=codes)
        centred = codes.sub_(zero.unsqueeze(-1))
        weighted = centred * factors
        power = (weighted * centred).sum(-1)
        fitted = (weighted * weight).sum(-1) / power.clamp_min(1e-30)
        attempt(round_scale(torch.where(power > 0, fitted, scale), scheme), zero)
    return scale, zero


def _codes(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, out: Tensor | None = None) -> Tensor:
    """Nearest codes (as floats) for weight [rows, groups, width] on a grid [rows, groups]."""
    codes = torch.mul(weight, scale.reciprocal().unsqueeze(-1), out=out)
    return codes.add_(zero.unsqueeze(-1)).round_().clamp_(0, scheme.max_code)


def round_to_grid(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round a float weight [out, in] to the nearest points of a grid."""
    rows, groups = scale.shape
    codes = _codes(weight.reshape(rows, groups, -1), scale, zero, scheme)
    return assemble(codes.reshape(weight.shape), scale, zero, scheme)


def quantize_tokens(x: Tensor) -> Tensor:
    """x [..., in] on a symmetric grid of 8 bits per token, in x's dtype; the gradient passes straight through.

    s round(x / s) with s = max |x| / 127.5 over a token's inputs, between -128 s and 127 s: what compressed-tensors'
    dynamic "token" strategy computes.
    """
    top = x.detach().float().abs().amax(-1, keepdim=True)
    return quantize_static(x, (top / 127.5).clamp_min(torch.finfo(torch.float32).tiny))


def quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., in] on a symmetric grid of 8 bits of a given step, in x's dtype; the gradient passes straight through.

    s round(x / s), between -128 s and 127 s: what compressed-tensors' static "tensor" strategy computes.

    Args:
        scale: s, of a shape that broadcasts to x: [1] for all.
    """
    values, step = x.detach().float(), scale.detach().float()
    rounded = ((values / step).round_().clamp_(-128, 127) * step).to(x.dtype)
    return x + (rounded - x.detach()) if x.requires_grad and torch.is_grad_enabled() else rounded


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round a float32 weight [out, in] to the grid that just covers each group."""
    return round_to_grid(weight, *covering_grid(weight, scheme), scheme)


def covering_grid(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """`min_max_grid` of the groups that a float32 weight [out, in] has."""
    rows, groups = scheme.scale_shape(*weight.shape)
    return min_max_grid(weight.reshape(rows, groups, -1), scheme)


def assemble(codes: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> QuantizedWeight:
    zero_point = None if scheme.symmetric else zero.to(torch.uint8)
    return QuantizedWeight(scheme, codes.to(torch.uint8), scale, zero_point)
