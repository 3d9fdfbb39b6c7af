"""Which weights stay: masks from scores. Pure functions; of equal scores the later weight goes first."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from llmslim.errors import UserError

Scope = Literal["row", "layer"]
Pattern = Literal["unstructured", "2:4", "4:8"]

COLUMNS = 128  # where errors are fed back, an unstructured mask is chosen for so many columns at a time


def kept_count(total: int, sparsity: float) -> int:
    """How many of `total` weights stay at a sparsity."""
    return total - round(total * sparsity)


def nonzeros(rows: int, width: int, sparsity: float, pattern: Pattern, scope: Scope) -> int:
    """How many weights of a matrix [rows, width] a mask keeps."""
    if pattern != "unstructured":
        kept, group = parse(pattern)
        return rows * width // group * kept
    return rows * kept_count(width, sparsity) if scope == "row" else kept_count(rows * width, sparsity)


def parse(pattern: str) -> tuple[int, int]:
    """ "2:4" -> (2, 4): of each 4 consecutive inputs, 2 stay."""
    kept, group = pattern.split(":")
    return int(kept), int(group)


def choose(score: Tensor, sparsity: float, pattern: Pattern, scope: Scope) -> Tensor:
    """The mask for a score [out, in] by any of the rules; an N:M pattern sets the sparsity itself."""
    if pattern != "unstructured":
        return n_of_m(score, *parse(pattern))
    return per_row(score, sparsity) if scope == "row" else per_layer(score, sparsity)


def zeros_last(score: Tensor, alive: Tensor) -> Tensor:
    """A score of at least 0 that ranks what is not alive below everything."""
    return torch.where(alive, score, -1)


def per_row(score: Tensor, sparsity: float) -> Tensor:
    """bool [out, in]: the same share of every row stays, its highest scores.

    Args:
        score: float [out, in].
        sparsity: share of the weights that goes, 0 to 1.
    """
    return _highest(score, kept_count(score.shape[1], sparsity))


def per_layer(score: Tensor, sparsity: float) -> Tensor:
    """bool [out, in]: the highest scores of the whole matrix stay."""
    return _highest(score.reshape(1, -1), kept_count(score.numel(), sparsity)).reshape(score.shape)


def n_of_m(score: Tensor, kept: int, group: int) -> Tensor:
    """bool [out, in]: of each `group` consecutive inputs the `kept` with the highest scores stay.

    Raises:
        ValueError: `group` does not divide the inputs.
    """
    if score.shape[1] % group:
        raise ValueError(f"{score.shape[1]} inputs are not divisible by {group}")
    return _highest(score.reshape(-1, group), kept).reshape(score.shape)


def span(pattern: Pattern) -> int:
    """For how many columns at a time error feedback chooses a mask."""
    return COLUMNS if pattern == "unstructured" else parse(pattern)[1]


def least_cost(
    columns: Tensor, cost: Tensor, sparsity: float, pattern: Pattern, alive: Tensor | None = None
) -> Tensor:
    """SparseGPT's choice among `span(pattern)` columns: those of least w_j^2 / U[j, j]^2 go (arXiv:2301.00774).

    Args:
        columns: float [columns, out], as the columns before have left them.
        cost: 1 / U[j, j]^2 [columns].
        alive: bool [columns, out]; what is not goes first.

    Returns:
        bool [columns, out], what stays.
    """
    score = columns.square() * cost[:, None]
    score = score if alive is None else zeros_last(score, alive)
    return choose(score.T, sparsity, pattern, "layer").T


def check_pattern(name: str, width: int, pattern: Pattern) -> None:
    """Refuse a weight whose inputs an N:M pattern does not divide."""
    if pattern != "unstructured" and width % parse(pattern)[1]:
        raise UserError(
            f"pattern {pattern} does not fit the {width} inputs of {name}, which are not divisible "
            f"by {parse(pattern)[1]}; --exclude it or use pattern unstructured."
        )


def _highest(score: Tensor, count: int) -> Tensor:
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :count], True)
