"""Two models on the same questions: their difference, how sure it is, and that in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
NORMAL_95 = 1.96  # standard errors: 95 % of a normal distribution lie within
FEW = 100  # questions, below which a verdict says how few they were
TOO_FEW = "too few questions to tell"
NO_LOSS = "no measurable loss"
TELLING = 0.05  # of a share: where a loss as large may hide behind chance, nothing is said of it

Aggregate = Callable[[list[Any]], float]


def difference(
    result: Sequence[Any], base: Sequence[Any], aggregate: Aggregate | None = None, seed: int = 0
) -> tuple[float, float | None]:
    """The figure of the result minus that of the base, and its standard error.

    The error is of the differences question by question: what is hard for both models cancels.

    Args:
        result, base: a score per question, in one order.
        aggregate: makes the figure of all scores; their mean when None, whose error has a closed form. Any other
            gets the paired bootstrap (1000 resamples of the questions).

    Returns:
        The error is None for fewer than two questions.
    """
    if len(result) != len(base):
        raise ValueError(f"{len(result)} scores cannot be paired with {len(base)}")
    few = len(result) < 2
    if aggregate is None:
        gaps = np.asarray(result, float) - np.asarray(base, float)
        return float(gaps.mean()), None if few else float(gaps.std(ddof=1) / len(gaps) ** 0.5)
    value = aggregate(list(result)) - aggregate(list(base))
    if few:
        return value, None
    draws = np.random.default_rng(seed).integers(len(result), size=(RESAMPLES, len(result)))
    gaps = [aggregate([result[i] for i in rows]) - aggregate([base[i] for i in rows]) for rows in draws]
    return value, float(np.std(gaps, ddof=1))


def of_equal_gaps(questions: int) -> float:
    """The standard error to tell where all questions of a share differ alike, and their spread says nothing.

    That of an interval which is 3 / questions to both sides (the rule of three; Hanley & Lippman-Hand 1983, JAMA
    249:1743): what was not seen in so many questions is, with 95 %, rarer.
    """
    return 3 / questions / NORMAL_95


def significant(gap: float, stderr: float | None) -> bool:
    """Whether chance would give such a difference less than once in 20 times."""
    return stderr is not None and abs(gap) > NORMAL_95 * stderr


def telling(gap: float, stderr: float, share: bool = True) -> bool:
    """Whether the 95 % interval leaves out a loss that would matter; of what is no share no one knows which would."""
    return not share or gap - NORMAL_95 * stderr > -TELLING


def verdict(gap: float, stderr: float | None, questions: int, share: bool = True) -> str:
    """The difference in words: "no measurable loss (-0.4 ± 0.8 points)", "-1.9 ± 0.8 points", or that nothing tells.

    Args:
        share: the figure is a share of 1, told in points of 100; else it is told as it is.
    """
    if stderr is None:
        return TOO_FEW
    few = f", of {questions} questions" if questions < FEW else ""
    told = spread(gap, stderr, share)
    if significant(gap, stderr):
        return f"{told}{few}"
    return f"{NO_LOSS if telling(gap, stderr, share) else TOO_FEW} ({told}{few})"


def spread(gap: float, stderr: float, share: bool = True) -> str:
    """-1.9 ± 0.8 points, or -0.31 ± 0.12."""
    return f"{100 * gap:+.1f} ± {100 * stderr:.1f} points" if share else f"{gap:+.3g} ± {stderr:.2g}"


def shift(gap: float, low: float, high: float) -> str:
    """-1.9 [-3.2, -0.6] points: a difference and its 95 % interval, of figures that are at most 1."""
    return f"{100 * gap:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points"


def shift_verdict(gap: float, low: float, high: float, examples: int) -> str:
    """The difference in words, as `verdict` has it, by an interval.

    Of few examples an interval says nothing: it has no width where both models answer all of them alike.
    """
    few = f", of {examples} examples" if examples < FEW else ""
    told = shift(gap, low, high)
    if low > 0 or high < 0:
        return f"{told}{few}"
    return f"{TOO_FEW if few or low <= -TELLING else NO_LOSS} ({told}{few})"
