"""What each step of a recipe cost and gained, as a waterfall: perplexity rises and bytes fall from line to line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmslim.report import figures
from llmslim.report.sensitivity import pyplot

RISES, FALLS, BASE = "#c44e52", "#55a868", "#8c8c8c"  # worse, better, where it began
LARGEST = 1e9  # perplexities from here on look alike


def steps_plot(report: dict[str, Any], path: Path) -> None:
    """Draw the report's steps from the base down; the file's ending says the kind (.svg, .png).

    Raises:
        UserError: matplotlib is not installed.
    """
    plt = pyplot()
    lines = figures.steps(report)
    panels = [("size on disk, MB", [line.bytes / 1e6 for line in lines], ",.1f")]
    perplexities = [line.perplexity for line in lines if line.perplexity is not None]
    if len(perplexities) == len(lines):
        panels.insert(0, ("perplexity", perplexities, ",.2f"))
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(1.5 + 4.5 * len(panels), 1.2 + 0.4 * len(lines)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (title, values, form) in zip(axes[0], panels, strict=True):
        _waterfall(axis, values, form)
        axis.set_title(title, loc="left")
    axes[0][0].set_yticks(range(len(lines)), [line.label for line in lines])
    axes[0][0].set_ylim(len(lines) - 0.5, -0.5)  # shared: the base on top
    with plt.rc_context({"svg.hashsalt": "llmslim"}):  # the same report, the same bytes
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _waterfall(axis: Any, values: list[float], form: str) -> None:
    """The first value as a bar from zero, then from each value to the next; each labelled with its value."""
    drawn = [min(value, LARGEST) for value in values]
    log = max(drawn) > 10 * min(drawn)
    if log:
        axis.set_xscale("log")
    left, right = (min(drawn) / 2 if log else 0.0), max(drawn)
    before = left
    for row, (value, now) in enumerate(zip(values, drawn, strict=True)):
        color = BASE if row == 0 else RISES if now > before else FALLS
        axis.barh(row, now - before, left=before, height=0.6, color=color)
        if row + 1 < len(values):
            axis.plot([now, now], [row - 0.3, row + 1.3], color="#444444", linewidth=0.8)
        change = f"  ({100 * (value / values[row - 1] - 1):+,.0f} %)" if row else ""
        axis.annotate(
            f"{value:{form}}{change}",
            (max(now, before), row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
        )
        before = now
    room = 0.6  # of the width, for the labels behind the bars
    axis.set_xlim(left, right * (right / left) ** room if log else right * (1 + room))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
