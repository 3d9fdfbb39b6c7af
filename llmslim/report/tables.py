"""Tables for the terminal: the plan of a run and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from llmslim.report import figures

if TYPE_CHECKING:
    from llmslim.plan import Plan


def summary_table(report: dict[str, Any]) -> Group:
    """Base against result, the worst Linears, what was skipped and what fell back; fits in 100 columns."""
    base, format_name = report["base"]["model"], report["format"]
    table = Table("", title=f"{escape(str(base))} -> {format_name}", title_justify="left")
    for heading in ("base", "result", "change"):
        table.add_column(heading, justify="right")
    for row in figures.rows(report):
        table.add_row(row.label, row.base, row.result, row.change)
    lines: list[str] = [*figures.chosen(report), figures.run_line(report)]
    if verdict := figures.verdict(report):
        lines.append(verdict)
    if worst := figures.worst_linears(report):
        lines.append(
            "Largest output errors: " + ", ".join(f"{name} {error:.2g}" for name, error in worst) + "."
        )
    lines += [
        f"{reason[0].upper()}{reason[1:]}." for reason in (*figures.pruned(report), *figures.skipped(report))
    ]
    if report["notes"]:
        lines.append(f"{len(report['notes'])} notes (fallbacks and anomalies):")
        lines += [f"  {note}" for note in figures.notes(report)]
    else:
        lines.append("No fallbacks.")
    parts: list[RenderableType] = [table, *_steps(report), *map(escape, lines)]
    return Group(*parts)


def _steps(report: dict[str, Any]) -> list[Table]:
    """What each step left, as a table of its own, if it was measured."""
    lines = figures.steps(report)
    if not lines:
        return []
    table = Table("after step")
    for heading in figures.STEP_HEADINGS:
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(line.label, *line.cells)
    return [table]


def plan_table(plan: Plan) -> Table:
    """The plan of a run as it stands in `--plan`."""
    from llmslim.work import duration

    table = Table("plan", "", title_justify="left", show_header=False)
    reading = "one block at a time" if plan.streams else "whole: its files need conversion on load"
    table.add_row("blocks", f"{plan.blocks}, read {reading}")
    for told in plan.chosen:
        table.add_row("chosen", escape(told))
    table.add_row("edits", f"{plan.linears}")
    table.add_row(
        "peak memory", f"{plan.peak_memory / 1e9:.2f} GB, of {plan.available_memory / 1e9:.1f} GB free"
    )
    table.add_row("time", f"about {duration(plan.seconds)}, computing in {plan.compute_dtype}")
    smaller = plan.input_bytes / max(1, plan.output_bytes)
    sizes = f"{plan.input_bytes / 1e6:,.1f} MB -> {plan.output_bytes / 1e6:,.1f} MB ({smaller:.2f}x smaller)"
    table.add_row("weights", sizes)
    table.add_row("disk while running", f"{plan.disk_bytes / 1e6:,.1f} MB")
    table.add_row("format", plan.format)
    return table
