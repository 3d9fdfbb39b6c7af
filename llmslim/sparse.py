"""Linears with pruned weights: dense in memory, where zeros cost nothing extra, a bitmap and values on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from llmslim.anatomy.parts import features, is_linear
from llmslim.edit import Edit, replace_module


@dataclass
class SparseWeight:
    """A pruned weight [out, in] as it lies on disk.

    Attributes:
        bitmap: uint8 [out, ceil(in / 8)]; bit j % 8 of byte j // 8 of a row says whether weight j is kept.
        values: float [nonzeros], the kept weights row by row.
    """

    bitmap: Tensor
    values: Tensor


class SparseLinear(nn.Linear):
    """y = x W^T + b, where only the weights of a mask are not zero; x [..., in] -> y [..., out].

    `weight` is dense [out, in], so that the product is an ordinary one: a pruned model is smaller on disk, and
    no faster. Whenever gradients may flow, the product is with weight * mask, so that no optimizer revives a
    pruned weight. `state_dict` holds `weight` and `weight_bitmap`; checkpoints hold `stored()`, which
    `load_state_dict` reads as well.

    Args:
        nonzeros: how many weights are kept.
        device: "meta" gives a skeleton to load into.
    """

    weight_bitmap: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nonzeros: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw random weights
        self.in_features, self.out_features, self.nonzeros = in_features, out_features, nonzeros
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=dtype, device=device))
        stored = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", stored)
        bitmap = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("weight_bitmap", bitmap)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor) -> SparseLinear:
        """The weights [out, in] that the bool mask keeps, without bias."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, int(mask.sum()), False, weight.dtype, "meta")
        kept = torch.where(mask, weight.detach(), torch.zeros((), dtype=weight.dtype, device=weight.device))
        layer.weight = nn.Parameter(kept, requires_grad=False)
        layer.weight_bitmap = pack_mask(mask)
        return layer

    @property
    def mask(self) -> Tensor:
        """bool [out, in]: which weights are kept."""
        return unpack_mask(self.weight_bitmap, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.mask if self.training or torch.is_grad_enabled() else self.weight
        return F.linear(x, weight, self.bias)

    def stored(self) -> dict[str, Tensor]:
        """The tensors of `SparseWeight` by their names on disk; on meta their shapes and types."""
        weight = self.weight.detach()
        values = weight.new_empty(self.nonzeros) if weight.is_meta else weight[self.mask]
        return {"weight_bitmap": self.weight_bitmap, "weight_values": values}

    @torch.no_grad()
    def store(self, weight: SparseWeight) -> None:
        """Put a weight in place, cast to the layer's type.

        Raises:
            ValueError: it is of another shape or number of nonzeros, or bits of its last bytes stand for nothing.
        """
        mask = self.check(weight)
        self.weight_bitmap.copy_(weight.bitmap)
        self.weight.zero_()[mask] = weight.values.to(self.weight.device, self.weight.dtype)

    def dense(self, weight: SparseWeight, dtype: torch.dtype) -> Tensor:
        """What `store` would put in place, as a tensor of its own."""
        mask = self.check(weight)
        dense = torch.zeros(mask.shape, dtype=dtype, device=weight.values.device)
        dense[mask] = weight.values.to(dtype)
        return dense

    def check(self, weight: SparseWeight) -> Tensor:
        """The mask of a weight that fits this layer, or a ValueError."""
        if weight.bitmap.shape != self.weight_bitmap.shape or weight.values.shape != (self.nonzeros,):
            raise ValueError(f"bitmap and values are not those of {self}")
        mask = unpack_mask(weight.bitmap, self.in_features)
        if int(mask.sum()) != self.nonzeros or not torch.equal(pack_mask(mask), weight.bitmap):
            raise ValueError(f"the bitmap does not keep {self.nonzeros} weights")
        return mask

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._expand(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _expand(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Take the layout of the disk for the one in memory: what Trainer does when it resumes."""
        values = state_dict.pop(f"{prefix}weight_values", None)
        if values is not None:
            stored = SparseWeight(state_dict[f"{prefix}weight_bitmap"], values)
            state_dict[f"{prefix}weight"] = self.dense(stored, values.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nonzeros={self.nonzeros}"


class SparsifyLinear(Edit):
    """Replace the Linear (or Conv1D) at `module` by an empty `SparseLinear` that keeps `nonzeros` weights."""

    kind: ClassVar[str] = "sparsify_linear"
    module: str
    nonzeros: int = Field(gt=0)

    def apply(self, model: nn.Module) -> None:
        linear = model.get_submodule(self.module)
        if not is_linear(linear):
            raise ValueError(f"{self.module} is no dense Linear")
        out_features, in_features = features(linear)
        if self.nonzeros > out_features * in_features:
            raise ValueError(f"{self.module} has fewer than {self.nonzeros} weights")
        dtype = cast(Tensor, linear.weight).dtype
        sparse = SparseLinear(in_features, out_features, self.nonzeros, False, dtype, "meta")
        sparse.bias = linear.bias  # type: ignore[assignment]
        replace_module(model, self.module, sparse)


def pack_mask(mask: Tensor) -> Tensor:
    """bool [rows, n] -> uint8 [rows, ceil(n / 8)], low bits first."""
    padded = F.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    bits = padded.reshape(mask.shape[0], -1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return bits.sum(-1, dtype=torch.uint8)


def unpack_mask(bitmap: Tensor, width: int) -> Tensor:
    """The inverse of `pack_mask`, for rows of `width`."""
    bits = bitmap.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bitmap.device) & 1
    return bits.reshape(bitmap.shape[0], -1)[:, :width].bool()
