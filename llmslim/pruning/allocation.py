"""How much each weight loses: sparsities that a look at the whole model sets before the first block is pruned."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

_SHIFT = 12  # bits of a float32 that scores are counted without: bins of 1 part in 2048
_BINS = 2**32 >> _SHIFT


class Histogram:
    """Counts of the scores of many weights: what one threshold over all of them takes from each.

    A positive float32 read as an integer keeps its order, and so does a negative one with its other bits flipped;
    the leading bits are the bin.
    """

    def __init__(self) -> None:
        self._counts: dict[str, tuple[Tensor, Tensor]] = {}  # the bins that occur, and how often

    def add(self, name: str, score: Tensor) -> None:
        bits = score.float().add(0.0).contiguous().view(torch.int32)  # + 0: -0 is 0
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> _SHIFT
        bins, counts = ordered.unique(return_counts=True)
        self._counts[name] = (bins.long().cpu() + _BINS // 2, counts.cpu())

    def sparsities(self, sparsity: float) -> dict[str, float]:
        """The share of each weight that lies below the score under which `sparsity` of all weights lie.

        The bin that the threshold falls into goes in the same part from each.
        """
        total = torch.zeros(_BINS, dtype=torch.int64)
        for bins, counts in self._counts.values():
            total[bins] += counts
        below = total.cumsum(0)
        target = sparsity * float(below[-1])
        edge = int(torch.searchsorted(below.double(), target))
        part = 1 - (float(below[edge]) - target) / float(total[edge])
        shares = {}
        for name, (bins, counts) in self._counts.items():
            gone = counts[bins < edge].sum() + part * counts[bins == edge].sum()
            shares[name] = float(gone) / float(counts.sum())
        return shares


def outlier_ratio(scores: Mapping[str, Tensor], times: float) -> float:
    """The share of a block's weights whose score exceeds `times` the mean of all of them (Yin et al. 2023, eq. 2).

    Args:
        scores: Wanda's |W| ||X||_2 [out, in] of each weight of the block.
    """
    count = sum(score.numel() for score in scores.values())
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores.values()) / count
    return sum(int((score > times * mean).sum()) for score in scores.values()) / count


def outlier_weighed(ratios: list[float], sizes: list[int], sparsity: float, reach: float) -> list[float]:
    """OWL (arXiv:2310.05175): a block with more outliers is pruned less.

    Densities grow linearly with the outlier ratio over a range of 2 * `reach`; their mean, weighted by the
    blocks' sizes, is 1 - `sparsity`. A range that would leave a block with nothing or with everything is
    narrowed until each has a quarter of what it would have uniformly, or loses that much.
    """
    values, weights = torch.tensor(ratios).double(), torch.tensor(sizes).double()
    spread = float(values.max() - values.min())
    if spread == 0:
        return [sparsity] * len(ratios)
    scaled = values * (2 * reach / spread)
    shift = (scaled * weights).sum() / weights.sum() - scaled
    room = torch.where(shift > 0, 0.75 * (1 - sparsity) / shift, -0.75 * sparsity / shift)
    return (sparsity + shift * min(1.0, float(room[shift != 0].min()))).tolist()


def within(sparsity: float, reach: float, points: int) -> Tensor:
    """Sparsities [points] evenly over `sparsity` +- `reach`, float64.

    A reach that would leave a weight with nothing or with everything is narrowed until it has a quarter of what it
    would have uniformly, or loses that much.
    """
    reach = min(reach, 0.75 * sparsity, 0.75 * (1 - sparsity))
    return torch.linspace(sparsity - reach, sparsity + reach, points, dtype=torch.float64)


def least_error(curves: list[Tensor], sizes: list[int], grid: Tensor, sparsity: float) -> list[float]:
    """The sparsities of least summed error whose mean, weighted by size, is `sparsity`.

    min sum_i e_i(s_i) subject to sum_i n_i s_i = s sum_i n_i, e_i the lower convex hull of a measured curve, straight
    between the measured points. Then a weight loses more as long as one more zero there costs less than the Lagrange
    multiplier: the pieces of all hulls are taken in the order of their slopes until the budget is spent. All weights
    but one end on measured points.

    Args:
        curves: float [points] per weight, its error at each sparsity of `grid`.
        sizes: of the weights.
        grid: ascending, [points]; `sparsity` lies within.
    """
    points = grid.tolist()
    pieces = []  # cost of one zero more, weight, length
    for index, (curve, size) in enumerate(zip(curves, sizes, strict=True)):
        errors = curve.tolist()
        hull = _lower_hull(points, errors)
        for a, b in pairwise(hull):
            length = points[b] - points[a]
            pieces.append(((errors[b] - errors[a]) / (length * size), index, length))
    shares = [points[0]] * len(curves)
    budget = (sparsity - points[0]) * sum(sizes)
    for _, index, length in sorted(pieces):
        taken = min(length, budget / sizes[index])
        shares[index] += taken
        budget -= taken * sizes[index]
    return shares


def _lower_hull(xs: list[float], ys: list[float]) -> list[int]:
    """Indices of the points on the lower convex hull, from left to right."""
    hull: list[int] = []
    for index in range(len(xs)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (ys[b] - ys[a]) * (xs[index] - xs[a]) < (ys[index] - ys[a]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(index)
    return hull
