"""SparseGPT: prune a weight column by column and let the columns to come absorb the error."""

from __future__ import annotations

import torch
from torch import Tensor

from llmslim.calibration.factor import Factor
from llmslim.masks import COLUMNS, Pattern, least_cost, span


def sparsegpt(weight: Tensor, factor: Factor, sparsity: float, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Prune with error feedback (Frantar & Alistarh 2023, arXiv:2301.00774).

    With U the upper Cholesky factor of the damped inverse Hessian, taking out w_j costs w_j^2 / U[j, j]^2. Of
    every 128 columns, as the columns before have left them, the cheapest weights of all rows go (of every M
    columns, the cheapest of each row for an N:M pattern). Column by column, e = w / U[j, j] of what goes is
    spread over the columns still open: W[:, k] -= e U[j, k]. What is zero at the start goes first, and stays zero.

    Args:
        weight: float32 [out, in].
        factor: with columns in natural order.

    Returns:
        The pruned and updated weight [out, in], and its mask (bool).
    """
    upper = factor.inverse
    assert upper is not None
    in_features = weight.shape[1]
    work = weight.T.contiguous()  # one row per column of the weight: contiguous updates
    alive = work != 0
    mask = torch.ones_like(alive)
    together, cost = span(pattern), upper.diagonal().square().reciprocal()
    errors = torch.empty(COLUMNS, weight.shape[0], dtype=work.dtype, device=work.device)
    for start in range(0, in_features, COLUMNS):
        stop = min(start + COLUMNS, in_features)
        for j in range(start, stop):
            if j % together == 0:
                now = slice(j, j + together)
                mask[now] = least_cost(work[now], cost[now], sparsity, pattern, alive[now]) & alive[now]
            error = torch.mul(work[j], ~mask[j], out=errors[j - start]).div_(upper[j, j])
            work[j] *= mask[j]
            if j + 1 < stop:
                work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
        if stop < in_features:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return work.T.contiguous(), mask.T.contiguous()
