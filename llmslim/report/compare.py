"""Runs side by side: one line each, and which of them no other beats in both size (or speed) and quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmslim.errors import UserError
from llmslim.report import figures
from llmslim.report.page import figure, listed, page, paragraph, section, table
from llmslim.report.schema import read_report
from llmslim.report.svg import Point, scatter

HEADINGS = ("run", "MB", "bits", "perplexity", "KL", "top-1, %", "decode/s", "prefill/s", "made by")
WIDE = 10.0  # perplexities that differ so many times are drawn on a logarithmic scale


@dataclass(frozen=True)
class Run:
    """What a comparison needs of a run, or of the base of some; None for what was not measured."""

    name: str
    made_by: str
    bytes: int
    bits: float
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    kl: float | None = None
    agreement: float | None = None
    decode: float | None = None
    prefill: float | None = None

    def cells(self, best: bool) -> tuple[str, ...]:
        """Of the table, by `HEADINGS`; a run that no other beats has a star."""
        spread = "" if self.perplexity_stderr is None else f" ± {self.perplexity_stderr:.2f}"
        agreement = None if self.agreement is None else 100 * self.agreement
        return (
            f"{self.name}\u00a0*" if best else self.name,
            f"{self.bytes / 1e6:,.1f}",
            f"{self.bits:.2f}",
            "-" if self.perplexity is None else f"{self.perplexity:,.2f}{spread}",
            _or_dash(self.kl, ".4f"),
            _or_dash(agreement, ".1f"),
            _or_dash(self.decode, ".1f"),
            _or_dash(self.prefill, ".1f"),
            self.made_by,
        )


@dataclass(frozen=True)
class Comparison:
    """Runs with their base in front where they have one in common, and what stands in the way of comparing them."""

    runs: tuple[Run, ...]
    caveats: tuple[str, ...]

    @property
    def best(self) -> frozenset[int]:
        """Indices of the runs that no other beats in both bytes and perplexity."""
        return frozenset(frontier([(run.bytes, run.perplexity) for run in self.runs]))


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Read the reports of runs.

    Raises:
        UserError: fewer than two folders, one named twice, or one that is no run or cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) < 2:
        raise UserError("A comparison takes two runs or more: name their --output folders.")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("A run is named twice: a comparison takes different ones.")
    reports = [read_report(path) for path in paths]
    names = _names(paths)
    runs = [_run(name, report, "result") for name, report in zip(names, reports, strict=True)]
    caveats = _caveats(names, reports)
    if len({report["base"]["model"] for report in reports}) == 1 and not caveats:
        runs.insert(0, _run("base", _fullest(reports), "base"))
    return Comparison(tuple(runs), tuple(caveats))


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


def text_plot(comparison: Comparison, width: int = 60, height: int = 14) -> str:
    """The picture for a terminal: a letter per run, bytes to the right, perplexity upwards; less of both is better."""
    shown = [
        (index, run, run.perplexity or 0.0)
        for index, run in enumerate(comparison.runs)
        if _drawn(run.perplexity)
    ]
    if len(shown) < 2:
        return "No picture: fewer than two of these have a perplexity."
    losses = [loss for *_, loss in shown]
    log = _log([run for _, run, _ in shown])
    xs = [run.bytes / 1e6 for _, run, _ in shown]
    ys = [math.log(loss) if log else loss for loss in losses]
    grid = [[" "] * width for _ in range(height)]
    for (index, *_), x, y in zip(shown, xs, ys, strict=True):
        column = round((width - 1) * (x - min(xs)) / ((max(xs) - min(xs)) or 1))
        row = round((height - 1) * (max(ys) - y) / ((max(ys) - min(ys)) or 1))
        while grid[row][column] != " " and column + 1 < width:
            column += 1  # beside one that lies on the same spot
        grid[row][column] = _letter(index)
    high, low = f"{max(losses):,.1f}", f"{min(losses):,.1f}"
    edge = max(len(high), len(low))
    lines = []
    for number, cells in enumerate(grid):
        label = high if number == 0 else low if number == height - 1 else ""
        lines.append(f"{label:>{edge}} |{''.join(cells)}".rstrip())
    lines.append(f"{'':>{edge}} +{'-' * width}")
    lines.append(
        f"{'':>{edge}}  {min(xs):,.1f} MB{f'{max(xs):,.1f} MB':>{width - len(f'{min(xs):,.1f} MB')}}"
    )
    scale = ", logarithmic" if log else ""
    key = ", ".join(
        f"{_letter(index)} {run.name}{' *' if index in comparison.best else ''}" for index, run, _ in shown
    )
    return "\n".join([f"perplexity{scale}, against size on disk (* no other beats it in both)", *lines, key])


def comparison_page(comparison: Comparison) -> str:
    """The same as a page that needs nothing beside it, with a picture of bytes and one of speed."""
    runs, best = comparison.runs, comparison.best
    rows = [run.cells(index in best) for index, run in enumerate(runs)]
    pictures = [
        _picture(runs, [run.bytes / 1e6 for run in runs], "MB on disk", more_is_better=False),
        _picture(runs, [run.decode for run in runs], "decode, tokens/s", more_is_better=True),
    ]
    told = (
        "* no other has both fewer bytes and a lower perplexity. MB on disk, bits per weight, tokens per second; ± is "
        "the standard error over windows."
    )
    return page(
        "Runs compared",
        [
            "<h1>Runs compared</h1>",
            f'<div class="figures">{"".join(pictures)}</div>',
            section(
                "Side by side", table(HEADINGS, rows, range(1, len(HEADINGS) - 1)), paragraph(told, "dim")
            ),
            section("Not alike", listed(comparison.caveats)),
        ],
    )


def _picture(runs: Sequence[Run], xs: Sequence[float | None], title: str, more_is_better: bool) -> str:
    kept = [(x, run) for x, run in zip(xs, runs, strict=True) if x is not None and _drawn(run.perplexity)]
    if len(kept) < 2:
        return ""
    log = _log([run for _, run in kept])
    points = [
        Point(x, float(run.perplexity or 0.0), run.name, "c4" if run.name == "base" else "c0")
        for x, run in kept
    ]
    best = frontier([(point.x, point.y) for point in points], more_is_better)
    drawing = scatter(points, title, "perplexity", best, log)
    better = "more to the right and lower" if more_is_better else "more to the left and lower"
    return figure(
        drawing, f"Perplexity against {title}: {better} is better; the line joins what no other beats."
    )


def _run(name: str, report: dict[str, Any], side: str) -> Run:
    quality = report["quality"] if report["quality"] and "perplexity" in report["quality"] else {}
    perplexity = quality.get("perplexity" if side == "result" else "base_perplexity", {})
    result = side == "result"
    return Run(
        name,
        figures.what_was_done(report) if result else report["base"]["model"],
        report["size"][side]["bytes_on_disk"],
        report["size"][side]["bits_per_weight"],
        perplexity.get("value"),
        perplexity.get("stderr"),
        quality["kl"]["value"] if quality and result else None,
        quality["top1_agreement"]["value"] if quality and result else None,
        figures.rate(report["speed"], side, "decode"),
        figures.rate(report["speed"], side, "prefill"),
    )


def _fullest(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report that tells most of the base."""
    return max(
        reports,
        key=lambda report: (
            "perplexity" in (report["quality"] or {}),
            figures.rate(report["speed"], "base", "decode") is not None,
        ),
    )


