"""report.html: what was gained, what it cost and whether to trust it, on one page that needs nothing beside it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import yaml

from llmslim.report import figures
from llmslim.report.answers import Answer, answers, blocks, interval
from llmslim.report.page import card, figure, listed, page, paragraph, section, stack, table
from llmslim.report.svg import columns

STYLES = {True: "good", False: "bad", None: ""}


def report_page(report: dict[str, Any], command: str) -> str:
    """The page of a run.

    Args:
        command: that makes the same again, with the recipe in recipe.yaml.
    """
    base = report["base"]["model"]
    title = f"{Path(base).name}, {figures.what_was_done(report)}"
    details = report.get("details") or {}
    return page(
        title,
        [
            f"<header><h1>{escape(title)}</h1>",
            paragraph(
                f"Made from {base} by llmslim {report['llmslim']}; stored as {report['format']}.", "dim"
            ),
            "</header>",
            f'<div class="cards">{"".join(map(_card, answers(report)))}</div>',
            section("Before and after", _before_and_after(report)),
            section("Scores on tasks", *_scores(report)),
            section("Speed by batch and length", *_lengths(report)),
            section("What each step left", _steps(report)),
            section("Where quality is lost", _positions(details), _domains(details)),
            section("The most damaged tokens", _tokens(details)),
            section("What they write", _samples(report)),
            section("Error by block", _layers(report)),
            section("Where the bytes went", _bytes(report)),
            section("Fallbacks and warnings", listed(figures.notes(report, 200)) or paragraph("None.")),
            section("Verification", _checks(report)),
            section("Do it again", _repeat(report, command)),
            section("Made on", _environment(report)),
        ],
    )


def _card(answer: Answer) -> str:
    return card(answer.question, answer.short, answer.lines, STYLES[answer.good])


def _before_and_after(report: dict[str, Any]) -> str:
    rows = [(row.label, row.base, row.result, row.change) for row in figures.rows(report)]
    said = [*figures.chosen(report), *(f"{one[0].upper()}{one[1:]}." for one in figures.pruned(report))]
    said += [f"{one[0].upper()}{one[1:]}." for one in figures.skipped(report)]
    protocol = ((report["quality"] or {}).get("perplexity") or {}).get("protocol", "")
    told = f"Perplexity on {protocol}. ± is the standard error over windows." if protocol else ""
    return table(("", "base", "result", "change"), rows, (1, 2, 3)) + "".join(
        paragraph(one, "dim") for one in [*said, told]
    )


def _steps(report: dict[str, Any]) -> str:
    rows = [(line.label, *line.cells) for line in figures.steps(report)]
    return table(("", *figures.STEP_HEADINGS), rows, (1, 2, 3))


def _scores(report: dict[str, Any]) -> list[str]:
    rows = figures.tasks(report)
    told = figures.protocols(report) or [_unmeasured(report, "evaluate", "--tasks arc_easy,piqa ")]
    return [table(figures.TASK_HEADINGS, rows, (1, 2)), *(paragraph(one, "dim") for one in told)]


def _lengths(report: dict[str, Any]) -> list[str]:
    rows = figures.lengths(report)
    verdict = report["benchmark"]["verdict"].rstrip(".") if rows else ""
    told = (
        f"In one sentence: {verdict}. Medians of fresh processes in turns; speeds in tokens."
        if rows
        else _unmeasured(report, "benchmark")
    )
    return [table(figures.SPEED_HEADINGS, rows, (1, 2, 3)), paragraph(told, "dim")]


def _unmeasured(report: dict[str, Any], verb: str, options: str = "") -> str:
    """How to add what this run has not; of models that are not causal there is nothing to add."""
    if "skipped" in (report["quality"] or {}):
        return ""
    return f"Not measured. To add it: llmslim {verb} FOLDER {options}--base {report['base']['spec']} --save"


def _positions(details: dict[str, Any]) -> str:
    rows = details.get("by_position") or []
    if not rows:
        return ""
    labels = [str(row["first"]) for row in rows]
    drawings = [
        figure(
            columns(labels, [row["kl"] for row in rows], "tokens in front", "KL, nats"), "KL from the base"
        ),
        figure(
            columns(labels, [row["nll_increase"] for row in rows], "tokens in front", "nats"),
            "Rise of the negative log-likelihood, by position",
        ),
    ]
    return f'<div class="figures">{"".join(drawings)}</div>'


def _domains(details: dict[str, Any]) -> str:
    rows = [
        (
            row["name"],
            f"{row['windows']}",
            interval(row["kl"], 3),
            interval(row["nll_increase"], 3),
            f"{row['top1_agreement']['value']:.1%}",
        )
        for row in details.get("by_domain") or []
    ]
    told = (
        "In nats per token, with 95 % intervals over windows (of two windows they tell little); and how often the "
        "likeliest token is the same."
    )
    headings = ("text", "windows", "KL, nats", "rise of loss", "same top")
    return table(headings, rows, (1, 2, 3, 4)) + paragraph(told if rows else "", "dim")


def _tokens(details: dict[str, Any]) -> str:
    rows = details.get("tokens") or []
    if not rows:
        return ""
    cells = "".join(
        f'<tr><td class="t">{escape(visible(row["before"]))}<mark>{escape(visible(row["token"]))}</mark></td>'
        f'<td class="n">{row["base_probability"]:.2%}</td><td class="n">{row["probability"]:.2%}</td>'
        f"<td><code>{escape(visible(row['base_likeliest']))}</code></td>"
        f"<td><code>{escape(visible(row['likeliest']))}</code></td></tr>"
        for row in rows
    )
    head = (
        '<th>text and <mark>token</mark></th><th class="n">base gives it</th><th class="n">result</th>'
        "<th>base expects</th><th>result</th>"
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>'


def _samples(report: dict[str, Any]) -> str:
    pairs = samples(report)
    return "".join(
        f"<p><b>{escape(prompt)}</b></p>"
        f'<div class="pair"><div><span class="dim">base</span><br>{escape(base)}</div>'
        f'<div><span class="dim">result</span><br>{escape(result)}</div></div>'
        for prompt, base, result in pairs
    ) + (paragraph("Greedy decoding.", "dim") if pairs else "")


def samples(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(prompt, what the base writes, what the result writes)."""
    sides = [((report["speed"] or {}).get(side) or {}).get("samples") or [] for side in ("base", "result")]
    return [(a["prompt"], a["text"], b["text"]) for a, b in zip(*sides, strict=False)]


