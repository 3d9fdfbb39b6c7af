"""Sums over the inputs of a Linear: what calibration leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmslim.errors import UserError

_TILE = 192


class InputStats:
    """Second moments of the inputs of a Linear, as sums over tokens in float32.

    Sums (not means) can be added over ranks and over rounds. One object serves all Linears that read the same
    input (q, k, v; gate, up), so what is derived from it is derived once.

    Attributes:
        tokens: how many input rows were added.
        hessian: X^T X, float32 [in, in].
        cross: X^T (X_ref - X), float32 [in, in], over the rows that came with those of the uncompressed model,
            X_ref; None when none did.
        paired_hessian: X^T X over the same rows: what `cross` must be divided by. Few tokens have nearly all of the
            power of some inputs, so that those of all rows may be far from it in proportion.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.tokens = 0
        self.hessian = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.cross: Tensor | None = None
        self.paired_hessian: Tensor | None = None
        self.derived: dict[object, object] = {}  # factors of the Hessian, kept by who computes them

    @classmethod
    def of(cls, inputs: Sequence[Tensor], references: Sequence[Tensor] = ()) -> InputStats:
        """Those of chunks [..., in]; `references` are the first chunks as they are in the uncompressed model."""
        stats = cls(inputs[0].shape[-1], inputs[0].device)
        for index, chunk in enumerate(inputs):
            stats.add(chunk, references[index] if index < len(references) else None)
        return stats.finish()

    def add(self, inputs: Tensor, reference: Tensor | None = None) -> None:
        """Add input rows [..., in]; those that come with the same rows in the uncompressed model first."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if reference is None and self.cross is not None and self.paired_hessian is None:
            self.paired_hessian = self.hessian.clone()
        self.tokens += rows.shape[0]
        self._add_upper_triangle(rows)
        if reference is not None:
            if self.cross is None:
                self.cross = torch.zeros_like(self.hessian)
            self.cross.addmm_(rows.T, reference.reshape(rows.shape).float() - rows)

    def _add_upper_triangle(self, rows: Tensor) -> None:
        """Half of a symmetric product suffices; tiles keep the matrix product fast.

        In float32: with bfloat16 products, rounded once per chunk, here and in `cross`, the demo model's 4-bit
        perplexity rose from 38.8 to 49.4.
        """
        width = rows.shape[1]
        for start in range(0, width, _TILE):
            stop = min(start + _TILE, width)
            self.hessian[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])

    def finish(self) -> InputStats:
        """Mirror upper triangles into the lower ones; call once, after the last `add`."""
        for upper in (self.hessian, self.paired_hessian):
            if upper is not None:
                upper.triu_().add_(upper.triu(1).T)
        if self.cross is not None and self.paired_hessian is None:
            self.paired_hessian = self.hessian
        return self


def with_stats(
    decide: Callable[[str, InputStats], None], references: dict[str, list[Tensor]] | None = None
) -> Callable[[str, list[Tensor]], None]:
    """What `BlockStream.walk` may visit Linears with, to have the statistics of their inputs decided on.

    Those of inputs that several Linears read are gathered once; no two are in memory at a time.

    Args:
        references: by Linear, its inputs in the uncompressed model, the first chunks; each freed when it is used.
    """
    waiting = {} if references is None else references
    last: list[tuple[list[Tensor], InputStats]] = []

    def visit(name: str, inputs: list[Tensor]) -> None:
        if not last or not same_memory(inputs, last[0][0]):
            last.clear()  # free the last statistics before the next are made
            last.append((inputs, InputStats.of(inputs, waiting.get(name, ()))))
        waiting.pop(name, None)
        decide(name, last[0][1])

    return visit


def is_finite(tensor: Tensor) -> bool:
    """Whether no value of a float tensor is NaN or infinite.

    The extremes, in which NaN wins, take one pass and no memory: 3 ms for 4096 x 4096 where `isfinite` takes 110.
    """
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def check_inputs(
    name: str, stats: InputStats | None, done: str, remedy: str = "--exclude it or mend the model"
) -> None:
    """Refuse inputs that no decomposition stops at; weights are looked at where they are read.

    Args:
        done: what cannot be done with such inputs: "factorized".
        remedy: what helps.

    Raises:
        UserError: the inputs of the Linear on this text are NaN or infinite.
    """
    if stats is not None and not is_finite(stats.hessian.diagonal()):
        raise UserError(f"{name} has NaN or infinite inputs on this text, which cannot be {done}; {remedy}.")


def output_power(weight: Tensor, hessian: Tensor) -> Tensor:
    """||W X||^2 = tr(W H W^T), for float32 weights [out, in], from H = X^T X [in, in]."""
    return (weight @ hessian).mul_(weight).sum()


def output_error(weight: Tensor, result: Tensor, hessian: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2 for float32 weights [out, in], from X^T X [in, in]."""
    return float(output_power(weight - result, hessian) / output_power(weight, hessian).clamp_min(1e-30))


def same_memory(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether chunks of inputs are the very same, so that their statistics need not be computed again."""
    return len(a) == len(b) and all(
        x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
        for x, y in zip(a, b, strict=True)
    )
