"""One budget of weights, spent over all Linears where it saves most relative output error."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llmslim.anatomy.parts import dense_weight
from llmslim.calibration.statistics import InputStats, check_inputs, with_stats
from llmslim.lowrank import decompose, worthwhile
from llmslim.step import StepRecord, Survey

if TYPE_CHECKING:
    from llmslim.anatomy import Block
    from llmslim.calibration.stream import BlockStream
    from llmslim.factorization.factorizer import Factorizer

_HALVINGS = 100  # of the interval that the price of a weight is sought in


def by_error(step: Factorizer, look: Survey) -> dict[str, int]:
    """Linear -> rank, 0 where it stays as it is, so that the sum of relative output errors is least.

    Each Linear is measured by itself, on the inputs of the uncompressed model; an expert's error counts by the
    share of the tokens that reach it.
    """
    gains: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for block, stream in look.blocks():
        step.prepare_block(block, stream, StepRecord())
        targets = step.targets(block)
        shapes |= targets
        found = _gains(step, block, stream, list(targets))
        gains |= {name: found.get(name, torch.zeros(min(shape))) for name, shape in targets.items()}
    return spend(gains, shapes, 1 - step.ratio, step.multiple_of)


def _gains(step: Factorizer, block: Block, stream: BlockStream, names: list[str]) -> dict[str, Tensor]:
    """Share of its output's power in each component of a named Linear; passes the lane through the block."""
    gains: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def measure(name: str, stats: InputStats | None) -> None:
        weight = dense_weight(stream.model.get_submodule(name)).float()
        check_inputs(name, stats, "factorized")
        powers = decompose(weight, step.root(stats)).powers
        gains[name] = powers / powers.sum().clamp_min(1e-30)
        tokens[name] = stats.tokens if stats is not None else 1

    if step.weighs_inputs:
        stream.walk(block, stream.lanes["calibration"], names, with_stats(measure))
    else:
        for name in names:
            measure(name, None)
        for lane in stream.lanes.values():
            stream.forward(block, lane)
    most = max(tokens.values(), default=1)
    return {name: gain * (tokens[name] / most) for name, gain in gains.items()}


def spend(
    gains: dict[str, Tensor], shapes: dict[str, tuple[int, int]], share: float, multiple_of: int
) -> dict[str, int]:
    """The ranks that keep most, of at most `share` of all weights.

    Each Linear has the rank, or is whole, at which what is kept less the price of the weights is most; the price is
    the lowest at which the budget suffices. No other ranks of as few weights keep more.

    Args:
        gains: per Linear what each component keeps, descending, [min(out, in)].
        shapes: per Linear (out, in).

    Returns:
        Linear -> rank, a multiple of `multiple_of` and at least that; 0: it stays whole.
    """
    choices = {name: _choices(gain, shapes[name], multiple_of) for name, gain in gains.items()}

    def best(price: float) -> dict[str, int]:
        return {name: int((c.kept - price * c.weights).argmax()) for name, c in choices.items()}

    def size(chosen: dict[str, int]) -> int:
        return sum(int(choices[name].weights[index]) for name, index in chosen.items())

    budget = share * sum(out * inputs for out, inputs in shapes.values())
    low = 0.0
    high = max((float((c.kept / c.weights).max()) for c in choices.values()), default=1.0) * 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if size(best(middle)) <= budget else (middle, high)
    return {name: int(choices[name].ranks[index]) for name, index in best(high).items()}


class _Choices(NamedTuple):
    """Of one Linear, each [choices], the smallest first: rank (0 whole), weights, and what they keep."""

    ranks: Tensor
    weights: Tensor
    kept: Tensor


def _choices(gain: Tensor, shape: tuple[int, int], multiple_of: int) -> _Choices:
    ranks = torch.arange(1, worthwhile(*shape) // multiple_of + 1) * multiple_of
    total = gain.double().cumsum(0)
    weights = torch.cat([ranks * sum(shape), torch.tensor([shape[0] * shape[1]])]).double()
    kept = torch.cat([total[ranks - 1], total[-1:]])
    return _Choices(torch.cat([ranks, torch.tensor([0])]), weights, kept)
