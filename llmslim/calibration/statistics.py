"""Sums over the inputs of a Linear: what calibration leaves behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TILE = 192  # rows of a product computed at a time


class InputStats:
    """Second moments of the inputs of a Linear, as sums over tokens in float32.

    Sums (not means) can be added over ranks and over rounds. One object serves all Linears that read the same
    input (q, k, v; gate, up), so what is derived from it is derived once.

    Attributes:
        tokens: how many input rows were added.
        paired: how many of them came with those of the uncompressed model.
        hessian: X^T X, float32 [in, in].
        cross: X^T (X_ref - X), float32 [in, in], where X_ref are the inputs in the uncompressed model; None
            unless `add` was given them. Where only some rows came with theirs, scaled up to all of them.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.paired = 0
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.cross: Tensor | None = None
        self.derived: dict[object, object] = {}  # factors of the Hessian, kept by who computes them

    @classmethod
    def of(cls, inputs: Sequence[Tensor], references: Sequence[Tensor] = ()) -> InputStats:
        """Those of chunks [..., in]; `references` are the first chunks as they are in the uncompressed model."""
        stats = cls(inputs[0].shape[-1], inputs[0].device)
        for index, chunk in enumerate(inputs):
            stats.add(chunk, references[index] if index < len(references) else None)
        return stats.finish()

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add input rows [..., in], and optionally the same rows in the uncompressed model."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        if rows.dtype != torch.bfloat16:  # products of bfloat16 are exact, and half the time
            rows = rows.float()
        self.tokens += rows.shape[0]
        _add_product(self.hessian, rows, rows, upper=True)
        if reference is not None:
            if self.cross is None:
                self.cross = torch.zeros_like(self.hessian)
            self.paired += rows.shape[0]
            _add_product(self.cross, rows, reference.reshape(rows.shape).to(rows.dtype) - rows)

    def finish(self) -> InputStats:
        """Mirror the upper triangle into the lower one, and scale `cross`; call once, after the last `add`."""
        if self.cross is not None:
            self.cross *= self.tokens / self.paired
        upper = self.hessian.triu_()
        upper.add_(upper.triu(1).T)
        return self


def _add_product(total: Tensor, left: Tensor, right: Tensor, upper: bool = False) -> None:
    """total += left^T right, or of a symmetric product only the tiles that reach its upper triangle.

    Of bfloat16 rows each chunk's sum is rounded once, to 8 bits, and chunks are added in float32: far below what
    the choice of text does to the sums.
    """
    for start in range(0, len(total), _TILE):
        first, stop = start if upper else 0, start + _TILE
        tile, a, b = total[start:stop, first:], left[:, start:stop].T, right[:, first:]
        if a.dtype == total.dtype:
            tile.addmm_(a, b)
        else:
            tile.add_(a @ b)


def output_error(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2 for float32 weights [out, in], from X^T X [in, in]."""
    difference = weight - result
    power = (weight @ hessian).mul_(weight).sum()
    return float((difference @ hessian).mul_(difference).sum() / power.clamp_min(1e-30))
