"""Sparsities that differ from block to block or Linear to Linear, settled by a look at the uncompressed model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmslim.anatomy import Block
from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.statistics import InputStats, output_error, with_stats
from llmslim.calibration.stream import BlockStream
from llmslim.masks import per_row
from llmslim.pruning.allocation import least_error, outlier_ratio, outlier_weighed, within
from llmslim.step import StepRecord, Survey

if TYPE_CHECKING:
    from llmslim.pruning.weights import WeightPruner

_POINTS = 7  # sparsities at which each Linear's error is measured


def by_outliers(step: WeightPruner, look: Survey) -> dict[str, float]:
    """Linear -> sparsity: blocks with more outliers of Wanda's score lose less (OWL, arXiv:2310.05175)."""
    ratios, sizes, names = [], [], []
    for block, stream in look.blocks():
        step.prepare_block(block, stream, StepRecord())
        targets = step.targets(block)
        scores = wanda_scores(block, stream, list(targets))
        ratios.append(outlier_ratio(scores, step.owl_outlier) if scores else 0.0)
        sizes.append(sum(rows * width for rows, width in targets.values()))
        names.append(list(targets))
    used = [index for index, size in enumerate(sizes) if size]
    shares = outlier_weighed(
        [ratios[index] for index in used],
        [sizes[index] for index in used],
        step.sparsity,
        step.sparsity_range,
    )
    return {name: share for index, share in zip(used, shares, strict=True) for name in names[index]}


def by_error(step: WeightPruner, look: Survey) -> dict[str, float]:
    """Linear -> sparsity: so that the sum of relative output errors is least.

    Errors are measured of each Linear by itself, pruned as Wanda does at a few sparsities; an expert's count by the
    share of the tokens that reach it.
    """
    grid = within(step.sparsity, step.sparsity_range, _POINTS)
    curves: dict[str, Tensor] = {}
    sizes: list[int] = []
    for block, stream in look.blocks():
        step.prepare_block(block, stream, StepRecord())
        targets = step.targets(block)
        found = error_curves(block, stream, list(targets), grid)
        curves |= {name: found.get(name, torch.zeros_like(grid)) for name in targets}
        sizes += [rows * width for rows, width in targets.values()]
    shares = least_error(list(curves.values()), sizes, grid, step.sparsity)
    return dict(zip(curves, shares, strict=True))


def error_curves(block: Block, stream: BlockStream, names: list[str], grid: Tensor) -> dict[str, Tensor]:
    """||(W - W_s) X||^2 / ||W X||^2 of each named Linear that tokens reach, float64 [points], for sparsities [points].

    W_s is pruned by Wanda. Passes the lane through the block.
    """
    curves: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def measure(name: str, stats: InputStats) -> None:
        weight = dense_weight(stream.model.get_submodule(name)).float()
        score = wanda_score(weight, stats.hessian.diagonal())
        errors = [
            output_error(weight, weight * per_row(score, share), stats.hessian) for share in grid.tolist()
        ]
        curves[name], tokens[name] = torch.tensor(errors, dtype=torch.float64), stats.tokens

    stream.walk(block, stream.lanes["calibration"], names, with_stats(measure))
    most = max(tokens.values(), default=0)
    return {name: curve * (tokens[name] / most) for name, curve in curves.items()}


def wanda_score(weight: Tensor, power: Tensor) -> Tensor:
    """|W_ij| ||X_j||_2 [out, in], from the inputs' sums of squares [in]."""
    return weight.abs() * power.sqrt()


def wanda_scores(block: Block, stream: BlockStream, names: list[str]) -> dict[str, Tensor]:
    """Wanda's score of each named Linear of a block that tokens reach; passes the lane through the block."""
    scores = {}

    def visit(name: str, inputs: list[Tensor]) -> None:
        power = sum(chunk.reshape(-1, chunk.shape[-1]).float().square().sum(0) for chunk in inputs)
        weight = dense_weight(stream.model.get_submodule(name)).float()
        scores[name] = wanda_score(weight, torch.as_tensor(power))

    stream.walk(block, stream.lanes["calibration"], names, visit)
    return scores
