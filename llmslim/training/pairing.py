"""Which blocks of two models are alike, and how states of one width are carried to another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llmslim.training.forward import Inputs

PART = 512  # tokens of a sample that pass at once
DAMP = 1e-3  # of the fit of projections, as a share of the mean square of a student's channel


@torch.no_grad()
def outputs(
    models: tuple[nn.Module, nn.Module],
    blocks: tuple[Sequence[nn.Module], Sequence[nn.Module]],
    samples: tuple[Inputs, Inputs],
    mask: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """What blocks of the student, and of the teacher, give for a sample: [tokens, width] each.

    The sample passes in small parts: a large vocabulary's logits of all of it would take gigabytes.

    Args:
        samples: the same for both, as each takes it, on the models' device.
        mask: bool [batch, seq], which of its tokens are no padding; all when None.
    """
    from llmslim.training.forward import observe

    found: list[list[Tensor]] = []
    for model, modules, sample in zip(models, blocks, samples, strict=True):
        parts = [observe(model, part, modules).given for part in _parts(sample)]
        found.append([torch.cat([x.flatten(0, -2) for x in given]) for given in zip(*parts, strict=True)])
    rows = slice(None) if mask is None else mask.flatten()
    mine, its = ([x[rows] for x in given] for given in found)
    return mine, its


def _parts(sample: Inputs) -> list[Inputs]:
    """The rows of a sample, some at a time."""
    if isinstance(sample, Tensor):
        return list(sample.split(max(1, PART // sample.shape[1])))
    columns = [[*_parts(column)] for column in sample.values()]
    return [dict(zip(sample, part, strict=True)) for part in zip(*columns, strict=True)]


def alikenesses(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Linear CKA of each of the student's (rows) with each of the teacher's (columns), 0 to 1.

    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred rows, Frobenius: 1 where y is x turned and scaled as a whole
    (Kornblith et al. 2019, arXiv:1905.00414).

    Args:
        students, teachers: [tokens, width] each; widths may differ.
    """
    sides = [[x.float() - x.float().mean(0) for x in side] for side in (students, teachers)]
    mine, its = ([(x.T @ x).norm() for x in side] for side in sides)
    return torch.tensor(
        [
            [
                float((y.T @ x).square().sum() / (a * b).clamp_min(1e-30))
                for y, b in zip(sides[1], its, strict=True)
            ]
            for x, a in zip(sides[0], mine, strict=True)
        ]
    )


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
