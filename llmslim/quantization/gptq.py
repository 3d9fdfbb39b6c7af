"""GPTQ: quantize a weight column by column and let the columns to come absorb the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from llmslim.calibration.statistics import InputStats
from llmslim.edit import Edit
from llmslim.quantization.grid import QuantizedWeight, Scheme, assemble, round_to_grid, search_grid
from llmslim.quantization.quantizer import Quantizer
from llmslim.step import StepRecord

_COLUMNS = 128  # columns whose updates are applied at once to the rest


@dataclass
class Factor:
    """What GPTQ needs of a Hessian, computed once for all weights that share it.

    Attributes:
        order: column order, most excited first when `act_order`.
        inverse: upper Cholesky factor of the damped inverse Hessian in that order, [in, in].
        damp_percent: the damping that it took, as a share of the mean diagonal; None when none sufficed.
        correction: the GPTAQ matrix P [in, in], or None.
    """

    order: Tensor
    inverse: Tensor | None
    damp_percent: float | None
    correction: Tensor | None = None


def factor(hessian: Tensor, damp_percent: float, act_order: bool, cross: Tensor | None = None) -> Factor:
    """Permute, damp and factorize a Hessian; damping rises tenfold until the factorization succeeds.

    Args:
        hessian: X^T X, float32 [in, in].
        cross: X^T (X_ref - X) times its weight, for the asymmetric calibration of GPTAQ.
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    order = order.to(hessian.device)
    damp: float | None = damp_percent
    while damp is not None:
        damped = hessian[order][:, order]
        damped.diagonal().add_(damp * diagonal.mean())
        dead = damped.diagonal() == 0
        damped.diagonal()[dead] = 1.0  # an input that is always zero: its column is free
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            torch.cholesky_inverse(lower, out=damped)
            upper, failed = torch.linalg.cholesky_ex(damped, upper=True)
            if not failed and bool(upper.diagonal().isfinite().all()):
                correction = None
                if cross is not None:
                    moved = cross[order][:, order].T  # (X_ref - X)^T X, as GPTAQ writes it
                    correction = (moved @ upper.T).triu_(1) @ upper
                return Factor(order, upper, damp, correction)
        damp = damp * 10 if damp * 10 <= 1.0 else None
    return Factor(order, None, None)


def gptq(weight: Tensor, factor: Factor, scale: Tensor, zero: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize `weight` onto a fixed grid with error feedback (Frantar et al. 2023, arXiv:2210.17323).

    In the order of `factor`, column j is rounded to its grid, and its error e = (w - q) / U[j, j] is spread over
    the columns still open: W[:, k] -= e U[j, k]. U is the upper Cholesky factor of the inverse Hessian. Each
    column keeps the scale of its group as it stands in memory ("static groups"), so any order costs nothing at
    run time. With `factor.correction` P, column j also adds w P[j, k]: the deviation of the inputs themselves
    from the uncompressed model's is made good (GPTAQ, Li et al. 2025, arXiv:2504.02692).

    Args:
        weight: float32 [out, in].
        scale, zero: the grid, float32 of `Scheme.scale_shape`.
    """
    assert factor.inverse is not None
    out_features, in_features = weight.shape
    order, upper, correction = factor.order, factor.inverse, factor.correction
    work = weight.T[order].contiguous()  # one row per column of the weight: contiguous updates
    groups = order // scheme.group_width(in_features)
    scales = scale.expand(out_features, -1).T.contiguous()[groups]
    zeros = zero.expand(out_features, -1).T.contiguous()[groups]
    inverse_scales = scales.reciprocal()
    codes = torch.empty_like(work)
    errors = torch.empty(_COLUMNS, out_features, dtype=work.dtype, device=work.device)
    for start in range(0, in_features, _COLUMNS):
        stop = min(start + _COLUMNS, in_features)
        for j in range(start, stop):
            column, error = work[j], errors[j - start]
            code = torch.mul(column, inverse_scales[j], out=codes[j])
            code.add_(zeros[j]).round_().clamp_(0, scheme.max_code)
            torch.sub(code, zeros[j], out=error).mul_(scales[j]).sub_(column).div_(-upper[j, j])
            if j + 1 < stop:
                work[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
                if correction is not None:
                    work[j + 1 : stop].addr_(correction[j, j + 1 : stop], column)
        if stop < in_features:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
            if correction is not None:
                work[stop:].addmm_(correction[start:stop, stop:].T, work[start:stop])
    original = torch.empty_like(codes)
    original[order] = codes
    return assemble(original.T.contiguous(), scale, zero, scheme)


class GPTQ(Quantizer):
    """GPTQ: error feedback through the inverse Hessian of the inputs (Frantar et al. 2023, arXiv:2210.17323).

    min ||(W - W_q) X||^2 per Linear, X the calibration inputs as they arrive through the already quantized part
    of the model, each Linear decided before the next one of the block is reached. Scales are searched for the
    least error weighted by the inputs' power and stay in place for any column order (static groups).
    """

    kind: ClassVar[str] = "gptq"

    damp_percent: float = Field(0.01, gt=0, le=1, description="damping as a share of the Hessian's mean diagonal")
    act_order: bool = Field(True, description="quantize the most excited columns first; free at run time")
    asymmetric: float = Field(
        0.0, ge=0, le=1, description="weight of the GPTAQ correction towards the uncompressed inputs; costs a forward"
    )

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.asymmetric > 0

    def quantize(
        self, name: str, weight: Tensor, scheme: Scheme, stats: InputStats | None, record: StepRecord
    ) -> QuantizedWeight:
        importance = stats.hessian.diagonal() if stats is not None else None
        scale, zero = search_grid(weight, scheme, importance)
        solved = self._factor(stats) if stats is not None else None
        if solved is None or solved.inverse is None:
            if solved is not None:
                record.note(name, "the Hessian cannot be factorized with any damping: rounded to nearest")
            return round_to_grid(weight, scale, zero, scheme)
        if solved.damp_percent != self.damp_percent:
            record.note(name, f"damping raised from {self.damp_percent:g} to {solved.damp_percent:g}")
        return gptq(weight, solved, scale, zero, scheme)

    def _workspace(self, rows: int, width: int) -> int:
        return super()._workspace(rows, width) + 6 * 4 * width * width

    def _factor(self, stats: InputStats) -> Factor:
        key = (self.damp_percent, self.act_order, self.asymmetric)
        if key not in stats.derived:
            cross = stats.cross * self.asymmetric if stats.cross is not None else None
            stats.derived[key] = factor(stats.hessian, self.damp_percent, self.act_order, cross)
        return stats.derived[key]
