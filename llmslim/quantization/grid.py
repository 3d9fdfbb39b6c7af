"""The grid of a quantized weight: what a scheme is, and the codes, scales and zero points that follow it.

A weight `W` of shape [out, in] is cut into groups of `group_size` consecutive inputs per output row. Inside
a group every value is `w = (code - zero_point) * scale`, `code` an integer of `bits` bits (0 .. 2**bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = Field(4, ge=2, le=8)
    group_size: GroupSize = 64
    symmetric: bool = True
    scale_dtype: ScaleDtype = "bfloat16"

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid."""
        return 2 ** (self.bits - 1)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape [rows, groups] of scales and zero points: [out, in/g], [out, 1] or [1, 1]."""
        if self.group_size == "tensor":
            return 1, 1
        if self.group_size == "channel":
            return out_features, 1
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
    """

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None

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
