"""Which blocks of two models are alike, and how states of one width are carried to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llmslim.training.forward import Inputs

DAMP = 1e-3  # of the fit of projections, as a share of the mean square of a student's channel


@torch.no_grad()
def outputs(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Sequence[nn.Module],
    targets: Sequence[nn.Module],
    sample: Inputs,
    mask: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What blocks of the student, and of the teacher, give for a sample: [tokens, width] each.

    Args:
        sample: on the models' device.
        mask: bool [batch, seq], which of its tokens are no padding; all when None.
    """
    from llmslim.training.forward import observe

    rows = slice(None) if mask is None else mask.flatten()
    mine, its = observe(student, sample, blocks).given, observe(teacher, sample, targets).given
    return [x.flatten(0, -2)[rows] for x in mine], [y.flatten(0, -2)[rows] for y in its]


def alikeness(x: Tensor, y: Tensor) -> float:
    """Linear CKA: ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred rows, Frobenius; 0 to 1.

    1 where y is x turned and scaled as a whole (Kornblith et al. 2019, arXiv:1905.00414).

    Args:
        x, y: [tokens, width]; widths may differ.
    """
    x, y = (z.float() - z.float().mean(0) for z in (x, y))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / scale.clamp_min(1e-30))


def alikenesses(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """`alikeness` of each of the student's (rows) with each of the teacher's (columns)."""
    return torch.tensor([[alikeness(x, y) for y in teachers] for x in students])


def ascending(scores: Tensor) -> list[int]:
    """A column for each row, each to the right of the one before, of the largest sum; [rows, columns >= rows]."""
    rows, columns = scores.shape
    best = [[0.0] * (columns + 1)]  # [row][column]: of so many rows in so many columns
    for row in range(rows):
        sums = [-math.inf] * (columns + 1)
        for column in range(row + 1, columns + 1):
            sums[column] = max(sums[column - 1], best[row][column - 1] + float(scores[row, column - 1]))
        best.append(sums)
    chosen, column = [], columns
    for row in range(rows, 0, -1):
        while column > row and best[row][column - 1] == best[row][column]:
            column -= 1
        column -= 1
        chosen.append(column)
    return chosen[::-1]


@torch.no_grad()
def projection(x: Tensor, y: Tensor) -> nn.Module:
    """The Linear of least mean square of W x - y, slightly damped; Identity for rows of the same width.

    Args:
        x, y: [tokens, width].
    """
    if x.shape[1] == y.shape[1]:
        return nn.Identity()
    x, y = x.float(), y.float()
    gram = x.T @ x
    gram.diagonal().add_(DAMP * gram.diagonal().mean())
    linear = nn.Linear(x.shape[1], y.shape[1], bias=False, device=x.device)
    linear.weight.copy_(torch.linalg.solve(gram, x.T @ y).T)
    return linear
