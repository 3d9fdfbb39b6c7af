"""Which blocks share: by their place, or by what it costs."""

from __future__ import annotations

from collections.abc import Sequence

Groups = list[list[int]]
"""Indices of the blocks of a stack, each in one group; the first of a group is the one that keeps the weights."""


def sequential(blocks: int, unique: int) -> Groups:
    """`unique` groups of consecutive blocks, as equal as can be; the larger ones first."""
    base, more = divmod(blocks, unique)
    sizes = [base + (number < more) for number in range(unique)]
    starts = [sum(sizes[:number]) for number in range(unique)]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def cyclic(blocks: int, unique: int) -> Groups:
    """Block i goes with block i - `unique`: the sequence of weights is gone through again and again."""
    return [list(range(first, blocks, unique)) for first in range(unique)]


def cheapest(costs: Sequence[Sequence[float]], unique: int) -> Groups:
    """`unique` groups of consecutive blocks of least total cost, by dynamic programming.

    Args:
        costs: `costs[i][k]`, what it costs that blocks i to i + k share; 0 for k = 0. Longer runs than are given are
            not considered.

    Raises:
        ValueError: groups of the lengths given cannot be so few.
    """
    blocks = len(costs)
    infinite = float("inf")
    best = [[infinite] * (unique + 1) for _ in range(blocks + 1)]  # of the first i blocks in n groups
    cut = [[0] * (unique + 1) for _ in range(blocks + 1)]
    best[0][0] = 0.0
    for start in range(blocks):
        for number in range(unique):
            for more, cost in enumerate(costs[start]):
                end, total = start + more + 1, best[start][number] + cost
                if total < best[end][number + 1]:
                    best[end][number + 1], cut[end][number + 1] = total, start
    if best[blocks][unique] == infinite:
        longest = max(map(len, costs))
        raise ValueError(f"{blocks} blocks in runs of at most {longest} cannot be {unique} groups")
    groups: Groups = []
    end = blocks
    for number in range(unique, 0, -1):
        start = cut[end][number]
        groups.insert(0, list(range(start, end)))
        end = start
    return groups