def _layers(report: dict[str, Any]) -> str:
    found = blocks(report)
    if not found:
        return paragraph("Not measured: no step of this run compared outputs on a text.", "dim")
    drawing = columns(
        [str(number) for number, _ in found], [value for _, value in found], "block", "relative error"
    )
    worst = "; ".join(f"{name} {error:.2g}" for name, error in figures.worst_linears(report))
    caption = (
        f"Largest relative output error of a Linear in each block, on the calibration text. Worst: {worst}."
    )
    return figure(drawing, caption)


def _bytes(report: dict[str, Any]) -> str:
    sides = [(side, report["size"][side].get("parts") or {}) for side in ("base", "result")]
    if not all(parts for _, parts in sides):
        return ""
    names = list(dict.fromkeys(name for _, parts in sides for name in parts))
    whole = max(sum(parts.values()) for _, parts in sides)
    bars = "".join(
        f'<div class="dim">{side}, {sum(parts.values()) / 1e6:,.1f} MB</div>'
        + stack([(f"b{min(5, names.index(name))}", size) for name, size in parts.items()], whole)
        for side, parts in sides
    )
    key = "".join(
        f'<span><i class="b{min(5, index)}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    rows = [(name, *(f"{parts.get(name, 0) / 1e6:,.2f}" for _, parts in sides)) for name in names]
    return f'{bars}<p class="key dim">{key}</p>' + table(("MB", "base", "result"), rows, (1, 2))


def _checks(report: dict[str, Any]) -> str:
    rows = [
        (check["check"], "passed" if check["ok"] else "failed", check["detail"])
        for check in report["verification"]["checks"]
    ]
    return table(("check", "", "what was found"), rows)


def _repeat(report: dict[str, Any], command: str) -> str:
    recipe = yaml.safe_dump(report["recipe"], sort_keys=False)
    text = report["calibration"]
    told = f"Calibration: {text['protocol']}; SHA-256 of its tokens {text['data_hash']}." if text else ""
    return (
        f"<pre>{escape(command)}</pre>{paragraph('with recipe.yaml:', 'dim')}<pre>{escape(recipe)}</pre>"
        + paragraph(told, "dim")
    )


def _environment(report: dict[str, Any]) -> str:
    machine = report["environment"]
    rows = [
        (key, str(machine[key]))
        for key in ("platform", "cpu", "device", "threads", "compute_dtype", "python")
    ]
    rows += list(machine["versions"].items())
    return table(("", ""), rows) + paragraph(figures.run_line(report), "dim")


def visible(text: str) -> str:
    """Text in which line ends and other control characters can be seen."""
    return "".join("⏎" if char == "\n" else char if char.isprintable() else "·" for char in text)
