"""report.md: the answers and the details of a run as Markdown, for a terminal, a pull request or the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmslim.report import figures
from llmslim.report.answers import answers, blocks, interval
from llmslim.report.html import samples, visible


def report_markdown(report: dict[str, Any], title: str, sections: Sequence[str]) -> str:
    """The report in words.

    Args:
        sections: what it shares with the model card (the table, steps, fallbacks, how to repeat it).
    """
    parts = [f"# {title}"]
    for answer in answers(report):
        lines = "\n".join(f"- {line}" for line in answer.lines if line)
        parts.append(f"**{answer.question}** {answer.short}\n\n{lines}")
    return "\n\n".join(part for part in [*parts, *sections, *_details(report)] if part).rstrip() + "\n"


def _details(report: dict[str, Any]) -> list[str]:
    details = report.get("details") or {}
    positions = [
        (f"{row['first']}-{row['last']}", f"{row['kl']:.4f}", f"{row['nll_increase']:+.4f}")
        for row in details.get("by_position") or []
    ]
    domains = [
        (row["name"], str(row["windows"]), interval(row["kl"], 4), interval(row["top1_agreement"], 1, 100.0))
        for row in details.get("by_domain") or []
    ]
    tokens = [
        (
            code(row["before"] + row["token"]),
            code(row["token"]),
            f"{row['base_probability']:.2%}",
            f"{row['probability']:.2%}",
            code(row["likeliest"]),
        )
        for row in details.get("tokens") or []
    ]
    written = [(code(prompt), code(base), code(result)) for prompt, base, result in samples(report)]
    errors = [(str(number), f"{value:.3g}") for number, value in blocks(report)]
    parts = report["size"]["result"].get("parts") or {}
    before = report["size"]["base"].get("parts") or {}
    sizes = [
        (name, f"{before.get(name, 0) / 1e6:,.2f}", f"{parts.get(name, 0) / 1e6:,.2f}")
        for name in {**before, **parts}
    ]
    return [
        _table("Scores on tasks", figures.TASK_HEADINGS, figures.tasks(report)),
        _table("Speed by batch and length", figures.SPEED_HEADINGS, figures.lengths(report)),
        _table("KL by position", ("tokens in front", "KL, nats", "rise of the loss"), positions),
        _table("KL by text", ("text", "windows", "KL, nats", "same likeliest token, %"), domains),
        _table(
            "The most damaged tokens", ("text", "token", "base gives it", "result", "result expects"), tokens
        ),
        _table("What they write", ("prompt", "base", "result"), written),
        _table("Largest output error by block", ("block", "relative error"), errors),
        _table("Where the bytes went", ("MB", "base", "result"), sizes),
    ]


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([f"## {title}", "", *lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def code(text: str) -> str:
    """Untrusted text as a cell that Markdown does not read: in backticks, of which it has none itself, nor bars."""
    shown = visible(text).replace("`", "'").replace("|", "¦")
    return f"`{shown}`" if shown.strip() else "` `"
