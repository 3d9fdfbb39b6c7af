"""Runs side by side: a line each, scores on tasks, and which no other beats in both size (or speed) and quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmslim.errors import UserError
from llmslim.report import pareto
from llmslim.report.page import listed, page, paragraph, section, table
from llmslim.report.runs import HEADINGS, Run, caveats, runs_of, task_table
from llmslim.report.schema import read_report

TASKS_TOLD = "± is the standard error over questions; the mean is of the tasks that all scored runs have."


@dataclass(frozen=True)
class Comparison:
    """Runs with their base in front where they have one in common, and what stands in the way of comparing them.

    `cost` and `quality` are the axes that the stars and the picture in the terminal go by, of `pareto.COSTS` and
    `pareto.QUALITIES`.
    """

    runs: tuple[Run, ...]
    caveats: tuple[str, ...]
    cost: str = "bytes"
    quality: str = "perplexity"

    @property
    def best(self) -> frozenset[int]:
        """Indices of the runs that no other beats in both."""
        return frozenset(pareto.best(self.runs, self.cost, self.quality))

    @property
    def tasks(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Headings and rows of the scores on tasks."""
        return task_table(self.runs, self.best)

    @property
    def picture(self) -> str:
        """For a terminal."""
        return pareto.text_plot(self.runs, self.cost, self.quality)


def compare(folders: Sequence[str | Path], cost: str = "bytes", quality: str | None = None) -> Comparison:
    """Read the reports of runs.

    Args:
        cost: bytes, decode or prefill.
        quality: perplexity, kl or tasks; the first of them that two runs have when None.

    Raises:
        UserError: fewer than two folders, one named twice, one that is no run or cannot be read, or an unknown axis.
    """
    for word, known in ((cost, pareto.COSTS), (quality, pareto.QUALITIES)):
        if word is not None and word not in known:
            raise UserError(f"{word!r} is no axis of a comparison: give one of {', '.join(known)}.")
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise UserError("A comparison takes two runs or more: name their --output folders.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("A run is named twice: a comparison takes different ones.")
    reports = [read_report(path) for path in paths]
    names = _names(paths)
    told = caveats(names, reports)
    one_base = len({report["base"]["model"] for report in reports}) == 1
    runs = runs_of(names, reports, with_base=one_base and not told)
    return Comparison(runs, tuple(told), cost, quality or pareto.quality_of(runs))


def comparison_page(comparison: Comparison) -> str:
    """The same as a page that needs nothing beside it, with a picture for every pair of axes that was measured."""
    runs, best = comparison.runs, comparison.best
    rows = [run.cells(index in best) for index, run in enumerate(runs)]
    headings, scores = comparison.tasks
    pictures = [
        pareto.picture(runs, cost, quality)
        for quality in pareto.QUALITIES
        for cost in ("bytes", "decode")  # prefill of packed weights goes with decoding's
    ]
    axes = pareto.COSTS[comparison.cost].title, pareto.QUALITIES[comparison.quality].title
    told = (
        f"* no other beats it in both {axes[0]} and {axes[1]}. MB on disk, bits per weight, tokens per second; ± is "
        "the standard error over windows."
    )
    return page(
        "Runs compared",
        [
            "<h1>Runs compared</h1>",
            section(
                "Side by side", table(HEADINGS, rows, range(1, len(HEADINGS) - 1)), paragraph(told, "dim")
            ),
            section(
                "Scores on tasks",
                table(headings, scores, range(1, len(headings))),
                paragraph(TASKS_TOLD if len(headings) > 2 else "", "dim"),
            ),
            section("Not alike", listed(comparison.caveats)),
            section("What no other beats", _pictures(pictures)),
        ],
    )


def _pictures(pictures: Sequence[str]) -> str:
    inside = "".join(pictures)
    told = paragraph("The line joins the runs that no other beats in both.", "dim")
    return f'<div class="figures">{inside}</div>{told}' if inside else ""


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' last names, with as much of what is in front as tells them apart."""
    for count in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
