"""How much each weight loses: sparsities that a look at the whole model sets before the first block is pruned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SHIFT = 12  # bits of a float32 that magnitudes are counted without: bins of 1 part in 2048
_BINS = 2**31 >> _SHIFT


class Magnitudes:
    """Counts of the magnitudes of many weights: what one threshold over all of them takes from each.

    A positive float32 read as an integer keeps its order; its leading bits are the bin.
    """

    def __init__(self) -> None:
        self._counts: dict[str, tuple[Tensor, Tensor]] = {}  # the bins that occur, and how often

    def add(self, name: str, weight: Tensor) -> None:
        bins, counts = (weight.float().abs().view(torch.int32) >> _SHIFT).unique(return_counts=True)
        self._counts[name] = (bins.long().cpu(), counts.cpu())

    def sparsities(self, sparsity: float) -> dict[str, float]:
        """The share of each weight that lies below the magnitude under which `sparsity` of all weights lie.

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
