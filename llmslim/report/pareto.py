"""The Pareto picture of runs: bytes or speed against quality, and which of them no other beats in both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmslim.report.page import figure
from llmslim.report.runs import Run
from llmslim.report.svg import Point, scatter

WIDE = 10.0  # perplexities and divergences that differ so many times are drawn on a logarithmic scale


@dataclass(frozen=True)
class Measure:
    """One axis: its title, what it takes from a run, and whether more of it is better."""

    title: str
    of: Callable[[Run], float | None]
    more_is_better: bool = False

    def drawn(self, run: Run) -> float | None:
        """The value, or None where there is none that a picture can hold."""
        value = self.of(run)
        return value if value is not None and math.isfinite(value) and value > 0 else None


COSTS = {
    "bytes": Measure("MB on disk", lambda run: run.bytes / 1e6),
    "decode": Measure("decode, tokens/s", lambda run: run.decode, True),
    "prefill": Measure("prefill, tokens/s", lambda run: run.prefill, True),
}
QUALITIES = {
    "perplexity": Measure("perplexity", lambda run: run.perplexity),
    "kl": Measure("KL from the base (nats)", lambda run: run.kl),
    "tasks": Measure("mean task score", lambda run: run.mean_score, True),
}


def quality_of(runs: Sequence[Run]) -> str:
    """The first measure of quality that two of them have; perplexity where there is none."""
    measured = (
        name for name, measure in QUALITIES.items() if sum(measure.drawn(run) is not None for run in runs) > 1
    )
    return next(measured, "perplexity")


def best(runs: Sequence[Run], cost: str, quality: str) -> list[int]:
    """Indices of the runs that no other beats in both, from the lowest cost or speed on."""
    x, y = COSTS[cost], QUALITIES[quality]
    sign = -1.0 if y.more_is_better else 1.0
    values = [(x.drawn(run), y.drawn(run)) for run in runs]
    return frontier([(a, None if b is None else sign * b) for a, b in values], x.more_is_better)


def frontier(points: Sequence[tuple[float | None, float | None]], more_is_better: bool = False) -> list[int]:
    """Indices of the points that no other is at least as good as in both, in order of the first coordinate.

    Args:
        points: (cost, loss), less of both is better; one that lacks either takes no part.
        more_is_better: of the first coordinate.
    """
    known = [
        (-x if more_is_better else x, y, index)
        for index, (x, y) in enumerate(points)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    kept: list[int] = []
    lowest = math.inf
    for _, loss, index in sorted(known):
        if loss < lowest:
            kept.append(index)
            lowest = loss
    return kept[::-1] if more_is_better else kept


def text_plot(runs: Sequence[Run], cost: str, quality: str, width: int = 60, height: int = 14) -> str:
    """The picture for a terminal: a letter per run, the cost or speed to the right, the quality upwards."""
    x, y = COSTS[cost], QUALITIES[quality]
    shown = [
        (index, right, up)
        for index, run in enumerate(runs)
        if (right := x.drawn(run)) is not None and (up := y.drawn(run)) is not None
    ]
    if len(shown) < 2:
        return f"No picture: fewer than two of these have both {x.title} and {y.title}."
    rights, ups = [entry[1] for entry in shown], [entry[2] for entry in shown]
    log = _log(ups)
    grid = _grid(
        [index for index, *_ in shown], rights, [math.log(up) for up in ups] if log else ups, width, height
    )
    high, low = _told(max(ups)), _told(min(ups))
    edge = max(len(high), len(low))
    lines = [f"{y.title}{', logarithmic' if log else ''}, against {x.title} (* no other beats it in both)"]
    for number, cells in enumerate(grid):
        label = high if number == 0 else low if number == height - 1 else ""
        lines.append(f"{label:>{edge}} |{''.join(cells)}".rstrip())
    first, last = f"{min(rights):,.1f}", f"{max(rights):,.1f}"
    lines.append(f"{'':>{edge}} +{'-' * width}")
    lines.append(f"{'':>{edge}}  {first}{last:>{width - len(first)}}  {x.title}")
    stars = best(runs, cost, quality)
    key = ", ".join(
        f"{_letter(index)} {runs[index].name}{' *' if index in stars else ''}" for index, *_ in shown
    )
    return "\n".join([*lines, f"{key}; {_better(x, y)} is better"])


def picture(runs: Sequence[Run], cost: str, quality: str) -> str:
    """The same as a figure of a page; empty where fewer than two runs have both."""
    x, y = COSTS[cost], QUALITIES[quality]
    kept = [run for run in runs if x.drawn(run) is not None and y.drawn(run) is not None]
    if len(kept) < 2:
        return ""
    points = [
        Point(x.of(run) or 0.0, y.of(run) or 0.0, run.name, "c4" if run.name == "base" else "c0")
        for run in kept
    ]
    drawing = scatter(
        points,
        x.title,
        y.title,
        best(kept, cost, quality),
        _log([point.y for point in points]),
        x.more_is_better,
    )
    return figure(drawing, f"{y.title[0].upper()}{y.title[1:]} against {x.title}: {_better(x, y)} is better.")


def _grid(
    indices: Sequence[int], xs: Sequence[float], ys: Sequence[float], width: int, height: int
) -> list[list[str]]:
    """The letters of the runs in their places."""
    grid = [[" "] * width for _ in range(height)]
    for index, x, y in zip(indices, xs, ys, strict=True):
        column = round((width - 1) * (x - min(xs)) / ((max(xs) - min(xs)) or 1))
        row = round((height - 1) * (max(ys) - y) / ((max(ys) - min(ys)) or 1))
        while grid[row][column] != " " and column + 1 < width:
            column += 1  # beside one that lies on the same spot
        grid[row][column] = _letter(index)
    return grid


def _better(x: Measure, y: Measure) -> str:
    return f"{'right' if x.more_is_better else 'left'} and {'up' if y.more_is_better else 'down'}"


def _told(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _letter(index: int) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    return letters[index] if index < len(letters) else "?"


def _log(values: Sequence[float]) -> bool:
    return max(values) > WIDE * min(values)
