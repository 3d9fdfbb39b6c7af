"""The damped, factorized inverse Hessian that error feedback (GPTQ, SparseGPT) spreads errors by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from llmslim.calibration.statistics import InputStats


@dataclass
class Factor:
    """What error feedback needs of a Hessian, computed once for all weights that share it.

    Attributes:
        order: column order, most excited first when `act_order`.
        inverse: upper Cholesky factor of the damped inverse Hessian in that order, [in, in].
        damp_percent: the damping that it took, as a share of the mean diagonal; None when none sufficed.
        shift: D^T H^-1 [in, in] for D = X^T (X_ref - X), or None: W + W shift is what comes closest to the
            uncompressed model's outputs W X_ref from the inputs X as they are.
    """

    order: Tensor
    inverse: Tensor | None
    damp_percent: float | None
    shift: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """What a unit of squared rounding error costs in each column [in], later columns making good what they can.

        GPTQ's loss is sum_j (w_j - q_j)^2 / U[j, j]^2: the right weights for choosing scales beforehand.
        """
        assert self.inverse is not None
        cost = torch.empty_like(self.inverse.diagonal())
        cost[self.order] = self.inverse.diagonal().square().reciprocal()
        return cost


def factor(hessian: Tensor, damp_percent: float, act_order: bool) -> Factor:
    """Permute, damp and factorize a Hessian; damping rises tenfold until the factorization succeeds.

    Args:
        hessian: X^T X, float32 [in, in].
    """
    diagonal = hessian.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    )
    order = order.to(hessian.device)
    damp: float | None = damp_percent
    while damp is not None:
        work = hessian[order][:, order]
        lower = damped_cholesky(work, damp * diagonal.mean())
        if lower is not None:
            torch.cholesky_inverse(lower, out=work)
            del lower
            upper, failed = torch.linalg.cholesky_ex(work, upper=True)
            if not failed and bool(upper.diagonal().isfinite().all()):
                return Factor(order, upper, damp)
        damp = damp * 10 if damp * 10 <= 1.0 else None
    return Factor(order, None, None)


def drift(cross: Tensor, hessian: Tensor, damp_percent: float) -> Tensor | None:
    """D^T H^-1 [in, in] for D = X^T (X_ref - X) and H = X^T X of the same rows; None where H cannot be factorized."""
    lower = damped_cholesky(hessian.clone(), damp_percent * hessian.diagonal().mean())
    return None if lower is None else torch.cholesky_solve(cross, lower).T


def damped_cholesky(hessian: Tensor, ridge: Tensor) -> Tensor | None:
    """The lower factor of H + `ridge` I, None if there is none; H is changed in place."""
    diagonal = hessian.diagonal().add_(ridge)
    diagonal[diagonal == 0] = 1.0  # an input that is always zero: its column is free
    lower, failed = torch.linalg.cholesky_ex(hessian)
    return None if failed else lower


def root_of(stats: InputStats, damp_percent: float = 1e-5) -> Tensor:
    """S, lower triangular [in, in], with S S^T = X^T X + damping, kept with the statistics; float32.

    Args:
        damp_percent: damping as a share of the mean diagonal; raised tenfold until the factorization succeeds.
    """
    key = ("root", damp_percent)
    if key not in stats.derived:
        stats.derived[key] = rising_cholesky(stats.hessian, damp_percent * stats.hessian.diagonal().mean())[0]
    return cast(Tensor, stats.derived[key])


def rising_cholesky(hessian: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of H + `ridge` I, and the ridge, raised tenfold until there is one; for finite H > 0."""
    while (lower := damped_cholesky(hessian.clone(), ridge)) is None:
        ridge = ridge * 10
    return lower, ridge


def factor_of(stats: InputStats, damp_percent: float, act_order: bool) -> Factor:
    """The factor of the statistics' Hessian, kept with them for the next weight that reads the same inputs."""
    key = (damp_percent, act_order)
    if key not in stats.derived:
        found = factor(stats.hessian, damp_percent, act_order)
        if stats.cross is not None and stats.paired_hessian is not None:
            found.shift = drift(stats.cross, stats.paired_hessian, damp_percent)
            stats.cross = stats.paired_hessian = None  # they live on in the shift
        stats.derived[key] = found
    return cast(Factor, stats.derived[key])
