"""One budget of weights, spent over all Linears where it saves most relative output error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmslim.calibration.statistics import InputStats, check_finite, with_stats
from llmslim.lowrank import decompose, worthwhile
from llmslim.step import StepRecord, Survey, dense_weight

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
        check_finite(name, weight, stats, "factorized")
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

    A component costs out + in weights, and is bought as long as what it keeps is worth the price of them; the price
    is the lowest at which the budget suffices. What is bought of a Linear beyond the rank at which two factors are as
    large as the matrix is had whole, for the matrix's own size.

    Args:
        gains: per Linear what each component keeps, descending, [min(out, in)].
        shapes: per Linear (out, in).

    Returns:
        Linear -> rank, a multiple of `multiple_of` and at least that; 0: it stays whole.
    """
    chunks = {
        name: _chunks(gain, multiple_of) / (sum(shapes[name]) * multiple_of) for name, gain in gains.items()
    }

    def ranks(price: float) -> dict[str, int]:
        bought = {name: max(1, int((worth >= price).sum())) * multiple_of for name, worth in chunks.items()}
        return {name: rank if rank <= worthwhile(*shapes[name]) else 0 for name, rank in bought.items()}

    def size(chosen: dict[str, int]) -> int:
        return sum(
            rank * sum(shapes[n]) if rank else shapes[n][0] * shapes[n][1] for n, rank in chosen.items()
        )

    budget = share * sum(out * inputs for out, inputs in shapes.values())
    low, high = 0.0, max((float(worth.max()) for worth in chunks.values()), default=1.0) * 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if size(ranks(middle)) <= budget else (middle, high)
    return ranks(high)


def _chunks(gain: Tensor, multiple_of: int) -> Tensor:
    """Sums of `multiple_of` consecutive gains each; the last one of what is left."""
    padded = torch.nn.functional.pad(gain.double(), (0, -len(gain) % multiple_of))
    return padded.reshape(-1, multiple_of).sum(1)