def _caveats(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> list[str]:
    """Why figures of the runs are not of a kind."""
    told = []
    for what, of in (
        ("base models", lambda report: report["base"]["model"]),
        ("texts of the perplexity", lambda report: _text(report)),
        ("machines or settings of the speed", lambda report: _machine(report)),
    ):
        values = {name: of(report) for name, report in zip(names, reports, strict=True)}
        different = dict.fromkeys(value for value in values.values() if value)
        if len(different) > 1:
            listing = "; ".join(
                f"{value}: {', '.join(name for name, other in values.items() if other == value)}"
                for value in different
            )
            told.append(f"The {what} differ, so those figures cannot be compared across them ({listing}).")
    return told


def _text(report: dict[str, Any]) -> str:
    found = (report["quality"] or {}).get("perplexity") or {}
    return (
        f"{found['protocol']} [{found['data_hash'][:8]}]"
        if found.get("data_hash")
        else found.get("protocol", "")
    )


def _machine(report: dict[str, Any]) -> str:
    if figures.rate(report["speed"], "result", "prefill") is None:
        return ""
    machine = report["environment"]
    return f"{machine['device']} ({machine['cpu']}), {machine['threads']} threads"


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' last names, with as much of what is in front as tells them apart."""
    for count in range(1, max(len(path.resolve().parts) for path in paths) + 1):
        names = ["/".join(path.resolve().parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _letter(index: int) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    return letters[index] if index < len(letters) else "?"


def _drawn(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _log(runs: Sequence[Run]) -> bool:
    values = [run.perplexity for run in runs if run.perplexity]
    return max(values) > WIDE * min(values)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
