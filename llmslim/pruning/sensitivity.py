"""What each head, group of channels and block of a model is worth: measured before anything is pruned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmslim.anatomy import Block
from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.statistics import InputStats, output_power
from llmslim.calibration.stream import BlockStream
from llmslim.pruning import importance
from llmslim.pruning._depth import mean_cosine
from llmslim.pruning.heads import PruneHeads
from llmslim.pruning.mlp import PruneMLP
from llmslim.pruning.structured import Site
from llmslim.step import Survey

SHARES = (0.125, 0.25, 0.5)  # of the channels, cheapest first
DAMPING = 1e-4  # as `refit_damping`


def sensitivity(look: Survey) -> list[dict[str, Any]]:
    """Per block of the model, in order, plain JSON:

    - `block`: its name; `influence`: 1 - mean cosine of a token's hidden state before and behind it (ShortGPT).
    - `heads`: a row per attention (cross-attention too) with `name`, and per query head `lost`, the share of
      ||W X||^2 that goes when that head alone is removed, and `refitted`, what still goes when the others are
      refitted.
    - `channels`: a row per down matrix (one; of a mixture one per expert) with `name`, `width`, and the same two
      figures for the cheapest share of the channels (cheapest by `lost`), one for each of `SHARES`.
    """
    rows = []
    for block, stream in look.blocks():
        lane = stream.lanes["calibration"]
        before = list(lane.hidden)
        row: dict[str, Any] = {"block": block.name, "heads": [], "channels": []}
        _measure(block, stream, row)
        row["influence"] = 1 - mean_cosine(before, lane.hidden)
        rows.append(row)
    return rows


def _measure(block: Block, stream: BlockStream, row: dict[str, Any]) -> None:
    """Pass the lane through a block and note what its heads and channels are worth."""
    heads, mlp = PruneHeads(ratio=0.0, unit="query"), PruneMLP(ratio=0.0)
    of_heads = {site.name: site for site in heads.sites(block)}
    of_mlp = {site.name: site for site in mlp.sites(block)}

    def visit(name: str, inputs: list[Tensor]) -> None:
        stats, weight = InputStats.of(inputs), dense_weight(stream.model.get_submodule(name)).float()
        if name in of_heads:
            row["heads"].append({"name": name, **_heads(weight, stats.hessian, of_heads[name])})
        else:
            row["channels"].append({"name": name, **_channels(weight, stats.hessian)})

    with mlp.opened(block):
        stream.walk(block, stream.lanes["calibration"], [*of_heads, *of_mlp], visit)


def _heads(weight: Tensor, hessian: Tensor, site: Site) -> dict[str, list[float]]:
    damped = importance.damped(hessian, DAMPING)
    inverse = torch.cholesky_inverse(importance.cholesky(damped)).to(weight.dtype)
    power = output_power(weight, hessian).clamp_min(1e-30)
    return {
        "lost": (importance.output_increase(weight, hessian, site.units) / power).view(-1).tolist(),
        "refitted": (importance.refit_increase(weight, inverse, site.units) / power).view(-1).tolist(),
    }


def _channels(weight: Tensor, hessian: Tensor) -> dict[str, Any]:
    width = weight.shape[1]
    units = torch.arange(width, device=weight.device).view(1, -1, 1)
    order = importance.output_increase(weight, hessian, units)[0].argsort(stable=True)
    damped, power = importance.damped(hessian, DAMPING), output_power(weight, hessian).clamp_min(1e-30)
    lost: list[float] = []
    refitted: list[float] = []
    for share in SHARES:
        keep = order[max(1, round(share * width)) :].sort().values
        new = torch.zeros_like(weight)
        for weights, found in (
            (weight[:, keep], lost),
            (importance.refit(weight, damped, keep), refitted),
        ):
            new[:, keep] = weights
            found.append(float(output_power(weight - new, hessian) / power))
    return {"width": width, "lost": lost, "refitted": refitted}
