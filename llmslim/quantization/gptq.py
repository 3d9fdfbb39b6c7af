"""GPTQ: quantize a weight column by column and let the columns to come absorb the error."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmslim.anatomy import Anatomy
from llmslim.calibration.factor import Factor, factor_of
from llmslim.calibration.statistics import InputStats
from llmslim.edit import Edit
from llmslim.masks import COLUMNS, Pattern, check_pattern, choose, least_cost, span
from llmslim.quantization.grid import (
    QuantizedWeight,
    Scheme,
    assemble,
    round_scale,
    round_to_nearest,
    search_grid,
)
from llmslim.quantization.packed import PackedLinear
from llmslim.quantization.quantizer import Quantizer
from llmslim.step import StepRecord

_COLUMNS = 16  # columns decided one by one; updates of more at once are matrix products
_GRID_STEPS = 8  # shrunken ranges tried; scales are fitted to the codes afterwards, and more bring nothing


def gptq(
    weight: Tensor,
    factor: Factor,
    scale: Tensor,
    zero: Tensor,
    scheme: Scheme,
    pruned: Tensor | None = None,
    sparsity: float = 0.0,
    pattern: Pattern = "unstructured",
) -> QuantizedWeight:
    """Quantize `weight` onto a fixed grid with error feedback (Frantar et al. 2023, arXiv:2210.17323).

    In the order of `factor`, column j is rounded to its grid, and its error e = (w - q) / U[j, j] is spread over
    the columns still open: W[:, k] -= e U[j, k]. U is the upper Cholesky factor of the inverse Hessian. Each
    column keeps the scale of its group as it stands in memory ("static groups"), so any order costs nothing at
    run time.

    With a sparsity or a pattern the same pass prunes (Frantar & Alistarh 2023, arXiv:2301.00774, section 3.5): of
    every 128 columns, as the columns before have left them, the weights of least w_j^2 / U[j, j]^2 become zero (of
    every M columns, for an N:M pattern), and the errors of pruning and rounding are spread alike.

    Args:
        weight: float32 [out, in].
        factor: for an N:M pattern with columns in natural order.
        scale, zero: the grid, float32 of `Scheme.scale_shape`.
        pruned: bool [out, in], weights that get the code of exactly zero whatever errors reach them; those chosen
            here are added to it.
    """
    assert factor.inverse is not None
    out_features, in_features = weight.shape
    order, upper = factor.order, factor.inverse
    work = weight.T[order].contiguous()  # one row per column of the weight: contiguous updates
    groups = order // scheme.group_width(in_features)
    scales = scale.expand(out_features, -1).T.contiguous()[groups]
    zeros = zero.expand(out_features, -1).T.contiguous()[groups]
    columns = _Columns(work, scales, -zeros, scheme.max_code - zeros, torch.empty_like(work))
    pinned = None if pruned is None else pruned.T[order]
    if pinned is not None:
        columns.pin(pinned)
    coupling = upper / upper.diagonal().unsqueeze(-1)
    if sparsity or pattern != "unstructured":
        assert pruned is not None and pinned is not None
        cost = upper.diagonal().square().reciprocal()
        codes = _pruning_sweep(columns, coupling, pinned, cost, sparsity, pattern)
        pruned[:, order] = pinned.T
    else:
        codes = _sweep(columns, coupling, True)
    codes += zeros
    original = torch.empty_like(codes)
    original[order] = codes
    return assemble(original.T.contiguous(), scale, zero, scheme)


def descend(
    weight: Tensor, quantized: QuantizedWeight, hessian: Tensor, pruned: Tensor | None = None
) -> QuantizedWeight:
    """One sweep of coordinate descent on the codes: each goes to the level that is best given all others.

    GPTQ decides each column once, knowing nothing of the roundings to come. With E = W_q - W and G = E H, the
    best value of column j, all else fixed, is w_q - G_j / H_jj: it is rounded to its grid, and G follows. The
    output error ||E X||^2 never rises (cf. QuantEase, Behdin et al. 2023, arXiv:2309.01885).

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in].
        pruned: bool [out, in], weights whose codes stay.
    """
    scheme = quantized.scheme
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    coupling = hessian[order][:, order]
    coupling /= coupling.diagonal().clamp_min(1e-30)
    codes = quantized.codes.T[order].float()  # one row per column of the weight, as in `gptq`
    # what would take each column to its best value, all others as they are: -G_j / H_jj
    wanted = coupling.T @ (weight - quantized.dequantize()).T[order]
    groups = order // scheme.group_width(len(order))
    scales = quantized.scale.expand(len(weight), -1).T.contiguous()[groups]
    columns = _Columns(wanted, scales, -codes, scheme.max_code - codes, torch.empty_like(wanted))
    if pruned is not None:
        columns.pin(pruned.T[order])
    codes += _sweep(columns, coupling, False)
    original = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    original[order] = codes.to(torch.uint8)
    return QuantizedWeight(scheme, original.T.contiguous(), quantized.scale, quantized.zero_point)


class _Columns(NamedTuple):
    """Columns of a weight, one row each, and the grids that they are rounded to; float32 [in, out] all.

    Attributes:
        work: what is rounded, changed on the way.
        lowest, highest: the least and the greatest multiple of the scale allowed.
        multiples: where the multiples go.
    """

    work: Tensor
    scales: Tensor
    lowest: Tensor
    highest: Tensor
    multiples: Tensor

    def at(self, rows: slice) -> _Columns:
        """Some of the columns, on the same memory."""
        return _Columns(*(part[rows] for part in self))

    def pin(self, mask: Tensor) -> None:
        """Allow the multiple 0 alone where the bool mask [in, out] is set."""
        for bound in (self.lowest, self.highest):
            bound.masked_fill_(mask, 0)


def _sweep(columns: _Columns, coupling: Tensor, spread_error: bool) -> Tensor:
    """Round row j of `work` to a whole multiple of its scales, and take x_j coupling[j, k] off each later row k.

    x_j is the error work_j - rounded_j, or the rounded row itself; `work` holds all x_j afterwards. The rows are halved
    again and again, so that nearly all of that is matrix products.

    Args:
        coupling: float32 [in, in], of which only what is above the diagonal is read.

    Returns:
        The multiples.
    """
    work, scales, lowest, highest, multiples = columns
    middle = len(work) // 2
    if len(work) > _COLUMNS:
        for half in (slice(None, middle), slice(middle, None)):
            _sweep(columns.at(half), coupling[half, half], spread_error)
            if half.start is None:
                work[middle:].addmm_(coupling[:middle, middle:].T, work[:middle], alpha=-1)
        return multiples
    for j in range(len(work)):
        row, scale = work[j], scales[j]
        multiple = torch.div(row, scale, out=multiples[j]).round_().clamp_(lowest[j], highest[j])
        if spread_error:
            row.addcmul_(multiple, scale, value=-1)
        else:
            torch.mul(multiple, scale, out=row)
        if j + 1 < len(work):
            work[j + 1 :].addr_(coupling[j, j + 1 :], row, alpha=-1)
    return multiples


def _pruning_sweep(
    columns: _Columns, coupling: Tensor, pinned: Tensor, cost: Tensor, sparsity: float, pattern: Pattern
) -> Tensor:
    """`_sweep` that also decides what goes, of as many rows at a time as the pattern asks for.

    Args:
        pinned: bool [in, out], what is zero already, and goes first; holds all that is zero afterwards.
        cost: 1 / U[j, j]^2 [in].
    """
    work, together = columns.work, span(pattern)
    for start in range(0, len(work), COLUMNS):
        stop = min(start + COLUMNS, len(work))
        for first in range(start, stop, together):
            now = slice(first, min(first + together, stop))
            open_ = work[now].masked_fill(pinned[now], 0)
            pinned[now] |= ~least_cost(open_, cost[now], sparsity, pattern)
            columns.at(now).pin(pinned[now])
            _sweep(columns.at(now), coupling[now, now], True)
            work[now.stop : stop].addmm_(coupling[now, now.stop : stop].T, work[now], alpha=-1)
        work[stop:].addmm_(coupling[start:stop, stop:].T, work[start:stop], alpha=-1)
    return columns.multiples


def refit_scales(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    """The scales of least output error for given codes, in closed form per output row.

    A row is sum_g s_g c_g with c_g its centred codes in group g; ||(w - sum_g s_g c_g) X||^2 is least where
    A s = b with A_gh = c_g^T H_gh c_h and b_g = c_g^T (H w)_g. What H says nothing of stays as it is: groups whose
    inputs are zero, and rows whose system is singular.
    """
    scheme, scale = quantized.scheme, quantized.scale
    rows, groups = scale.shape
    if rows != len(weight):
        return quantized  # one scale per tensor
    zero = torch.full_like(scale, scheme.midpoint)
    if quantized.zero_point is not None:
        zero = quantized.zero_point.float()
    together = max(
        1, weight.numel() // groups**2
    )  # rows at a time: their systems take no more than the weight
    parts = [part.split(together) for part in (weight, quantized.codes, zero, scale)]
    fitted = torch.cat([_fitted(hessian, *part) for part in zip(*parts, strict=True)])
    lost = fitted.to(getattr(torch, scheme.scale_dtype)) == 0
    fitted = torch.where(lost, scale, fitted)
    return QuantizedWeight(scheme, quantized.codes, round_scale(fitted, scheme), quantized.zero_point)


def _fitted(hessian: Tensor, weight: Tensor, codes: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
    """`refit_scales` of some rows: what solves their systems, or the scale as it is; float32 [rows, groups]."""
    rows, groups = scale.shape
    width = weight.shape[1] // groups
    centred = codes.float().reshape(rows, groups, width) - zero.unsqueeze(-1)
    right = ((weight @ hessian).reshape(rows, groups, width) * centred).sum(-1)
    system = torch.empty(rows, groups, groups, device=weight.device)
    for group in range(groups):  # the system is symmetric: its upper half suffices
        rows_of_group = hessian[group * width : (group + 1) * width, group * width :]
        reach = (centred[:, group] @ rows_of_group).reshape(rows, groups - group, width)
        system[:, group, group:] = system[:, group:, group] = reach.mul_(centred[:, group:]).sum(-1)
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(-1, keepdim=True) + 1e-30  # towards the scale as it is
    diagonal += ridge
    right += ridge * scale
    fitted, failed = torch.linalg.solve_ex(system, right)
    usable = fitted.isfinite().all(-1, keepdim=True) & (failed == 0).unsqueeze(-1)
    return torch.where(usable, fitted, scale)


class GPTQ(Quantizer):
    """GPTQ: error feedback through the inverse Hessian of the inputs (Frantar et al. 2023, arXiv:2210.17323).

    min ||(W - W_q) X||^2 per Linear, X the calibration inputs as they arrive through the already quantized part
    of the model, each Linear decided before the next one of the block is reached. Scales are searched for the
    least error at the cost GPTQ's own loss gives each column, and stay in place for any column order (static
    groups). `refine` sweeps of coordinate descent and a closed-form fit of the scales follow, with the same damping.

    With `input_correction` = a > 0 the target is W + a W (X_ref - X) X^T H^-1: at a = 1 the weight whose outputs on the
    inputs as they are come closest to the uncompressed model's. That is the objective of GPTAQ (Li et al. 2025,
    arXiv:2504.02692), met by moving the target in closed form instead of inside the column loop. It is estimated
    from a third of the calibration text, for Linears of which each input has 8 tokens of it or more: few tell little.

    Weights that are exactly zero were pruned, here or elsewhere: they stay exactly zero. With `sparsity` or `pattern`
    weights are pruned in the same pass (SparseGPT, Frantar & Alistarh 2023, arXiv:2301.00774, section 3.5), which
    leaves the packed weight as large and as fast as it is without.
    """

    kind: ClassVar[str] = "gptq"

    damp_percent: float = Field(
        0.01, gt=0, le=1, description="damping as a share of the Hessian's mean diagonal"
    )
    act_order: bool | None = Field(
        None,
        description="quantize the most excited columns first, free at run time; "
        "on, but in a pass that prunes, which it harms",
    )
    refine: int = Field(
        1, ge=0, le=8, description="rounds of coordinate descent and refitted scales after GPTQ"
    )
    input_correction: float = Field(
        0.6,
        ge=0,
        le=1,
        description="how far to make good what quantized inputs differ from the original, where the text has 24 tokens "
        "per input; 0 saves time",
    )

    sparsity: float = Field(0.0, ge=0, lt=1, description="share of the weights to zero in the same pass")
    pattern: Pattern = Field(
        "unstructured", description="2:4 and 4:8: of each 4 (8) consecutive inputs 2 (4) stay"
    )

    @model_validator(mode="after")
    def _consistent(self) -> GPTQ:
        if self.pattern != "unstructured" and self.sparsity not in (0, 0.5):
            raise ValueError(f"pattern {self.pattern} keeps half of the weights: leave sparsity out")
        if self.pattern != "unstructured" and self.act_order:
            raise ValueError(f"pattern {self.pattern} takes columns in natural order: leave act_order out")
        return self

    @property
    def prunes(self) -> bool:
        """Whether weights become zero in the same pass."""
        return self.sparsity > 0 or self.pattern != "unstructured"

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return self.input_correction > 0

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        for block in anatomy.blocks:
            for name, (_, width) in self.targets(block).items():
                check_pattern(name, width, self.pattern)

    def compress_linear(
        self, name: str, weight: Tensor, stats: InputStats | None, record: StepRecord
    ) -> tuple[Edit, nn.Module]:
        edit, packed = super().compress_linear(name, weight, stats, record)
        if self.prunes:
            assert isinstance(packed, PackedLinear)
            record.linears[-1]["sparsity"] = float((packed.dequantize() == 0).float().mean())
            packed.pruned, edit = True, edit.model_copy(update={"pruned": True})
        return edit, packed

    def quantize(
        self, name: str, weight: Tensor, scheme: Scheme, stats: InputStats | None, record: StepRecord
    ) -> QuantizedWeight:
        act_order = not self.prunes if self.act_order is None else self.act_order
        solved = factor_of(stats, self.damp_percent, act_order) if stats is not None else None
        if stats is None or solved is None or solved.inverse is None:
            if solved is not None:
                record.note(name, "the Hessian cannot be factorized with any damping: rounded to nearest")
            if self.prunes:
                weight = weight * choose(weight.abs(), self.sparsity, self.pattern, "layer")
            return round_to_nearest(weight, scheme)
        if solved.damp_percent != self.damp_percent:
            record.note(name, f"damping raised from {self.damp_percent:g} to {solved.damp_percent:g}")
        target = (
            weight
            if solved.shift is None
            else weight.addmm(weight, solved.shift, alpha=self.input_correction)
        )
        zeros = weight == 0
        pruned = zeros if self.prunes or bool(zeros.any()) else None
        fitted = target.masked_fill(zeros, 0)
        if self.prunes:  # scales are for what stays, as far as that is known beforehand
            score = fitted.square() * solved.importance
            fitted = fitted * choose(score, self.sparsity, self.pattern, "layer")
        grid = search_grid(fitted, scheme, solved.importance, _GRID_STEPS)
        quantized = gptq(target, solved, *grid, scheme, pruned, self.sparsity, self.pattern)
        if not self.refine:
            return quantized
        # damped as in `gptq`: where few tokens are most of H, all other weights would move to make good a bit of theirs
        hessian = stats.hessian.clone()
        hessian.diagonal().add_(hessian.diagonal().mean() * (solved.damp_percent or self.damp_percent))
        for _ in range(self.refine):
            quantized = descend(target, quantized, hessian, pruned)
            quantized = refit_scales(target, quantized, hessian)
        return quantized

    def _workspace(self, rows: int, width: int) -> int:
        return super()._workspace(rows, width) + (8 if self.needs_reference else 6) * 4 * width * width
